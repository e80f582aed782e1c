// Keys and values as integer codes, docs/formats.md, over the vectors of a vec_*.h; included by kernels.inl. Codes, scales and zero
// points are the same to the bit for every instruction set: every operation is one of IEEE's, in the page's order.

namespace moacompress {
namespace {

template <int STEP> inline V butterflied(V x) { return swapped<STEP>(x) + turned<STEP>(x); }

// Stages of the rotation whose pairs lie in one vector.
inline V rotated_within(V x, int64_t block) {
  if (block > 1) x = butterflied<1>(x);
  if (block > 2) x = butterflied<2>(x);
  if constexpr (W > 4) {
    if (block > 4) x = butterflied<4>(x);
  }
  if constexpr (W > 8) {
    if (block > 8) x = butterflied<8>(x);
  }
  return x;
}

void hadamard(float* x, int64_t dim) {
  const int64_t block = dim & -dim;
  if (block == 1) return;
  int64_t i = 0;
  for (; i + W <= dim; i += W) store(x + i, rotated_within(load(x + i), block));
  if (i < dim) store_part(x + i, rotated_within(load_part(x + i, int(dim - i)), block), int(dim - i));
  for (int64_t step = W; step < block; step *= 2)
    for (int64_t first = 0; first < dim; first += 2 * step)
      for (int64_t j = first; j < first + step; j += W) {
        const V low = load(x + j), high = load(x + j + step);
        store(x + j, low + high);
        store(x + j + step, low - high);
      }
  const V factor = set1(float(1 / __builtin_sqrt(double(block))));
  for (i = 0; i + W <= dim; i += W) store(x + i, load(x + i) * factor);
  if (i < dim) store_part(x + i, load_part(x + i, int(dim - i)) * factor, int(dim - i));
}

constexpr float LARGEST_PART = 65504.f;
inline float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float number(const f16* p) {
  float x[W];
  store(x, load_part(p, 1));
  return x[0];
}

// Puts a token's bytes of codes where they lie.
inline void put_codes(const uint8_t* codes, const KVPart& kv_part, int64_t place, uint8_t* to) {
  const int64_t step = kv_part.step();
  for (int64_t i = 0; i < kv_part.token_bytes; i += 4)
    for (int64_t k = 0; k < 4; k++) to[kv_part.at(place, i) + k * step] = codes[i + k];
}

template <class T> void encode(const void* from, const KVPart& kv_part, int64_t place, void* to, float* buffer) {
  const int64_t dim = kv_part.dim;
  const float levels = float((1 << bits_of(kv_part.format)) - 1);
  char* const at = (char*)to;
  f16 *const scale_at = (f16*)(at + kv_part.scales) + place, *const zero_at = (f16*)(at + kv_part.zeros) + place;
  widen_row((const T*)from, dim, buffer);
  hadamard(buffer, dim);
  for (int64_t i = dim; i % W; i++) buffer[i] = buffer[0];
  V lows = load(buffer), highs = lows, finite = zero();
  for (int64_t i = 0; i < dim; i += W) {
    const V x = load(buffer + i);
    lows = min(x, lows);
    highs = max(x, highs);
    finite = fma(x, zero(), finite);
  }
  if (!(sum(finite) == 0)) {
    memset(buffer, 0, size_t(kv_part.token_bytes));
    put_codes((const uint8_t*)buffer, kv_part, place, (uint8_t*)at);
    scale_at->bits = zero_at->bits = 0x7e00;
    return;
  }
  const float low = -largest(zero() - lows) + 0.f, high = largest(highs) + 0.f;  // adding makes a minus zero a plus
  store_part(zero_at, set1(within(low, -LARGEST_PART, LARGEST_PART)), 1);
  store_part(scale_at, set1(within((high - low) / levels, 0.f, LARGEST_PART)), 1);
  const float scale = number(scale_at);
  const V base = set1(number(zero_at)), inverse = set1(scale == 0 ? 0.f : 1.f / scale), most = set1(levels);
  uint8_t* const whole = (uint8_t*)buffer;  // behind the numbers that are read
  for (int64_t i = 0; i < dim; i += W)
    store_codes(whole + i, round(min(max((load(buffer + i) - base) * inverse, zero()), most)));
  for (int64_t i = dim; i < 2 * kv_part.token_bytes; i++) whole[i] = 0;
  if (kv_part.format == INT4)
    for (int64_t i = 0; i < kv_part.token_bytes; i++) {
      const int64_t above = i + kv_part.part;
      whole[i] = i < kv_part.part ? uint8_t(whole[i] | (above < dim ? whole[above] << 4 : 0)) : uint8_t(0);
    }
  if (kv_part.format == INT6)
    for (int64_t i = 0; i < kv_part.row_bytes; i++)
      for (int64_t row = 0; row < 3; row++)
        whole[row * kv_part.row_bytes + i] |= uint8_t((whole[3 * kv_part.row_bytes + i] >> 2 * row & 3) << 6);
  put_codes(whole, kv_part, place, (uint8_t*)at);
}

// What the codes of a token stand for, in the rotated basis.
inline void expand(const void* from, int place, const KVPart& kv_part, float* to) {
  const char* at = (const char*)from;
  const uint8_t* codes = (const uint8_t*)at;
  const V scale = set1(number((const f16*)(at + kv_part.scales) + place)), base = set1(number((const f16*)(at + kv_part.zeros) + place));
  const auto put = [&](V x, int64_t i, int64_t end) {
    x = x * scale + base;
    if (i + W <= end) store(to + i, x);
    else if (i < end) store_part(to + i, x, int(end - i));
  };
  const int64_t step = kv_part.step(), row = kv_part.row_bytes;
  const auto bring = [&](int64_t first, int64_t i, uint8_t* side_by_side) {  // of a row that begins with byte `first`
    for (int64_t j = i; j < smaller(i + W, row); j += 4)
      for (int64_t k = 0; k < 4; k++) side_by_side[j - i + k] = codes[kv_part.at(place, first + j) + k * step];
  };
  for (int64_t i = 0; i < row; i += W) {
    uint8_t side_by_side[4][W] = {};
    bring(0, i, side_by_side[0]);
    if (kv_part.format == INT8) {
      put(load_codes(side_by_side[0]), i, kv_part.dim);
    } else if (kv_part.format == INT4) {
      V low, high;
      load_nibbles(side_by_side[0], low, high);
      put(low, i, kv_part.part);
      put(high, i + kv_part.part, kv_part.dim);
    } else {
      bring(row, i, side_by_side[1]);
      bring(2 * row, i, side_by_side[2]);
      for (int k = 0; k < W; k++)
        for (int r = 0; r < 3; r++) {
          side_by_side[3][k] |= uint8_t(side_by_side[r][k] >> 6 << 2 * r);
          side_by_side[r][k] &= 63;
        }
      for (int r = 0; r < 4; r++) put(load_codes(side_by_side[r]), r * row + i, smaller((r + 1) * row, kv_part.dim));
    }
  }
}

// ---- decode ----

// Where a chunk's tokens have their scores. Where a side has codes every block has 16 places, and those of tokens that are not seen
// are hidden; otherwise the tokens that are seen lie side by side.
struct Places {
  int first[CHUNK_BLOCKS];  // of each block's first token that is seen
  int count;
  bool whole_blocks;

  explicit Places(const DecodeChunk& c) : count(0), whole_blocks(c.key.format != NATIVE || c.value.format != NATIVE) {
    for (int64_t b = 0; b < c.blocks; b++) {
      first[b] = whole_blocks ? int(b * BLOCK) + c.begin[b] : count;
      count += whole_blocks ? int(BLOCK) : c.end[b] - c.begin[b];
    }
  }
  // Writes minus infinity where there is no token that is seen, up to whole vectors.
  inline void hide(const DecodeChunk& c, float* row) const {
    for (int t = count; t % W; t++) row[t] = -__builtin_inff();
    for (int64_t b = 0; whole_blocks && b < c.blocks; b++) {
      for (int t = 0; t < c.begin[b]; t++) row[b * BLOCK + t] = -__builtin_inff();
      for (int t = c.end[b]; t < int(BLOCK); t++) row[b * BLOCK + t] = -__builtin_inff();
    }
  }
};

// The K or V part of a block that will be read soon; null for none.
struct Ahead {
  const char* at;
  int64_t bytes;
  inline void fetch(int64_t begin, int64_t end) const {  // some of its bytes
    if (!at) return;
    for (int64_t line = begin; line < smaller(end, bytes); line += 64) prefetch(at + line);
  }
};

// What comes after the values of a block: those of a later one, and past the last values what the next task begins with.
inline Ahead after_values(const DecodeChunk& c, int64_t b) {
  const int64_t later = b + AHEAD;
  if (later < c.blocks) return {(const char*)c.values[later], c.value.bytes};
  return {(const char*)c.coming[later - c.blocks], c.coming_bytes};
}

constexpr int BLOCK_VECTORS = int(BLOCK) / W;

// Reads ahead as much as is read of keys in their bytes [i, i + 16) of every row, and with the last ones all that is left.
template <int BITS> inline void fetch_keys(const Ahead& next, int64_t i, int64_t row) {
  constexpr int64_t LINES = rows_of(BITS) * BLOCK;
  if (i % 16 == 0) next.fetch(i * LINES, i + 16 < row ? (i + 16) * LINES : next.bytes);
}

inline int64_t numbers_of_part(const KVPart& kv_part, int64_t part) {
  return larger(0, smaller(kv_part.part, kv_part.dim - part * kv_part.part));
}

// A query and the weights of a head as they are multiplied with codes in float32.
struct FloatCodes {
  // The words of a column of all rows, `row` bytes apart.
  template <int BITS> static inline void load_rows(const uint8_t* at, int64_t row, Ints* to) {
    for (int r = 0; r < rows_of(BITS); r++) to[r] = load_ints(at + r * row);
    if (BITS == 6) to[3] = fourth_six(to[0], to[1], to[2]);
  }
  // The codes of a part in byte k of those words.
  template <int BITS> static inline V code_of(const Ints* words, int part, int k) {
    if (BITS == 8) return picked(words[0], 8 * k, 255);
    if (BITS == 6) return picked(words[part], 8 * k, 63);
    return picked(words[0], 8 * k + 4 * part, 15);
  }
  static inline int64_t query_floats(int64_t bytes) { return 2 * bytes; }
  // The numbers of one part after the other, as many as a row has bytes; returns the sum of all.
  static inline float keep_query(const float* from, const KVPart& key, float* to) {
    const int parts = parts_of(bits_of(key.format));
    memset(to, 0, size_t(parts * key.row_bytes) * sizeof(float));
    for (int part = 0; part < parts; part++)
      memcpy(to + part * key.row_bytes, from + part * key.part, size_t(numbers_of_part(key, part)) * sizeof(float));
    float sum = 0.f;
    for (int64_t i = 0; i < key.dim; i++) sum += from[i];
    return sum;
  }
  template <int BITS, int HEADS>
  static inline void dots(const uint8_t* codes, const KVPart& kv_part, const Ahead& next, const float* query, int64_t stride, V (*to)[BLOCK_VECTORS]) {
    for (int h = 0; h < HEADS; h++)
      for (int v = 0; v < BLOCK_VECTORS; v++) to[h][v] = zero();
    const int64_t row = kv_part.row_bytes;
    for (int64_t i = 0; i < row; i += 4, codes += 4 * BLOCK) {
      fetch_keys<BITS>(next, i, row);
      for (int v = 0; v < BLOCK_VECTORS; v++) {
        Ints x[4];
        load_rows<BITS>(codes + v * 4 * W, row * BLOCK, x);
        for (int k = 0; k < 4; k++)
          for (int part = 0; part < parts_of(BITS); part++) {
            const V code = code_of<BITS>(x, part, k);
            for (int h = 0; h < HEADS; h++) to[h][v] = fma(code, set1(query[h * stride + part * row + i + k]), to[h][v]);
          }
      }
    }
  }
  static inline int64_t weight_floats() { return 0; }
  static inline float keep_weights(const DecodeChunk&, const float*, float*) { return 0.f; }
  template <int BITS, int HEADS, int VECS>
  static inline void mix(const DecodeChunk& c, const float* weights, const float*, int64_t column, bool ahead, V (*to)[VECS * parts_of(BITS)]) {
    for (int h = 0; h < HEADS; h++)
      for (int v = 0; v < VECS * parts_of(BITS); v++) to[h][v] = zero();
    for (int64_t b = 0; b < c.blocks; b++) {
      const Ahead next = ahead ? after_values(c, b) : Ahead{nullptr, 0};
      const int64_t quarter = (next.bytes + 255) / 256 * 64;
      for (int quad = 0; quad < int(BLOCK) / 4; quad++) {
        next.fetch(quad * quarter, (quad + 1) * quarter);
        if (quad * 4 + 4 <= c.begin[b] || quad * 4 >= c.end[b]) continue;
        const uint8_t* row = (const uint8_t*)c.values[b] + (quad * c.value.token_bytes + column) * 4;
        const float* at = weights + b * BLOCK + quad * 4;
        for (int v = 0; v < VECS; v++) {
          Ints x[4];
          load_rows<BITS>(row + v * 4 * W, c.value.row_bytes * 4, x);
          for (int k = 0; k < 4; k++)
            for (int part = 0; part < parts_of(BITS); part++) {
              const V code = code_of<BITS>(x, part, k);
              for (int h = 0; h < HEADS; h++) {
                V& sum = to[h][VECS * part + v];
                sum = fma(code, set1(at[h * CHUNK_STRIDE + k]), sum);
              }
            }
        }
      }
    }
  }
};

#ifdef MOACOMPRESS_DOTS
// The same in whole numbers of 16 bits, an upper and a lower byte each, that are exact to 2^-16 of the largest; products of four
// bytes are summed by the processor. Whoever asks in float32 gets float32.
struct ByteCodes {
  static constexpr float MOST = 32512.f;  // 127 * 256
  // What a whole number stands for: NaN where some number is not finite.
  static inline float unit(float largest, float all) { return all - all == 0 ? largest / MOST : __builtin_nanf(""); }
  static inline V inverse(float largest) { return set1(largest > 0 ? MOST / largest : 0.f); }
  static inline V joined(Sums upper, Sums lower, V unit) { return fma(numbers_of(upper), set1(256.f), numbers_of(lower)) * unit; }
  // The codes of all parts, of a column of all rows, `row` bytes apart.
  template <int BITS> static inline void load_parts(const uint8_t* at, int64_t row, Quads* to) {
    const Quads x = load_quads(at);
    if constexpr (BITS == 8) {
      to[0] = x;
    } else if constexpr (BITS == 4) {
      to[0] = low_nibbles(x);
      to[1] = high_nibbles(x);
    } else {
      const Quads y = load_quads(at + row), z = load_quads(at + 2 * row);
      to[0] = low_six(x);
      to[1] = low_six(y);
      to[2] = low_six(z);
      to[3] = fourth_six(x, y, z);
    }
  }

  // Upper and lower bytes, each of one part after the other, and before them the unit. The sum is that of the whole numbers: codes
  // are never negative, and an error would not cancel against their zero point.
  static inline float keep_query(const float* from, const KVPart& key, float* to) {
    const int64_t all = 2 * (key.token_bytes + 16);
    V tops = zero(), all_numbers = zero();
    for (int64_t i = 0; i < key.dim; i += W) {
      const V x = load_part(from + i, int(smaller(key.dim - i, W)));
      tops = max(max(x, zero() - x), tops);
      all_numbers = all_numbers + x;
    }
    const float top = largest(tops), plain = sum(all_numbers);  // the sum is not finite where some number is not
    int8_t* upper = (int8_t*)(to + 1);
    memset(upper, 0, size_t(2 * all));
    to[0] = unit(top, plain);
    V wholes = zero();
    for (int part = 0; part < parts_of(bits_of(key.format)); part++) {
      const float* x = from + part * key.part;
      const int64_t count = numbers_of_part(key, part);
      for (int64_t i = 0; i < count; i += W) {
        int8_t* at = upper + part * key.row_bytes + i;
        const V numbers = load_part(x + i, int(smaller(count - i, W)));  // what is beyond is zero, or written over by the next part
        wholes = wholes + store_halves((plain - plain == 0 ? numbers : zero()) * inverse(top), at, at + all);
      }
    }
    return sum(wholes) * to[0];
  }
  static inline int64_t query_floats(int64_t bytes) { return 1 + bytes + 16; }
  template <int BITS, int HEADS>
  static inline void dots(const uint8_t* codes, const KVPart& kv_part, const Ahead& next, const float* query, int64_t stride, V (*to)[BLOCK_VECTORS]) {
    constexpr int PARTS = parts_of(BITS);
    const int64_t row = kv_part.row_bytes, all = 2 * (kv_part.token_bytes + 16);
    for (int v = 0; v < BLOCK_VECTORS; v++) {
      Sums upper[HEADS], lower[HEADS];
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; h++) upper[h] = lower[h] = no_sums();
      const uint8_t* at = codes + v * 4 * W;
      for (int64_t i = 0; i < row; i += 4, at += 4 * BLOCK) {
        if (v == 0) fetch_keys<BITS>(next, i, row);
        Quads codes[PARTS];
        load_parts<BITS>(at, row * BLOCK, codes);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
          const int8_t* q = (const int8_t*)(query + h * stride + 1) + i;
#pragma GCC unroll 4
          for (int part = 0; part < PARTS; part++) {
            upper[h] = dot_quads(upper[h], codes[part], q + part * row);
            lower[h] = dot_quads(lower[h], codes[part], q + part * row + all);
          }
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; h++) to[h][v] = joined(upper[h], lower[h], set1(query[h * stride]));
    }
  }
  // Upper and then lower bytes, and before them the unit. Returns what the zero points add for what the whole numbers differ from
  // the weights by.
  static inline int64_t weight_floats() { return 1 + 2 * CHUNK / 4; }
  static inline float keep_weights(const DecodeChunk& c, const float* weights, float* to) {
    const int count = int(c.blocks * BLOCK);
    V tops = zero(), all = zero(), more = zero();
    for (int t = 0; t < count; t += W) {
      tops = max(load(weights + t), tops);
      all = all + load(weights + t);
    }
    const float top = largest(tops), sum_of_all = sum(all);
    to[0] = unit(top, sum_of_all);
    int8_t* upper = (int8_t*)(to + 1);
    for (int64_t b = 0; b < c.blocks; b++) {
      const char* kv_part = (const char*)c.values[b];
      const f16 *scales = (const f16*)(kv_part + c.value.scales), *zeros = (const f16*)(kv_part + c.value.zeros);
      for (int v = 0; v < BLOCK_VECTORS; v++) {
        const int64_t at = b * BLOCK + v * W;
        const V scale = load(scales + v * W), base = load(zeros + v * W);
        const V weight = sum_of_all - sum_of_all == 0 ? load(weights + at) : zero();
        const V error = store_halves(weight * inverse(top), upper + at, upper + CHUNK + at) * set1(to[0]) - weight;
        const Mask counts = both(at_least(weight, set1(1e-30f)), at_least(scale, set1(1e-30f)));
        more = select(counts, fma(error * about_inverse(scale), base, more), more);
      }
    }
    return sum(more);
  }
  template <int BITS, int HEADS, int VECS>
  static inline void mix(const DecodeChunk& c, const float*, const float* kept, int64_t column, bool ahead, V (*to)[VECS * parts_of(BITS)]) {
    constexpr int PARTS = parts_of(BITS), ALL = VECS * PARTS;
    const int64_t stride = weight_floats();
    Sums upper[HEADS][ALL], lower[HEADS][ALL];
    // unrolled by name, or the compiler has the sums in memory too
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
      for (int v = 0; v < ALL; v++) upper[h][v] = lower[h][v] = no_sums();
    for (int64_t b = 0; b < c.blocks; b++) {
      const Ahead next = ahead ? after_values(c, b) : Ahead{nullptr, 0};
      const int64_t quarter = (next.bytes + 255) / 256 * 64;
      for (int quad = 0; quad < int(BLOCK) / 4; quad++) {
        next.fetch(quad * quarter, (quad + 1) * quarter);
        if (quad * 4 + 4 <= c.begin[b] || quad * 4 >= c.end[b]) continue;
        const uint8_t* row = (const uint8_t*)c.values[b] + (quad * c.value.token_bytes + column) * 4;
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) {
          Quads codes[PARTS];
          load_parts<BITS>(row + v * 4 * W, c.value.row_bytes * 4, codes);
#pragma GCC unroll 4
          for (int h = 0; h < HEADS; h++) {
            const int8_t* w = (const int8_t*)(kept + h * stride + 1) + b * BLOCK + quad * 4;
#pragma GCC unroll 4
            for (int e = 0; e < PARTS; e++) {
              upper[h][e * VECS + v] = dot_quads(upper[h][e * VECS + v], codes[e], w);
              lower[h][e * VECS + v] = dot_quads(lower[h][e * VECS + v], codes[e], w + CHUNK);
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
      for (int v = 0; v < ALL; v++) to[h][v] = joined(upper[h][v], lower[h][v], set1(kept[h * stride]));
  }
};
#endif

// How a dtype's queries and weights are multiplied with codes.
template <class T> struct CodesOf { typedef FloatCodes type; };
#ifdef MOACOMPRESS_DOTS
template <> struct CodesOf<bf16> { typedef ByteCodes type; };
template <> struct CodesOf<f16> { typedef ByteCodes type; };
#endif

// Scores of HEADS query heads with all tokens of a block: scale * (query . codes) + zero * (sum of the query).
template <class Op, int BITS, int HEADS>
inline void score_codes(const void* from, const KVPart& kv_part, const Ahead& next, const float* query, int64_t stride, const float* sums,
                        float* to) {
  V found[HEADS][BLOCK_VECTORS];
  Op::template dots<BITS, HEADS>((const uint8_t*)from, kv_part, next, query, stride, found);
  const f16 *scales = (const f16*)((const char*)from + kv_part.scales), *zeros = (const f16*)((const char*)from + kv_part.zeros);
  for (int v = 0; v < BLOCK_VECTORS; v++) {
    const V scale = load(scales + v * W), base = load(zeros + v * W);
    for (int h = 0; h < HEADS; h++) store(to + h * CHUNK_STRIDE + v * W, fma(found[h][v], scale, base * set1(sums[h])));
  }
}
template <class Op, int HEADS>
inline void score_coded_heads(const void* from, const KVPart& kv_part, const Ahead& next, const float* query, int64_t stride,
                              const float* sums, float* to) {
  if (kv_part.format == INT8) score_codes<Op, 8, HEADS>(from, kv_part, next, query, stride, sums, to);
  else if (kv_part.format == INT6) score_codes<Op, 6, HEADS>(from, kv_part, next, query, stride, sums, to);
  else score_codes<Op, 4, HEADS>(from, kv_part, next, query, stride, sums, to);
}

// Puts the scales of the values into the weights of a head, zeros where no token is seen; returns what their zero points add.
inline float weigh_codes(const DecodeChunk& c, float* weights) {
  V more = zero();
  for (int64_t b = 0; b < c.blocks; b++) {
    const char* kv_part = (const char*)c.values[b];
    const f16 *scales = (const f16*)(kv_part + c.value.scales), *zeros = (const f16*)(kv_part + c.value.zeros);
    const V begin = set1(float(c.begin[b])), last = set1(float(c.end[b] - 1));
    for (int v = 0; v < BLOCK_VECTORS; v++) {
      static const float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const V lane = load(lanes + v * W);
      const Mask is_seen = both(at_least(lane, begin), at_least(last, lane));
      float* at = weights + b * BLOCK + v * W;
      const V weight = load(at);
      more = select(is_seen, fma(weight, load(zeros + v * W), more), more);
      store(at, select(is_seen, weight * load(scales + v * W), zero()));
    }
  }
  return sum(more);
}

// Mixes the codes of HEADS heads and VECS vectors of bytes of a token, and adds `more` to every number.
template <class Op, int BITS, int HEADS, int VECS>
inline void mix_codes(const DecodeChunk& c, const float* weights, const float* kept, int64_t column, bool ahead, const float* more, float* to) {
  constexpr int PARTS = parts_of(BITS);
  V sums[HEADS][VECS * PARTS];
  Op::template mix<BITS, HEADS, VECS>(c, weights, kept, column, ahead, sums);
  const auto put = [&](V x, int h, int64_t i, int64_t end) {
    x = x + set1(more[h]);
    float* at = to + h * c.value_dim + i;
    if (i + W <= end) store(at, x);
    else if (i < end) store_part(at, x, int(end - i));
  };
  const int64_t part = c.value.part;
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < VECS; v++)
      for (int p = 0; p < PARTS; p++) {
        const int64_t end = p + 1 < PARTS ? smaller((p + 1) * part, c.value_dim) : c.value_dim;
        put(sums[h][VECS * p + v], h, p * part + column + v * W, end);
      }
}

template <class Op, int BITS, int HEADS>
inline void mix_coded_heads(const DecodeChunk& c, const float* weights, const float* kept, bool ahead, const float* more, float* to) {
  constexpr int PARTS = parts_of(BITS), WIDE = PANEL > PARTS ? PANEL / PARTS : 1;
  if constexpr (HEADS == 4 && WIDE * PARTS == 4) {  // for want of registers
    mix_coded_heads<Op, BITS, 2>(c, weights, kept, ahead, more, to);
    mix_coded_heads<Op, BITS, 2>(c, weights + 2 * CHUNK_STRIDE, kept + 2 * Op::weight_floats(), false, more + 2, to + 2 * c.value_dim);
  } else {
    int64_t column = 0;
    for (; column + WIDE * W <= c.value.row_bytes; column += WIDE * W, ahead = false)
      mix_codes<Op, BITS, HEADS, WIDE>(c, weights, kept, column, ahead, more, to);
    for (; column < c.value.row_bytes; column += W, ahead = false)
      mix_codes<Op, BITS, HEADS, 1>(c, weights, kept, column, ahead, more, to);
  }
}

}  // namespace
}  // namespace moacompress
