#if defined(__aarch64__)
#include "vec_neon.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(neon_kernels);
}
#endif
