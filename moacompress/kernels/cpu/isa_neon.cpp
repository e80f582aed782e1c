#if defined(__aarch64__)
#include "vec_neon.h"
#include "kernels.inl"
#include "linear.inl"
#include "blocks.inl"
#include "profile.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(neon_kernels);
}
#endif
