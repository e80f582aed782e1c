// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef __m256 V;
typedef __m256 Mask;
constexpr int W = 8;
constexpr int PANEL = 2;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline V set1(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline V load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
template <class T> inline V load_part(const T* p, int n) {
  T copy[W];
  memset(copy, 0, sizeof copy);
  memcpy(copy, p, sizeof(T) * size_t(n));
  return load(copy);
}
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, V v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(bits, 16), one));
  up = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store(f16* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
template <class T> inline void store_part(T* p, V v, int n) {
  T copy[W];
  store(copy, v);
  memcpy(p, copy, sizeof(T) * size_t(n));
}

inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// Where one of the two is NaN, max and min give the second, `at_least` is false and `not_below` is true.
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline Mask at_least(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask not_below(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline V select(Mask m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
inline V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_two(V x, V n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
inline float largest(V v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float sum(V v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline void sum4(V a, V b, V c, V d, float* to) {
  const V x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// Codes as numbers: bytes, with or without a sign, or the low and the high nibbles of bytes.
inline V load_codes(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline V load_signed(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline void load_nibbles(const uint8_t* p, V& low, V& high) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4));
}
// The numbers of the bits `mask << shift` of W whole numbers of 32 bits.
typedef __m256i Ints;
inline Ints load_ints(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline V picked(Ints x, int shift, int mask) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(mask)));
}
// Of bytes with a code of 6 bits and 2 bits of another: the codes that three of them have in their high bits.
inline Ints fourth_six(Ints x, Ints y, Ints z) {
  const __m256i low = _mm256_and_si256(_mm256_srli_epi32(x, 6), _mm256_set1_epi8(3));
  const __m256i middle = _mm256_and_si256(_mm256_srli_epi32(y, 4), _mm256_set1_epi8(12));
  return _mm256_or_si256(_mm256_or_si256(low, middle), _mm256_and_si256(_mm256_srli_epi32(z, 2), _mm256_set1_epi8(48)));
}
inline void store_codes(uint8_t* p, V v) {  // of whole numbers in [0, 255]
  const __m256i x = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
// x of the lane i ^ STEP in lane i; and the signs of the lanes with that bit turned.
template <int STEP> inline V swapped(V x) {
  if constexpr (STEP == 1) return _mm256_permute_ps(x, 0xb1);
  else if constexpr (STEP == 2) return _mm256_permute_ps(x, 0x4e);
  else return _mm256_permute2f128_ps(x, x, 1);
}
template <int STEP> inline V turned(V x) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bit = _mm256_and_si256(lanes, _mm256_set1_epi32(STEP));
  const __m256i set = _mm256_cmpeq_epi32(bit, _mm256_set1_epi32(STEP));
  return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(set, 31)));
}

}  // namespace
