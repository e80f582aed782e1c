#if defined(__x86_64__)
#include "vec_avx2.h"
#include "kernels.inl"
#include "linear.inl"
#include "blocks.inl"
#include "profile.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(avx2_kernels);
}
#endif
