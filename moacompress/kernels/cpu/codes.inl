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

constexpr float LARGEST_HALF = 65504.f;
inline float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
inline float number(const f16* p) {
  float x[W];
  store(x, load_part(p, 1));
  return x[0];
}

template <class T> void encode(const void* from, const Half& half, int64_t place, void* to, float* buffer) {
  const int64_t dim = half.dim;
  const float levels = half.format == INT8 ? 255.f : 15.f;
  char* const at = (char*)to;
  uint8_t* const codes = (uint8_t*)at + place * half.token_bytes;
  f16 *const scale_at = (f16*)(at + half.scales) + place, *const zero_at = (f16*)(at + half.zeros) + place;
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
    memset(codes, 0, size_t(half.token_bytes));
    scale_at->bits = zero_at->bits = 0x7e00;
    return;
  }
  const float low = -largest(zero() - lows) + 0.f, high = largest(highs);  // adding makes a minus zero a plus
  store_part(zero_at, set1(within(low, -LARGEST_HALF, LARGEST_HALF)), 1);
  store_part(scale_at, set1(within((high - low) / levels, 0.f, LARGEST_HALF)), 1);
  const float scale = number(scale_at);
  const V base = set1(number(zero_at)), inverse = set1(scale == 0 ? 0.f : 1.f / scale), most = set1(levels);
  uint8_t* const whole = (uint8_t*)buffer;  // behind the numbers that are read
  for (int64_t i = 0; i < dim; i += W)
    store_codes(whole + i, round(min(max((load(buffer + i) - base) * inverse, zero()), most)));
  if (half.format == INT8) {
    memcpy(codes, whole, size_t(dim));
    return;
  }
  for (int64_t i = 0; i < half.token_bytes; i++) {
    const int64_t above = i + half.token_bytes;
    codes[i] = uint8_t(whole[i] | (above < dim ? whole[above] << 4 : 0));
  }
}

// What the codes of a token stand for, in the rotated basis. What is read of a half beyond a token's codes is in the half.
inline void expand(const void* from, int place, const Half& half, float* to) {
  const char* at = (const char*)from;
  const uint8_t* codes = (const uint8_t*)at + place * half.token_bytes;
  const V scale = set1(number((const f16*)(at + half.scales) + place)), base = set1(number((const f16*)(at + half.zeros) + place));
  const auto put = [&](V x, int64_t i, int64_t end) {
    x = x * scale + base;
    if (i + W <= end) store(to + i, x);
    else if (i < end) store_part(to + i, x, int(end - i));
  };
  for (int64_t i = 0; i < half.token_bytes; i += W) {
    if (half.format == INT8) {
      put(load_codes(codes + i), i, half.dim);
      continue;
    }
    V low, high;
    load_nibbles(codes + i, low, high);
    put(low, i, half.token_bytes);
    put(high, i + half.token_bytes, half.dim);
  }
}

// ---- decode ----

inline int64_t whole_vectors(int64_t count) { return (count + W - 1) / W * W; }

// Floats of a query as `score_codes` reads it: of nibbles first those of the low ones.
inline int64_t coded_query(const Half& key) { return key.format == INT8 ? whole_vectors(key.dim) : 2 * whole_vectors(key.token_bytes); }

// Rotates a query and lays it out with zeros where there are no codes; returns the sum of its numbers.
template <class T> inline float keep_rotated(const T* from, const Half& key, float* buffer, float* to) {
  widen_row(from, key.dim, buffer);
  hadamard(buffer, key.dim);
  memset(to, 0, size_t(coded_query(key)) * sizeof(float));
  const int64_t low = key.format == INT8 ? key.dim : key.token_bytes;
  memcpy(to, buffer, size_t(low) * sizeof(float));
  memcpy(to + whole_vectors(low), buffer + low, size_t(key.dim - low) * sizeof(float));
  V all = zero();
  for (int64_t i = 0; i < coded_query(key); i += W) all = all + load(to + i);
  return sum(all);
}

// A half of a block that will be read soon; null for none.
struct Ahead {
  const char* at;
  int64_t bytes;
  inline void fetch(int part, int parts) const {
    if (!at) return;
    const int64_t size = (bytes + parts - 1) / parts;
    for (int64_t line = part * size; line < smaller((part + 1) * size, bytes); line += 64) prefetch(at + line);
  }
};

// Scores of HEADS query heads with the tokens [begin, end) of a block: scale * (query . codes) + zero * (sum of the query).
template <int BITS, int HEADS, int STEPS>
inline void score_codes(const void* from, const Half& half, const Ahead& next, int begin, int end, const float* query,
                        int64_t query_stride, const float* query_sums, float* to) {
  const uint8_t* codes = (const uint8_t*)from;
  const int64_t steps = STEPS ? STEPS : (half.token_bytes + W - 1) / W;
  for (int t = begin; t < end; t += 4) {
    const uint8_t* rows[4];
    V sums[HEADS][4];
    for (int i = 0; i < 4; i++) {
      rows[i] = codes + (t + i < end ? t + i : end - 1) * half.token_bytes;
      for (int h = 0; h < HEADS; h++) sums[h][i] = zero();
    }
    next.fetch(t / 4, 4);
    for (int64_t s = 0; s < steps; s++) {
      V low[4], high[4];
      for (int i = 0; i < 4; i++) {
        if (BITS == 8) low[i] = load_codes(rows[i] + s * W);
        else load_nibbles(rows[i] + s * W, low[i], high[i]);
      }
      for (int h = 0; h < HEADS; h++) {
        const float* q = query + h * query_stride + s * W;
        const V a = load(q);
        for (int i = 0; i < 4; i++) sums[h][i] = fma(low[i], a, sums[h][i]);
        if (BITS == 8) continue;
        const V b = load(q + steps * W);
        for (int i = 0; i < 4; i++) sums[h][i] = fma(high[i], b, sums[h][i]);
      }
    }
    for (int h = 0; h < HEADS; h++)  // up to three too many; the next tokens write over them
      sum4(sums[h][0], sums[h][1], sums[h][2], sums[h][3], to + h * CHUNK_STRIDE + (t - begin));
  }
  const f16 *scales = (const f16*)(codes + half.scales) + begin, *zeros = (const f16*)(codes + half.zeros) + begin;
  for (int t = 0; t < end - begin; t += W) {
    const int count = int(smaller(end - begin - t, W));
    const V scale = load_part(scales + t, count), base = load_part(zeros + t, count);
    for (int h = 0; h < HEADS; h++) {
      float* at = to + h * CHUNK_STRIDE + t;
      store_part(at, fma(load_part(at, count), scale, base * set1(query_sums[h])), count);
    }
  }
}

template <int HEADS>
inline void score_coded_heads(const void* from, const Half& half, const Ahead& next, int begin, int end, const float* query,
                              int64_t query_stride, const float* sums, float* to) {
  if (half.format == INT8) {
    if (half.dim == 64) score_codes<8, HEADS, 64 / W>(from, half, next, begin, end, query, query_stride, sums, to);
    else score_codes<8, HEADS, 0>(from, half, next, begin, end, query, query_stride, sums, to);
  } else {
    if (half.dim == 64) score_codes<4, HEADS, 32 / W>(from, half, next, begin, end, query, query_stride, sums, to);
    else score_codes<4, HEADS, 0>(from, half, next, begin, end, query, query_stride, sums, to);
  }
}

// Adds weights * codes of all blocks for HEADS heads and VECS vectors of bytes of a token, and then `more` to every number.
template <int BITS, int HEADS, int VECS>
inline void mix_codes(const DecodeChunk& c, const float* weights, int64_t column, bool ahead, const float* more, float* to) {
  constexpr int EACH = 8 / BITS;
  V sums[HEADS][VECS * EACH];
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < VECS * EACH; v++) sums[h][v] = zero();
  for (int64_t b = 0; b < c.blocks; b++) {
    const uint8_t* row = (const uint8_t*)c.values[b] + c.begin[b] * c.value.token_bytes + column;
    const int64_t later = b + AHEAD;  // past the last values come the keys of the next task
    const bool last = later >= c.blocks;
    const Ahead next = {!ahead ? nullptr : (const char*)(last ? c.coming[later - c.blocks] : c.values[later]),
                        last ? c.key.bytes : c.value.bytes};
    for (int t = c.begin[b]; t < c.end[b]; t++, row += c.value.token_bytes, weights++) {
      next.fetch(t, int(BLOCK));
      V value[VECS * EACH];
      for (int v = 0; v < VECS; v++) {
        if (BITS == 8) value[v] = load_codes(row + v * W);
        else load_nibbles(row + v * W, value[v], value[VECS * (EACH - 1) + v]);
      }
      for (int h = 0; h < HEADS; h++) {
        const V weight = set1(weights[h * CHUNK_STRIDE]);
        for (int v = 0; v < VECS * EACH; v++) sums[h][v] = fma(weight, value[v], sums[h][v]);
      }
    }
  }
  const auto put = [&](V x, int h, int64_t i, int64_t end) {
    x = x + set1(more[h]);
    float* at = to + h * c.value_dim + i;
    if (i + W <= end) store(at, x);
    else if (i < end) store_part(at, x, int(end - i));
  };
  const int64_t low = BITS == 8 ? c.value_dim : c.value.token_bytes;
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < VECS; v++) {
      put(sums[h][v], h, column + v * W, low);
      if (BITS == 4) put(sums[h][VECS * (EACH - 1) + v], h, low + column + v * W, c.value_dim);
    }
}

template <int BITS, int HEADS>
inline void mix_coded_heads(const DecodeChunk& c, const float* weights, bool ahead, const float* more, float* to) {
  constexpr int WIDE = PANEL * BITS / 8;
  int64_t column = 0;
  for (; column + WIDE * W <= c.value.token_bytes; column += WIDE * W, ahead = false)
    mix_codes<BITS, HEADS, WIDE>(c, weights, column, ahead, more, to);
  for (; column < c.value.token_bytes; column += W, ahead = false) mix_codes<BITS, HEADS, 1>(c, weights, column, ahead, more, to);
}

// Puts the scales of the values into the weights of the chunk's tokens; returns what their zero points add to every number.
inline float weigh_codes(const DecodeChunk& c, float* weights) {
  V more = zero();
  for (int64_t b = 0, first = 0; b < c.blocks; first += c.end[b] - c.begin[b], b++) {
    const char* half = (const char*)c.values[b];
    const f16 *scales = (const f16*)(half + c.value.scales), *zeros = (const f16*)(half + c.value.zeros);
    for (int t = c.begin[b]; t < c.end[b]; t += W) {
      const int count = int(smaller(c.end[b] - t, W));
      float* at = weights + first + t - c.begin[b];
      const V weight = load_part(at, count);
      more = fma(weight, load_part(zeros + t, count), more);
      store_part(at, weight * load_part(scales + t, count), count);
    }
  }
  return sum(more);
}

}  // namespace
}  // namespace moacompress
