#if defined(__aarch64__)
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define MOACOMPRESS_PAIRS
#endif
#include "vec_neon.h"
#include "kernels.inl"
#include "linear.inl"
#include "blocks.inl"
#include "profile.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(neon_bf16_kernels);
#ifdef MOACOMPRESS_PAIRS
const bool built_with_pairs = true;
#else
const bool built_with_pairs = false;  // the compiler does not know them
#endif
}
#endif
