// Vectors of 4 floats by the compiler's own vector types: any processor.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

typedef float V __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int PANEL = 2;  // vectors of lanes that the microkernels work on at once

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float widen(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return from_bits(sign | rest | 0x7f800000);  // infinity and NaN
  return from_bits(sign | to_bits(from_bits(rest) * from_bits(0x77800000)));  // 2^112: subnormals come out right
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {
  const uint32_t bits = to_bits(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, f16* to) {
  const uint32_t sign = (to_bits(x) >> 16) & 0x8000, rest = to_bits(x) & 0x7fffffff;
  uint32_t bits;
  if (rest > 0x7f800000) bits = 0x7e00;
  else if (rest >= 0x477ff000) bits = 0x7c00;  // rounds to infinity
  else if (rest < 0x38800000) bits = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);  // subnormal: the adder rounds
  else bits = (rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13;
  to->bits = uint16_t(sign | bits);
}

inline V set1(float x) { return V{x, x, x, x}; }
inline V zero() { return V{0, 0, 0, 0}; }
template <class T> inline V load_part(const T* p, int n) {
  V v = zero();
  for (int i = 0; i < n; i++) v[i] = widen(p[i]);
  return v;
}
inline V load(const float* p) { V v; memcpy(&v, p, 16); return v; }
template <class T> inline V load(const T* p) { return load_part(p, W); }
template <class T> inline void store_part(T* p, V v, int n) {
  for (int i = 0; i < n; i++) narrow(v[i], p + i);
}
inline void store(float* p, V v) { memcpy(p, &v, 16); }
template <class T> inline void store(T* p, V v) { store_part(p, v, W); }

inline V fma(V a, V b, V c) { return a * b + c; }
// Where one of the two is NaN, max and min give the second, `at_least` is false and `not_below` is true.
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
inline Mask at_least(V a, V b) { return a >= b; }
inline Mask not_below(V a, V b) { return ~(a < b); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline V select(Mask m, V a, V b) { return m ? a : b; }
inline V round(V x) { return (x + set1(12582912.f)) - set1(12582912.f); }
inline V times_power_of_two(V x, V n) {
  Mask bits = (__builtin_convertvector(n, Mask) + 127) << 23;
  V power; memcpy(&power, &bits, 16);
  return x * power;
}
inline float largest(V v) { const V a = max(v, V{v[2], v[3], v[0], v[1]}); return a[0] > a[1] ? a[0] : a[1]; }
inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline void sum4(V a, V b, V c, V d, float* to) { to[0] = sum(a); to[1] = sum(b); to[2] = sum(c); to[3] = sum(d); }
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Codes as numbers: bytes, with or without a sign, or the low and the high nibbles of bytes.
inline V load_codes(const uint8_t* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline V load_signed(const uint8_t* p) { return V{float(int8_t(p[0])), float(int8_t(p[1])), float(int8_t(p[2])), float(int8_t(p[3]))}; }
inline void load_nibbles(const uint8_t* p, V& low, V& high) {
  for (int i = 0; i < W; i++) low[i] = float(p[i] & 15), high[i] = float(p[i] >> 4);
}
// The numbers of the bits `mask << shift` of W whole numbers of 32 bits.
typedef uint32_t Ints __attribute__((vector_size(16)));
inline Ints load_ints(const uint8_t* p) { Ints x; memcpy(&x, p, 16); return x; }
inline V picked(Ints x, int shift, int mask) { return __builtin_convertvector((x >> shift) & uint32_t(mask), V); }
// Of bytes with a code of 6 bits and 2 bits of another: the codes that three of them have in their high bits.
inline Ints fourth_six(Ints x, Ints y, Ints z) {
  return ((x >> 6) & 0x03030303u) | ((y >> 4) & 0x0c0c0c0cu) | ((z >> 2) & 0x30303030u);
}
inline void store_codes(uint8_t* p, V v) {  // of whole numbers in [0, 255]
  for (int i = 0; i < W; i++) p[i] = uint8_t(v[i]);
}
// x of the lane i ^ STEP in lane i; and the signs of the lanes with that bit turned.
template <int STEP> inline V swapped(V x) { return V{x[0 ^ STEP], x[1 ^ STEP], x[2 ^ STEP], x[3 ^ STEP]}; }
template <int STEP> inline V turned(V x) {
  for (int i = 0; i < W; i++)
    if (i & STEP) x[i] = -x[i];
  return x;
}

}  // namespace
