// Products with weights in blocks by the processor's products of bytes (blocks.inl has those of other processors, and what the types
// are): codes as they lie, four to a sum, with the input in whole numbers of 23 bits, three bytes each.
//
// A step is four strips. Its inputs are divided by a power of two, so that none is lost of bfloat16 and float16 but of numbers that
// are 2^14 or 2^11 times smaller than the largest one beside them, and of those no more than 2^-23 of that one: what float32 rounds.
// The sums are exact up to the scales. A step in which some number is not finite makes the row's products NaN.

namespace moacompress {
namespace {

constexpr int64_t STEP_STRIPS = 4, STEP_INPUTS = STEP_STRIPS * STRIP, STEP_VECTORS = 6;  // bytes of x: three times two vectors
inline int64_t steps_of(int64_t inputs) { return (inputs + STEP_INPUTS - 1) / STEP_INPUTS; }

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// What differs between the types: whether both vectors of codes of a step have the same scales; the codes, of a step that may have
// fewer strips where blocks are as small; which 16 inputs are multiplied with 16 bytes of a vector; and whose scale a lane has.
template <int KIND> struct ByteBlocks;

// Blocks of 32 numbers in nibbles from the byte AT on: the low nibbles are one vector, and the high ones another.
template <class B, int AT> struct NibbleBlocks {
  static constexpr bool ONE_SUM = true;
  static inline int run(int vector, int at) { return 2 * at + vector; }
  static inline int part(int, int lane) { return lane / 4; }
  static inline __m512i bytes(const uint8_t* row, int64_t last) {
    const auto at = [&](int64_t b) { return _mm_loadu_si128((const __m128i*)(row + (b < last ? b : last) * B::BYTES + AT)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static inline void nibbles(__m512i x, __m512i* to) {
    to[0] = _mm512_and_si512(x, _mm512_set1_epi8(15));
    to[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
  }
  static inline void codes(const uint8_t* row, int, int64_t last, __m512i* to) { nibbles(bytes(row, last), to); }
};
template <> struct ByteBlocks<Q4_0> : NibbleBlocks<Blocks<Q4_0>, 2> {};
template <> struct ByteBlocks<Q4_1> : NibbleBlocks<Blocks<Q4_1>, 4> {};
template <> struct ByteBlocks<Q5_0> : NibbleBlocks<Blocks<Q5_0>, 6> {
  static inline void codes(const uint8_t* row, int, int64_t last, __m512i* to) {
    nibbles(bytes(row, last), to);
    uint64_t low = 0, high = 0;
    for (int64_t b = 0; b < STEP_STRIPS; b++) {
      uint32_t fifth;
      memcpy(&fifth, row + (b < last ? b : last) * Blocks<Q5_0>::BYTES + 2, 4);
      low |= uint64_t(fifth & 0xffff) << (16 * b);
      high |= uint64_t(fifth >> 16) << (16 * b);
    }
    to[0] = _mm512_mask_add_epi8(to[0], low, to[0], _mm512_set1_epi8(16));
    to[1] = _mm512_mask_add_epi8(to[1], high, to[1], _mm512_set1_epi8(16));
  }
};

template <> struct ByteBlocks<Q8_0> {
  static constexpr bool ONE_SUM = false;
  static inline int run(int vector, int at) { return 4 * vector + at; }
  static inline int part(int vector, int lane) { return 2 * vector + lane / 8; }
  static inline void codes(const uint8_t* row, int, int64_t last, __m512i* to) {
    const auto at = [&](int64_t b) { return _mm256_loadu_si256((const __m256i*)(row + (b < last ? b : last) * Blocks<Q8_0>::BYTES + 2)); };
    for (int v = 0; v < 2; v++) {
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(at(2 * v)), at(2 * v + 1), 1);
      to[v] = _mm512_xor_si512(both, _mm512_set1_epi8(char(128)));
    }
  }
};

inline __m512i halves_of(int64_t low, int64_t high, bool words) {  // a number in all words, or bytes, of each half
  const __m256i a = words ? _mm256_set1_epi16(short(low)) : _mm256_set1_epi8(char(low));
  const __m256i b = words ? _mm256_set1_epi16(short(high)) : _mm256_set1_epi8(char(high));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

template <> struct ByteBlocks<Q4_K> {
  static constexpr bool ONE_SUM = false;
  static inline int run(int vector, int at) { return at / 2 * 4 + vector * 2 + at % 2; }
  static inline int part(int vector, int lane) { return lane / 8 * 2 + vector; }
  static inline void codes(const uint8_t* block, int step, int64_t, __m512i* to) {
    NibbleBlocks<Blocks<Q4_0>, 0>::nibbles(_mm512_loadu_si512(block + 16 + step * 64), to);
  }
};
template <> struct ByteBlocks<Q5_K> : ByteBlocks<Q4_K> {
  static inline void codes(const uint8_t* block, int step, int64_t, __m512i* to) {
    NibbleBlocks<Blocks<Q4_0>, 0>::nibbles(_mm512_loadu_si512(block + 48 + step * 64), to);
    const __m512i fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(block + 16)));
    for (int v = 0; v < 2; v++) {
      const __mmask64 set = _mm512_test_epi8_mask(fifth, halves_of(1 << (4 * step + v), 1 << (4 * step + v + 2), false));
      to[v] = _mm512_mask_add_epi8(to[v], set, to[v], _mm512_set1_epi8(16));
    }
  }
};
template <> struct ByteBlocks<Q6_K> {
  static constexpr bool ONE_SUM = false;
  static inline int run(int vector, int at) { return 4 * vector + at; }
  static inline int part(int vector, int lane) { return 4 * vector + lane / 4; }
  static inline void codes(const uint8_t* block, int step, int64_t, __m512i* to) {
    NibbleBlocks<Blocks<Q4_0>, 0>::nibbles(_mm512_loadu_si512(block + step * 64), to);
    const __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(block + 128 + step * 32)));
    const __m512i placed[] = {_mm512_sllv_epi16(high, halves_of(4, 2, true)), _mm512_srlv_epi16(high, halves_of(0, 2, true))};
    for (int v = 0; v < 2; v++) to[v] = _mm512_ternarylogic_epi32(placed[v], _mm512_set1_epi8(48), to[v], 0xea);  // (a & b) | c
  }
};

// Puts a row of x as bytes, steps of [byte, vector] of 64, with what 1 of each step stands for.
template <class T, class L> inline void byte_row(const T* x, int64_t inputs, int8_t* to, float* units) {
  for (int64_t first = 0; first < inputs; first += STEP_INPUTS, to += STEP_VECTORS * 64, units++) {
    const int runs = int(smaller(inputs - first, STEP_INPUTS)) / W;
    V numbers[8], tops = zero(), plain = zero();
    for (int i = 0; i < 8; i++) {
      numbers[i] = i < runs ? load(x + first + i * W) : zero();
      tops = max(max(numbers[i], zero() - numbers[i]), tops);
      plain = fma(numbers[i], zero(), plain);
    }
    const bool finite = sum(plain) == 0;
    const float top = finite ? largest(tops) : 0.f;
    uint32_t bits;
    memcpy(&bits, &top, 4);
    const uint32_t power = uint32_t(smaller(275 - int64_t(bits >> 23), 253));  // numbers become smaller than 2^22
    const V inverse = set1(finite ? float_of(power << 23) : 0.f);
    *units = finite ? float_of((254 - power) << 23) : __builtin_nanf("");
    const __m512i bias = _mm512_set1_epi32(0x808080);
    for (int v = 0; v < 2; v++)
      for (int r = 0; r < 4; r++) {
        const V number = finite ? numbers[L::run(v, r)] * inverse : zero();
        const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(number), bias), bias);  // each with its sign
        for (int limb = 0; limb < 3; limb++)
          _mm_storeu_si128((__m128i*)(to + (2 * limb + v) * 64 + r * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, unsigned(8 * limb))));
      }
  }
}

// sum + factor * (the products of a step with a vector of codes, or with two). Sums of bytes are added to the bits of 3 * 2^22 in
// float32, of which they are the last ones: so they are numbers without a conversion, and all three of these are taken away at once.
template <int VECTORS> inline V byte_step(const __m512i* codes, const __m512i* x, V factor, V sum) {
  V found[3];
  for (int limb = 0; limb < 3; limb++) {
    __m512i bits = _mm512_dpbusd_epi32(_mm512_set1_epi32(0x4b400000), codes[0], _mm512_loadu_si512(x + 2 * limb));
    if (VECTORS == 2) bits = _mm512_dpbusd_epi32(bits, codes[1], _mm512_loadu_si512(x + 2 * limb + 1));
    found[limb] = _mm512_castsi512_ps(bits);
  }
  const V upper = fma(found[2], set1(65536.f), set1(-12582912.f * 65793.f));  // exact, as 65793 is 65536 + 256 + 1
  return fma(fma(found[1], set1(256.f), upper) + found[0], factor, sum);
}

// Codes times x in bytes.
template <int KIND> struct ByteSteps {
  typedef Blocks<KIND> B;
  typedef ByteBlocks<KIND> L;
  static constexpr int ZERO = KIND == Q8_0 ? 128 : B::ZERO;
  static constexpr int SUMS = L::ONE_SUM ? 1 : 2;
  static constexpr int64_t BYTES = B::BYTES * STEP_STRIPS / B::STRIPS;  // of a step

  template <class T> static inline void put(const T* from, int64_t inputs, const BlockScratch& s, int row) {
    const int64_t steps = steps_of(inputs);
    byte_row<T, L>(from, inputs, (int8_t*)s.x + row * steps * STEP_VECTORS * 64, s.units + row * steps);
  }
  template <int ROWS, int OUTPUTS>
  static inline void products(const uint8_t* const* weight, int64_t inputs, int64_t ahead, const BlockScratch& s, V (*sums)[OUTPUTS]) {
    const int64_t steps = steps_of(inputs);
    __m512i places[SUMS];
    for (int v = 0; v < SUMS; v++) {
      int lanes[W];
      for (int i = 0; i < W; i++) lanes[i] = L::part(v, i);
      places[v] = _mm512_loadu_si512(lanes);
    }
    for (int r = 0; r < ROWS; r++)
      for (int o = 0; o < OUTPUTS; o++) sums[r][o] = zero();
    const auto take = [&](int64_t step, int half, int64_t byte, int64_t last) __attribute__((always_inline)) {
      __m512i codes[OUTPUTS][2];
      V factors[OUTPUTS][SUMS];
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) {
        for (int64_t line = 0; line < BYTES; line += 64) prefetch(weight[o] + byte + half * BYTES + line + ahead);
        L::codes(weight[o] + byte, half, last, codes[o]);
        const V scales = _mm512_castps256_ps512(_mm256_loadu_ps(s.scale + o * s.parts + step * STEP_STRIPS * B::PARTS));
        for (int v = 0; v < SUMS; v++) factors[o][v] = _mm512_permutexvar_ps(places[v], scales);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const __m512i* x = (const __m512i*)s.x + (r * steps + step) * STEP_VECTORS;
        const V unit = set1(s.units[r * steps + step]);
#pragma GCC unroll 4
        for (int o = 0; o < OUTPUTS; o++)
          for (int v = 0; v < SUMS; v++)
            sums[r][o] = byte_step<2 / SUMS>(codes[o] + v, x + v, factors[o][v] * unit, sums[r][o]);
      }
    };
    int64_t step = 0, byte = 0;
    if constexpr (B::STRIPS == 1) {
      for (; (step + 1) * STEP_INPUTS <= inputs; step++, byte += BYTES) take(step, 0, byte, STEP_STRIPS);
      if (step < steps) take(step, 0, byte, (inputs - step * STEP_INPUTS) / STRIP - 1);
    } else {
      for (; step < steps; step += 2, byte += B::BYTES) {
        take(step, 0, byte, STEP_STRIPS);
        take(step + 1, 1, byte, STEP_STRIPS);
      }
    }
  }
};

template <class T> inline void store_two(T* to, V a, V b) {
  store(to, a);
  store(to + W, b);
}
// Numbers of blocks are no subnormal ones, which this would take for zeros.
inline void store_two(bf16* to, V a, V b) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }

// Calls `put(strip, first, second)` with the 32 numbers of every strip of a row of a weight, or of some whole blocks of it.
template <int KIND, class Put> inline void expand_row(const uint8_t* row, int64_t inputs, const BlockScratch& s, const Put& put) {
  typedef Blocks<KIND> B;
  typedef ByteBlocks<KIND> L;
  constexpr int ZERO = ByteSteps<KIND>::ZERO;
  const V less = set1(-float(ZERO));
  take_scales<B>(row, inputs, 0, s, 0);
  for (int64_t step = 0; step < steps_of(inputs); step++) {
    const int half = B::STRIPS == 1 ? 0 : int(step % 2);
    const int64_t strips = smaller(inputs / STRIP - step * STEP_STRIPS, STEP_STRIPS);
    __m512i codes[2];
    L::codes(row + (step - half) * ByteSteps<KIND>::BYTES, half, strips - 1, codes);
    uint8_t bytes[128];
    for (int v = 0; v < 2; v++) _mm512_storeu_si512(bytes + v * 64, codes[v]);
    V numbers[8];
    for (int i = 0; i < 8; i++) {  // 16 bytes each
      const int run = L::run(i / 4, i % 4);
      const int64_t part = step * STEP_STRIPS * B::PARTS + run * B::PARTS / 2;
      const V code = load_codes(bytes + i * 16), number = (ZERO ? code + less : code) * set1(s.scale[part]);
      numbers[run] = B::BASE ? number + set1(s.base[part]) : number;
    }
    for (int64_t strip = 0; strip < STEP_STRIPS; strip++)
      if (strip < strips) put(step * STEP_STRIPS + strip, numbers[2 * strip], numbers[2 * strip + 1]);
  }
}

// As `expand_blocks`.
template <class T, int KIND> void expand_bytes(const LinearTile& t) {
  const BlockScratch s(t.scratch, t.inputs);
  const int64_t bytes = weight_row_bytes(t.kind, t.inputs, 0);
  for (int64_t o = 0; o < t.outputs; o++) {
    T* to = static_cast<T*>(t.out) + o * t.out_row;
    expand_row<KIND>(static_cast<const uint8_t*>(t.weight) + o * bytes, t.inputs, s,
                     [&](int64_t strip, V a, V b) { store_two(to + strip * STRIP, a, b); });
  }
}

}  // namespace
}  // namespace moacompress
