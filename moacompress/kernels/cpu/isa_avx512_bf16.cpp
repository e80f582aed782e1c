#if defined(__x86_64__)
#define MOACOMPRESS_DOTS
#include "vec_avx512.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(avx512_bf16_kernels);
}
#endif
