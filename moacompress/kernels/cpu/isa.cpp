#include "tasks.h"

namespace moacompress {

bool isa_works(Isa isa) {
  if (isa == PORTABLE) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == AVX2) return avx2;
  if (isa == AVX512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Isa best_isa() {
  for (int isa = AVX512_BF16; isa > PORTABLE; isa--)
    if (isa_works(Isa(isa))) return Isa(isa);
  return PORTABLE;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[isa];
}

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == AVX2) return avx2_kernels;
  if (isa == AVX512) return avx512_kernels;
  if (isa == AVX512_BF16) return avx512_bf16_kernels;
#endif
  return portable_kernels;
}

}  // namespace moacompress
