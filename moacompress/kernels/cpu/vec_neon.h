// Vectors of 4 floats: NEON, which every 64-bit ARM processor has.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef float32x4_t V;
typedef uint32x4_t Mask;
constexpr int W = 4;
constexpr int PANEL = 4;  // there are 32 registers

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline V set1(float x) { return vdupq_n_f32(x); }
inline V zero() { return vdupq_n_f32(0.f); }
inline uint16x4_t load_words(const void* p) {
  uint16x4_t x;
  memcpy(&x, p, 8);
  return x;
}
inline V load(const float* p) { return vld1q_f32(p); }
inline V load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_words(p), 16)); }
inline V load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_words(p))); }
template <class T> inline V load_part(const T* p, int n) {
  T copy[W];
  memset(copy, 0, sizeof copy);
  memcpy(copy, p, sizeof(T) * size_t(n));
  return load(copy);
}
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline uint32x4_t round_bits(V x) {  // to bfloat16, in the upper half
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
inline void store(bf16* p, V v) {
  const uint16x4_t words = vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), round_bits(v), vdupq_n_u32(0x7fc00000)), 16);
  memcpy(p, &words, 8);
}
inline void store(f16* p, V v) {
  const uint16x4_t words = vreinterpret_u16_f16(vcvt_f16_f32(v));
  memcpy(p, &words, 8);
}
template <class T> inline void store_part(T* p, V v, int n) {
  T copy[W];
  store(copy, v);
  memcpy(p, copy, sizeof(T) * size_t(n));
}

inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
// Where one of the two is NaN, max and min give the second, `at_least` is false and `not_below` is true.
inline V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Mask at_least(V a, V b) { return vcgeq_f32(a, b); }
inline Mask not_below(V a, V b) { return vmvnq_u32(vcltq_f32(a, b)); }
inline Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
inline Mask either(Mask a, Mask b) { return vorrq_u32(a, b); }
inline V select(Mask m, V a, V b) { return vbslq_f32(m, a, b); }
inline V round(V x) { return vrndnq_f32(x); }
inline V times_power_of_two(V x, V n) {
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}
inline float largest(V v) {
  const V a = max(v, vextq_f32(v, v, 2)), b = max(a, vdupq_laneq_f32(a, 1));
  return vgetq_lane_f32(b, 0);
}
inline float sum(V v) { return vaddvq_f32(v); }
inline void sum4(V a, V b, V c, V d, float* to) { store(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Codes as numbers: bytes, with or without a sign, or the low and the high nibbles of bytes.
inline uint8x8_t load_bytes(const uint8_t* p) {
  uint32_t x;
  memcpy(&x, p, 4);
  return vreinterpret_u8_u32(vdup_n_u32(x));
}
inline V load_codes(const uint8_t* p) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load_bytes(p))))); }
inline V load_signed(const uint8_t* p) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_bytes(p))))));
}
inline void load_nibbles(const uint8_t* p, V& low, V& high) {
  const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(load_bytes(p))));
  low = vcvtq_f32_u32(vandq_u32(x, vdupq_n_u32(15)));
  high = vcvtq_f32_u32(vshrq_n_u32(x, 4));
}
// The numbers of the bits `mask << shift` of W whole numbers of 32 bits.
typedef uint32x4_t Ints;
inline Ints load_ints(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline V picked(Ints x, int shift, int mask) {
  return vcvtq_f32_u32(vandq_u32(vshlq_u32(x, vdupq_n_s32(-shift)), vdupq_n_u32(uint32_t(mask))));
}
// Of bytes with a code of 6 bits and 2 bits of another: the codes that three of them have in their high bits.
inline uint8x16_t fourth_six(uint8x16_t x, uint8x16_t y, uint8x16_t z) {
  const uint8x16_t low = vshrq_n_u8(x, 6), middle = vandq_u8(vshrq_n_u8(y, 4), vdupq_n_u8(12));
  return vorrq_u8(vorrq_u8(low, middle), vandq_u8(vshrq_n_u8(z, 2), vdupq_n_u8(48)));
}
inline Ints fourth_six(Ints x, Ints y, Ints z) {
  return vreinterpretq_u32_u8(fourth_six(vreinterpretq_u8_u32(x), vreinterpretq_u8_u32(y), vreinterpretq_u8_u32(z)));
}
inline void store_low_bytes(uint8_t* p, uint32x4_t x) {
  const uint16x4_t words = vmovn_u32(x);
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  memcpy(p, &bytes, 4);
}
inline void store_codes(uint8_t* p, V v) { store_low_bytes(p, vcvtq_u32_f32(v)); }  // of whole numbers in [0, 255]
// x of the lane i ^ STEP in lane i; and the signs of the lanes with that bit turned.
template <int STEP> inline V swapped(V x) {
  if constexpr (STEP == 1) return vrev64q_f32(x);
  else return vextq_f32(x, x, 2);
}
template <int STEP> inline V turned(V x) {
  constexpr uint64_t SIGNS = STEP == 1 ? 0x8000000000000000u : 0;  // of two lanes, the second one above
  const uint64x2_t bits = vcombine_u64(vcreate_u64(SIGNS), vcreate_u64(STEP == 1 ? SIGNS : 0x8000000080000000u));
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), vreinterpretq_u32_u64(bits)));
}

#ifdef MOACOMPRESS_DOTS
// Pairs of bfloat16 in W lanes, whose products are summed in float32.
typedef uint32x4_t Pairs;
inline Pairs load_pairs(const void* p) { return vreinterpretq_u32_u8(vld1q_u8((const uint8_t*)p)); }
inline Pairs load_pairs_part(const bf16* p, int n) {  // of n numbers
  bf16 copy[2 * W];
  memset(copy, 0, sizeof copy);
  memcpy(copy, p, sizeof(bf16) * size_t(n));
  return load_pairs(copy);
}
inline void store_pairs(void* p, Pairs x) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_u32(x)); }
inline Pairs spread_pair(const void* p) { uint32_t x; memcpy(&x, p, 4); return vdupq_n_u32(x); }
inline V dot_pairs(Pairs a, Pairs b, V sum) { return vbfdotq_f32(sum, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b)); }
// Of W numbers and, or zeros for null, W others.
inline Pairs pair_rows(const bf16* a, const bf16* b) {
  const uint16x4_t low = load_words(a), high = b ? load_words(b) : vdup_n_u16(0);
  return vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)));
}
inline Pairs pair_rounded(V low, V high) { return vsriq_n_u32(round_bits(high), round_bits(low), 16); }
inline V low_of(Pairs x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
inline V high_of(Pairs x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000))); }

// Four bytes in W lanes, whose products with bytes that have a sign are summed in whole numbers.
typedef uint8x16_t Quads;
typedef int32x4_t Sums;
inline Quads load_quads(const uint8_t* p) { return vld1q_u8(p); }
inline Quads low_nibbles(Quads x) { return vandq_u8(x, vdupq_n_u8(15)); }
inline Quads high_nibbles(Quads x) { return vshrq_n_u8(x, 4); }
inline Quads low_six(Quads x) { return vandq_u8(x, vdupq_n_u8(63)); }
inline Sums no_sums() { return vdupq_n_s32(0); }
inline Sums dot_quads(Sums sum, Quads x, const int8_t* four) {
  int32_t bytes;
  memcpy(&bytes, four, 4);
  return vusdotq_s32(sum, x, vreinterpretq_s8_s32(vdupq_n_s32(bytes)));
}
inline V numbers_of(Sums x) { return vcvtq_f32_s32(x); }
// Puts numbers, rounded, as 256 times an upper byte and a lower one; returns the whole numbers.
inline V store_halves(V x, int8_t* upper, int8_t* lower) {
  const int32x4_t whole = vcvtnq_s32_f32(x), high = vshrq_n_s32(vaddq_s32(whole, vdupq_n_s32(128)), 8);
  store_low_bytes((uint8_t*)upper, vreinterpretq_u32_s32(high));
  store_low_bytes((uint8_t*)lower, vreinterpretq_u32_s32(vsubq_s32(whole, vshlq_n_s32(high, 8))));
  return vcvtq_f32_s32(whole);
}
inline V about_inverse(V x) { return vdivq_f32(set1(1.f), x); }
#endif

}  // namespace
