#if defined(__x86_64__)
#define MOACOMPRESS_DOTS
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define MOACOMPRESS_AMX
#endif
#include "vec_avx512.h"
#include "kernels.inl"

namespace moacompress {
MOACOMPRESS_KERNELS(avx512_amx_kernels);
#ifdef MOACOMPRESS_AMX
const bool built_with_tiles = true;
#else
const bool built_with_tiles = false;  // the compiler does not know them
#endif
}
#endif
