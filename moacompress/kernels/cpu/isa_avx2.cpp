#if defined(__x86_64__)
#include "vec_avx2.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(avx2_kernels);
}
#endif
