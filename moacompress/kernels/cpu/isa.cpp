#include "tasks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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
#elif defined(__aarch64__)
// Whether the processor multiplies pairs of bfloat16, and four bytes with and without a sign.
static bool has_dots() {
  if (!built_with_dots) return false;
#if defined(__linux__)
  constexpr unsigned long DOT = 1ul << 20, I8MM = 1ul << 13, BF16_DOT = 1ul << 14;  // HWCAP_ASIMDDP, HWCAP2_I8MM, HWCAP2_BF16
  return (getauxval(AT_HWCAP) & DOT) && (getauxval(AT_HWCAP2) & I8MM) && (getauxval(AT_HWCAP2) & BF16_DOT);
#elif defined(__APPLE__)
  for (const char* name : {"hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM", "hw.optional.arm.FEAT_BF16"}) {
    int there = 0;
    size_t size = sizeof there;
    if (sysctlbyname(name, &there, &size, nullptr, 0) != 0 || !there) return false;
  }
  return true;
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
  static const bool dots = has_dots();
  return isa == NEON || (isa == NEON_BF16 && dots);
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
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon", "neon_bf16"};
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
  if (isa == NEON_BF16) return neon_bf16_kernels;
#endif
  return portable_kernels;
}

}  // namespace moacompress
