#include "vec_portable.h"
#include "kernels.inl"
#include "linear.inl"
#include "blocks.inl"
#include "profile.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(portable_kernels);
}
