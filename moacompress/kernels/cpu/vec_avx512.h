// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef __m512 V;
typedef __mmask16 Mask;
constexpr int W = 16;
constexpr int PANEL = 4;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline V set1(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline Mask first_lanes(int n) { return Mask((1u << n) - 1); }
inline V widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V widen(__m256i x, f16) { return _mm512_cvtph_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
template <class T> inline V load(const T* p) { return widen(_mm256_loadu_si256((const __m256i*)p), T()); }
inline V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
template <class T> inline V load_part(const T* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T()); }
inline __m512i round_bits(V x) {  // to bfloat16, in the upper half
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m256i narrow(V v, bf16) {
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(round_bits(v), 16), nan, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrow(V v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
template <class T> inline void store(T* p, V v) { _mm256_storeu_si256((__m256i*)p, narrow(v, T())); }
inline void store_part(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
template <class T> inline void store_part(T* p, V v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, T())); }

inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// Where one of the two is NaN, max and min give the second, `at_least` is false and `not_below` is true.
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline Mask at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask not_below(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
inline Mask both(Mask a, Mask b) { return Mask(a & b); }
inline Mask either(Mask a, Mask b) { return Mask(a | b); }
inline V select(Mask m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
inline V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_two(V x, V n) { return _mm512_scalef_ps(x, n); }
inline __m256 halves_max(V v) { return _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline __m256 halves_sum(V v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline float largest(V v) {
  const __m256 h = halves_max(v);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float sum(V v) {
  const __m256 h = halves_sum(v);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline void sum4(V a, V b, V c, V d, float* to) {
  const V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const V lo = _mm512_shuffle_ps(ab, cd, 0x44), hi = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 h = halves_sum(_mm512_add_ps(lo, hi));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Codes as numbers: bytes, with or without a sign, or the low and the high nibbles of bytes.
inline V load_codes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline V load_signed(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void load_nibbles(const uint8_t* p, V& low, V& high) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
  high = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4));
}
// The numbers of the bits `mask << shift` of W whole numbers of 32 bits.
typedef __m512i Ints;
inline Ints load_ints(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline V picked(Ints x, int shift, int mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, unsigned(shift)), _mm512_set1_epi32(mask)));
}
// Of bytes with a code of 6 bits and 2 bits of another: the codes that three of them have in their high bits.
inline Ints fourth_six(Ints x, Ints y, Ints z) {
  const __m512i low = _mm512_and_si512(_mm512_srli_epi32(x, 6), _mm512_set1_epi8(3));
  const __m512i middle = _mm512_and_si512(_mm512_srli_epi32(y, 4), _mm512_set1_epi8(12));
  return _mm512_or_si512(_mm512_or_si512(low, middle), _mm512_and_si512(_mm512_srli_epi32(z, 2), _mm512_set1_epi8(48)));
}
inline void store_codes(uint8_t* p, V v) {  // of whole numbers in [0, 255]
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
// x of the lane i ^ STEP in lane i; and the signs of the lanes with that bit turned.
template <int STEP> inline V swapped(V x) {
  if constexpr (STEP == 1) return _mm512_permute_ps(x, 0xb1);
  else if constexpr (STEP == 2) return _mm512_permute_ps(x, 0x4e);
  else if constexpr (STEP == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  else return _mm512_shuffle_f32x4(x, x, 0x4e);
}
template <int STEP> inline V turned(V x) {
  const Mask set = STEP == 1 ? 0xaaaa : STEP == 2 ? 0xcccc : STEP == 4 ? 0xf0f0 : 0xff00;
  return _mm512_mask_xor_ps(x, set, x, set1(-0.f));
}

#ifdef MOACOMPRESS_DOTS
// Pairs of bfloat16 in W lanes, whose products are summed in float32.
typedef __m512i Pairs;
inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
inline Pairs load_pairs_part(const bf16* p, int n) { return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p); }  // of n numbers
inline void store_pairs(void* p, Pairs x) { _mm512_storeu_si512(p, x); }
inline Pairs spread_pair(const void* p) { int x; memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
inline V dot_pairs(Pairs a, Pairs b, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// Of W numbers and, or zeros for null, W others.
inline Pairs pair_rows(const bf16* a, const bf16* b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b)) : _mm512_setzero_si512();
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline Pairs pair_rounded(V low, V high) {
  return _mm512_or_si512(_mm512_srli_epi32(round_bits(low), 16), _mm512_and_si512(round_bits(high), _mm512_set1_epi32(int(0xffff0000))));
}
inline V low_of(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline V high_of(Pairs x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))); }

// Four bytes in W lanes, whose products with bytes that have a sign are summed in whole numbers.
typedef __m512i Quads;
typedef __m512i Sums;
inline Quads load_quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Quads low_nibbles(Quads x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Quads high_nibbles(Quads x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Quads low_six(Quads x) { return _mm512_and_si512(x, _mm512_set1_epi8(63)); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums dot_quads(Sums sum, Quads x, const int8_t* four) {
  int bytes;
  memcpy(&bytes, four, 4);
  return _mm512_dpbusd_epi32(sum, x, _mm512_set1_epi32(bytes));
}
inline V numbers_of(Sums x) { return _mm512_cvtepi32_ps(x); }
// Puts numbers, rounded, as 256 times an upper byte and a lower one; returns the whole numbers.
inline V store_halves(V x, int8_t* upper, int8_t* lower) {
  const __m512i whole = _mm512_cvtps_epi32(x);
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i*)upper, _mm512_cvtepi32_epi8(high));
  _mm_storeu_si128((__m128i*)lower, _mm512_cvtepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8))));
  return _mm512_cvtepi32_ps(whole);
}
inline V about_inverse(V x) { return _mm512_rcp14_ps(x); }  // to 2^-14 of it
#endif

}  // namespace
