#if defined(__aarch64__)
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define MOACOMPRESS_DOTS
#endif
#include "vec_neon.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(neon_bf16_kernels);
#ifdef MOACOMPRESS_DOTS
const bool built_with_dots = true;
#else
const bool built_with_dots = false;  // the compiler does not know them
#endif
}
#endif
