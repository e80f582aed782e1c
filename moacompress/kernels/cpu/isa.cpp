#include "tasks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moacompress {

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bytes and of bfloat16, and the system keeps them for this process.
static bool has_tiles() {
  unsigned a, b, c, d;
  if (!built_with_tiles || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
  if ((d & (BF16 | TILE | INT8)) != (BF16 | TILE | INT8)) return false;
#if defined(__linux__)
  constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ASK, TILES) == 0;
#else
  return false;
#endif
}
#endif

bool isa_works(Isa isa) {
  if (isa == PORTABLE) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == AVX2) return avx2;
  if (isa == AVX512) return avx512;
  if (!avx512 || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return false;
  static const bool tiles = has_tiles();
  return isa == AVX512_BF16 || (isa == AVX512_AMX && tiles);
#elif defined(__aarch64__)
  return isa == NEON;
#else
  return false;
#endif
}

Isa best_isa() {
  for (int isa = ISAS - 1; isa > PORTABLE; isa--)
    if (isa_works(Isa(isa))) return Isa(isa);
  return PORTABLE;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon"};
  return names[isa];
}

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == AVX2) return avx2_kernels;
  if (isa == AVX512) return avx512_kernels;
  if (isa == AVX512_BF16) return avx512_bf16_kernels;
  if (isa == AVX512_AMX) return avx512_amx_kernels;
#elif defined(__aarch64__)
  if (isa == NEON) return neon_kernels;
#endif
  return portable_kernels;
}

}  // namespace moacompress
