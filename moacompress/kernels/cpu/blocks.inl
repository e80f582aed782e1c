// Products of a few rows with weights in blocks of codes (weight_blocks.h), which are read as they lie, each once for some rows.
// Written over the vectors of a vec_*.h, like linear.inl.
//
// A number is scale * code + base, one scale and one base for the numbers of a part of a block. So with x a part adds
// scale * sum(code * x) + base * sum(x) to a product; the sums of x are made once for all outputs. A row's products are the same to
// the bit however many rows, up to four, and outputs there are beside it, and however many where there are no products of tiles.

namespace moacompress {
namespace {

constexpr int STRIP_VECTORS = int(STRIP) / W;

// The codes of 16 bytes: the low nibbles, then the high ones.
inline void nibble_codes(const uint8_t* p, V* to) {
  for (int v = 0; v < STRIP_VECTORS / 2; v++) load_nibbles(p + v * W, to[v], to[STRIP_VECTORS / 2 + v]);
}
inline void byte_codes(const uint8_t* codes, V* to) {
  for (int v = 0; v < STRIP_VECTORS; v++) to[v] = load_codes(codes + v * W);
}
// 16 in each byte of which the bit is set, the lowest first.
inline uint64_t sixteens(uint8_t bits) {
  const uint64_t own = bits * uint64_t(0x0101010101010101) & 0x8040201008040201;
  return (own + 0x7f7f7f7f7f7f7f7f) >> 3 & 0x1010101010101010;
}

// Scales, and where there are any bases, of blocks with one float16 of each in front.
template <class B> struct FrontScaled {
  static inline void scales(const uint8_t* row, int64_t blocks, [[maybe_unused]] uint16_t* halves, float* scale, float* base) {
#ifdef __AVX512F__
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(B::BYTES));
    for (int64_t b = 0; b < blocks; b += W, row += W * B::BYTES) {  // the scale and the base, or the scale and two bytes more
      const __m512i front = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first_lanes(int(smaller(blocks - b, W))), places, row, 1);
      store(scale + b, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(front)));
      if (B::BASE) store(base + b, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(front, 16))));
    }
#else
    for (int64_t b = 0; b < blocks; b++) memcpy(halves + b, row + b * B::BYTES, 2);
    widen_row((const f16*)halves, blocks, scale);
    if constexpr (B::BASE) {
      for (int64_t b = 0; b < blocks; b++) memcpy(halves + b, row + b * B::BYTES + 2, 2);
      widen_row((const f16*)halves, blocks, base);
    }
#endif
  }
};

// The same of blocks of eight strips, whose scales and minima have six bits each and are scaled by two float16 themselves.
template <class B> struct SixBitScaled {
  static inline void scales(const uint8_t* row, int64_t blocks, uint16_t*, float* scale, float* base) {
    for (int64_t b = 0; b < blocks; b++, row += B::BYTES, scale += 8, base += 8) {
      uint32_t scales, minima, rest;
      memcpy(&scales, row + 4, 4);
      memcpy(&minima, row + 8, 4);
      memcpy(&rest, row + 12, 4);
      const uint32_t sixes[] = {scales & 0x3f3f3f3f, (rest & 0x0f0f0f0f) | (scales >> 2 & 0x30303030), minima & 0x3f3f3f3f,
                                (rest >> 4 & 0x0f0f0f0f) | (minima >> 2 & 0x30303030)};
      float units[W], numbers[16];
      store(units, load_part((const f16*)row, 2));
      for (int i = 0; i < 16; i += W) store(numbers + i, load_codes((const uint8_t*)sixes + i));
      for (int i = 0; i < 8; i++) {
        scale[i] = units[0] * numbers[i];
        base[i] = -(units[1] * numbers[8 + i]);
      }
    }
  }
};

// What differs between the types: `BYTES` and `STRIPS` of a block; `PARTS` of a strip with a scale of their own; `ZERO`, the code that
// stands for zero but for a base, and whether there is a `BASE`; the scales of a row, and the codes of a strip.
template <int KIND> struct Blocks;

template <> struct Blocks<Q8_0> : FrontScaled<Blocks<Q8_0>> {
  static constexpr int BYTES = 34, STRIPS = 1, PARTS = 1, ZERO = 0;
  static constexpr bool BASE = false;
  static inline void codes(const uint8_t* block, int, V* to) {
    for (int v = 0; v < STRIP_VECTORS; v++) to[v] = load_signed(block + 2 + v * W);
  }
};

template <> struct Blocks<Q4_0> : FrontScaled<Blocks<Q4_0>> {
  static constexpr int BYTES = 18, STRIPS = 1, PARTS = 1, ZERO = 8;
  static constexpr bool BASE = false;
  static inline void codes(const uint8_t* block, int, V* to) { nibble_codes(block + 2, to); }
};

template <> struct Blocks<Q4_1> : FrontScaled<Blocks<Q4_1>> {
  static constexpr int BYTES = 20, STRIPS = 1, PARTS = 1, ZERO = 0;
  static constexpr bool BASE = true;
  static inline void codes(const uint8_t* block, int, V* to) { nibble_codes(block + 4, to); }
};

template <> struct Blocks<Q5_0> : FrontScaled<Blocks<Q5_0>> {
  static constexpr int BYTES = 22, STRIPS = 1, PARTS = 1, ZERO = 16;
  static constexpr bool BASE = false;
  static inline void codes(const uint8_t* block, int, V* to) {
    uint32_t fifth;  // bit i is that of number i
    uint64_t nibbles[2], whole[4];
    memcpy(&fifth, block + 2, 4);
    memcpy(nibbles, block + 6, 16);
    constexpr uint64_t NIBBLE = 0x0f0f0f0f0f0f0f0f;
    for (int i = 0; i < 4; i++) whole[i] = (nibbles[i % 2] >> (i / 2 * 4) & NIBBLE) | sixteens(uint8_t(fifth >> (8 * i)));
    byte_codes((const uint8_t*)whole, to);
  }
};

template <> struct Blocks<Q4_K> : SixBitScaled<Blocks<Q4_K>> {
  static constexpr int BYTES = 144, STRIPS = 8, PARTS = 1, ZERO = 0;
  static constexpr bool BASE = true;
  static inline void codes(const uint8_t* block, int strip, V* to) {
    const uint8_t* from = block + 16 + strip / 2 * 32;
    uint8_t whole[STRIP];
    for (int i = 0; i < int(STRIP); i++) whole[i] = from[i] >> strip % 2 * 4 & 15;
    byte_codes(whole, to);
  }
};

template <> struct Blocks<Q5_K> : SixBitScaled<Blocks<Q5_K>> {
  static constexpr int BYTES = 176, STRIPS = 8, PARTS = 1, ZERO = 0;
  static constexpr bool BASE = true;
  static inline void codes(const uint8_t* block, int strip, V* to) {
    const uint8_t *fifth = block + 16, *from = block + 48 + strip / 2 * 32;
    uint8_t whole[STRIP];
    for (int i = 0; i < int(STRIP); i++) whole[i] = uint8_t((from[i] >> strip % 2 * 4 & 15) | (fifth[i] >> strip & 1) << 4);
    byte_codes(whole, to);
  }
};

template <> struct Blocks<Q6_K> {
  static constexpr int BYTES = 210, STRIPS = 8, PARTS = 2, ZERO = 32;
  static constexpr bool BASE = false;
  static inline void scales(const uint8_t* row, int64_t blocks, uint16_t*, float* scale, float*) {
    for (int64_t b = 0; b < blocks; b++, row += BYTES, scale += 16) {
      const V unit = set1(number((const f16*)(row + 208)));
      for (int i = 0; i < 16; i += W) store(scale + i, load_signed(row + 192 + i) * unit);
    }
  }
  static inline void codes(const uint8_t* block, int strip, V* to) {
    const uint8_t *from = block + strip / 4 * 64 + strip % 2 * 32, *high = block + 128 + strip / 4 * 32;
    uint8_t whole[STRIP];
    for (int i = 0; i < int(STRIP); i++)
      whole[i] = uint8_t((from[i] >> strip / 2 % 2 * 4 & 15) | (high[i] >> strip % 4 * 2 & 3) << 4);
    byte_codes(whole, to);
  }
};

// Where a task works. Numbers of the parts of a row are filled up with zeros to whole vectors.
struct BlockScratch {
  int64_t parts, floats;
  float *x, *units, *sums, *scale, *base;  // of rows of the input, and of four outputs
  uint16_t* halves;

  BlockScratch(float* at, int64_t inputs) : parts((inputs / 16 + 15) / 16 * 16), floats(0) {
    float* half_floats = nullptr;
    const int64_t sizes[] = {MOST * (inputs + 128), MOST * parts, MOST * parts, 4 * parts, 4 * parts, parts};
    float** const places[] = {&x, &units, &sums, &scale, &base, &half_floats};
    for (int i = 0; i < 6; i++) {
      *places[i] = at + floats;
      floats += (sizes[i] + 15) / 16 * 16;
    }
    halves = (uint16_t*)half_floats;
  }
};


inline int64_t parts_in(int64_t inputs, int parts) { return inputs / STRIP * parts; }

// Takes the scales and bases of a row of the weight, for codes less `zero`.
template <class B> inline void take_scales(const uint8_t* row, int64_t inputs, int code_of_zero, const BlockScratch& s, int64_t at) {
  const int64_t blocks = inputs / (STRIP * B::STRIPS), count = parts_in(inputs, B::PARTS);
  float *scale = s.scale + at * s.parts, *base = s.base + at * s.parts;
  for (int64_t i = count / 16 * 16; count % 16 && i < count / 16 * 16 + 16; i += W) {  // what is beyond the last number stays zero
    store(scale + i, zero());
    store(base + i, zero());
  }
  B::scales(row, blocks, s.halves, scale, base);
  if (code_of_zero == 0) return;
  const V less = set1(-float(code_of_zero));
  for (int64_t i = 0; i < count; i += W) {
    const V shift = load(scale + i) * less;
    store(base + i, B::BASE ? load(base + i) + shift : shift);
  }
}

// The sums of a row of the input over the parts that have a scale each.
template <class T, class B> inline void part_sums(const T* x, int64_t inputs, float* to) {
  constexpr int NUMBERS = int(STRIP) / B::PARTS;
  const int64_t count = parts_in(inputs, B::PARTS);
  for (int64_t p = 0; p < count; p += 4) {
    V four[4];
    for (int i = 0; i < 4; i++) {
      four[i] = zero();
      for (int v = 0; v < NUMBERS && p + i < count; v += W) four[i] = four[i] + load(x + (p + i) * NUMBERS + v);
    }
    sum4(four[0], four[1], four[2], four[3], to + p);
  }
  for (int64_t i = (count + 3) / 4 * 4; i % 16; i++) to[i] = 0.f;
}

// Codes times x in float32.
template <class B> struct FloatStrips {
  static constexpr int ZERO = B::ZERO;
  template <class T> static inline void put(const T* from, int64_t inputs, const BlockScratch& s, int row) {
    widen_row(from, inputs, s.x + row * inputs);
  }
  // sum + the products of a strip, each part of it times its scale.
  static inline V add(V sum, const V* codes, const float* x, const float* scale) {
    for (int part = 0; part < B::PARTS; part++) {
      const int first = part * STRIP_VECTORS / B::PARTS, end = (part + 1) * STRIP_VECTORS / B::PARTS;
      V products = codes[first] * load(x + first * W);
      for (int v = first + 1; v < end; v++) products = fma(codes[v], load(x + v * W), products);
      sum = fma(products, set1(scale[part]), sum);
    }
    return sum;
  }
  template <int ROWS, int OUTPUTS>
  static inline void products(const uint8_t* const* weight, int64_t inputs, int64_t ahead, const BlockScratch& s, V (*sums)[OUTPUTS]) {
    for (int r = 0; r < ROWS; r++)
      for (int o = 0; o < OUTPUTS; o++) sums[r][o] = zero();
    const float *scale = s.scale, *at = s.x;
    for (int64_t byte = 0, block = 0; block < inputs / (B::STRIPS * STRIP); block++, byte += B::BYTES) {
#pragma GCC unroll 8
      for (int strip = 0; strip < B::STRIPS; strip++) {
        for (int o = 0; o < OUTPUTS; o++) {
          prefetch(weight[o] + byte + strip * B::BYTES / B::STRIPS + ahead);
          V codes[STRIP_VECTORS];
          B::codes(weight[o] + byte, strip, codes);
          for (int r = 0; r < ROWS; r++) sums[r][o] = add(sums[r][o], codes, at + r * inputs, scale + o * s.parts);
        }
        at += STRIP;
        scale += B::PARTS;
      }
    }
  }
};
template <class T, int KIND> struct StripsOf { typedef FloatStrips<Blocks<KIND>> type; };

#if defined(MOACOMPRESS_DOTS) && defined(__AVX512F__)
}  // namespace
}  // namespace moacompress
#include "blocks_vnni.inl"
namespace moacompress {
namespace {
template <int KIND> struct StripsOf<bf16, KIND> { typedef ByteSteps<KIND> type; };
template <int KIND> struct StripsOf<f16, KIND> { typedef ByteSteps<KIND> type; };
#elif defined(__AVX2__) && !defined(__AVX512F__)
}  // namespace
}  // namespace moacompress
#include "blocks_words.inl"
namespace moacompress {
namespace {
template <int KIND> struct StripsOf<bf16, KIND> { typedef WordStrips<KIND> type; };
#endif

// Some rows of the input, of which there are at most ROWS, with all outputs; what lies in the next ones' place is read ahead.
template <class T, class Op, class B, int ROWS> void block_rows(const LinearTile& t, int64_t row, int rows) {
  constexpr int OUTPUTS = ROWS > FEW ? 2 : 4;
  constexpr bool BASED = B::BASE || Op::ZERO != 0;
  const BlockScratch s(t.scratch, t.inputs);
  const int64_t bytes = t.inputs / (STRIP * B::STRIPS) * B::BYTES, parts = parts_in(t.inputs, B::PARTS);
  for (int r = 0; r < ROWS; r++) {  // the last row as often as it takes
    const T* from = static_cast<const T*>(t.x) + (row + (r < rows ? r : rows - 1)) * t.inputs;
    Op::put(from, t.inputs, s, r);
    if (BASED) part_sums<T, B>(from, t.inputs, s.sums + r * s.parts);
  }
  for (int64_t first = 0; first < t.outputs; first += OUTPUTS) {
    const int count = int(smaller(t.outputs - first, OUTPUTS));
    const uint8_t* weight[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) {
      weight[o] = static_cast<const uint8_t*>(t.weight) + (first + (o < count ? o : count - 1)) * bytes;
      take_scales<B>(weight[o], t.inputs, Op::ZERO, s, o);
    }
    V sums[ROWS][OUTPUTS];
    Op::template products<ROWS, OUTPUTS>(weight, t.inputs, OUTPUTS * bytes, s, sums);
    for (int r = 0; BASED && r < ROWS; r++)
      for (int o = 0; o < OUTPUTS; o++)
        for (int64_t p = 0; p < parts; p += W) sums[r][o] = fma(load(s.base + o * s.parts + p), load(s.sums + r * s.parts + p), sums[r][o]);
    float added[4] = {0}, found[4];
    if (t.bias) widen_row(static_cast<const T*>(t.bias) + first, count, added);
    for (int r = 0; r < rows; r++) {
      sum4(sums[r][0], sums[r][1], sums[r][OUTPUTS - 2], sums[r][OUTPUTS - 1], found);
      for (int o = 0; o < count; o++) found[o] += added[o];
      narrow_row(found, count, static_cast<T*>(t.out) + (row + r) * t.out_row + first);
    }
  }
}

template <class T, int KIND> void block_tile(const LinearTile& t) {
  typedef Blocks<KIND> B;
  typedef typename StripsOf<T, KIND>::type Op;
  for (int64_t row = 0; row < t.rows; row += MOST) {
    const int rows = int(smaller(t.rows - row, MOST));
    if (rows == 1) block_rows<T, Op, B, 1>(t, row, rows);
    else if (rows == 2) block_rows<T, Op, B, 2>(t, row, rows);
    else if (rows <= 4) block_rows<T, Op, B, 4>(t, row, rows);
    else if constexpr (MOST > 4) block_rows<T, Op, B, 8>(t, row, rows);
  }
}

// What rows of a weight stand for, to the bit: made in float32, with a rounding after each operation.
template <class T, int KIND> void expand_blocks(const LinearTile& t) {
  typedef Blocks<KIND> B;
  const BlockScratch s(t.scratch, t.inputs);
  const int64_t bytes = t.inputs / (STRIP * B::STRIPS) * B::BYTES;
  const V less = set1(-float(B::ZERO));
  for (int64_t o = 0; o < t.outputs; o++) {
    const uint8_t* row = static_cast<const uint8_t*>(t.weight) + o * bytes;
    T* to = static_cast<T*>(t.out) + o * t.out_row;
    take_scales<B>(row, t.inputs, 0, s, 0);
    for (int64_t strip = 0; strip < t.inputs / STRIP; strip++, to += STRIP) {
      V codes[STRIP_VECTORS];
      B::codes(row + strip / B::STRIPS * B::BYTES, int(strip % B::STRIPS), codes);
      for (int v = 0; v < STRIP_VECTORS; v++) {
        const int64_t part = strip * B::PARTS + v * B::PARTS / STRIP_VECTORS;
        V number = (B::ZERO ? codes[v] + less : codes[v]) * set1(s.scale[part]);
        if (B::BASE) number = number + set1(s.base[part]);
        store(to + v * W, number);
      }
    }
  }
}

#ifdef MOACOMPRESS_AMX
}  // namespace
}  // namespace moacompress
#include "blocks_amx.inl"
namespace moacompress {
namespace {
#endif

#define MOACOMPRESS_KINDS(function, type, tile)                      \
  switch ((tile).kind) {                                             \
    case Q8_0: return function<type, Q8_0>(tile);                    \
    case Q5_0: return function<type, Q5_0>(tile);                    \
    case Q4_1: return function<type, Q4_1>(tile);                    \
    case Q4_0: return function<type, Q4_0>(tile);                    \
    case Q4_K: return function<type, Q4_K>(tile);                    \
    case Q6_K: return function<type, Q6_K>(tile);                    \
    case Q5_K: return function<type, Q5_K>(tile);                    \
    default: return;                                                 \
  }

template <class T> void linear_blocks_tile(const LinearTile& t) { MOACOMPRESS_KINDS(block_tile, T, t) }
#ifdef MOACOMPRESS_AMX
template <> void linear_blocks_tile<bf16>(const LinearTile& t) {
  if (t.rows > FEW && t.inputs > 0) MOACOMPRESS_KINDS(block_tiles, bf16, t)
  MOACOMPRESS_KINDS(block_tile, bf16, t)
}
size_t block_scratch(int64_t inputs, int64_t rows) {
  return size_t(BlockScratch(nullptr, inputs).floats + (rows > FEW ? TileScratch(nullptr, inputs, rows).floats : 0));
}
#else
size_t block_scratch(int64_t inputs, int64_t) { return size_t(BlockScratch(nullptr, inputs).floats); }
#endif
#if defined(MOACOMPRESS_DOTS) && defined(__AVX512F__)
template <class T> void expand_blocks_tile(const LinearTile& t) { MOACOMPRESS_KINDS(expand_bytes, T, t) }
#else
template <class T> void expand_blocks_tile(const LinearTile& t) { MOACOMPRESS_KINDS(expand_blocks, T, t) }
#endif

}  // namespace
}  // namespace moacompress
