#if defined(__x86_64__)
#include "vec_avx512.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(avx512_kernels);
}
#endif
