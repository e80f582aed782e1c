#include "vec_portable.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(portable_kernels);
}
