// Decode: each key and value is read once for a whole group of query heads. Dot products with native keys run along the head
// dimension; codes.inl has what is done with codes. Included by kernels.inl.

namespace moacompress {
namespace {

// Dot products along a row that is widened to float32 as it is read.
template <class T> struct Widened {
  typedef float Query;
  typedef V Register;
  static constexpr int STEP = W;
  static inline V key(const T* p) { return load(p); }
  static inline V key_part(const T* p, int n) { return load_part(p, n); }
  static inline V query(const float* p) { return load(p); }
  static inline V dot(V key, V query, V sum) { return fma(key, query, sum); }
  static inline void keep(const T* from, int64_t n, float* to) { widen_row(from, n, to); }
};
template <class T> struct DotOf { typedef Widened<T> type; };
#ifdef MOACOMPRESS_DOTS
// Dot products of pairs of bfloat16, summed in float32 by the processor.
struct DotPairs {
  typedef bf16 Query;
  typedef Pairs Register;
  static constexpr int STEP = 2 * W;
  static inline Pairs key(const bf16* p) { return load_pairs(p); }
  static inline Pairs key_part(const bf16* p, int n) { return load_pairs_part(p, n); }
  static inline Pairs query(const bf16* p) { return load_pairs(p); }
  static inline V dot(Pairs key, Pairs query, V sum) { return dot_pairs(key, query, sum); }
  static inline void keep(const bf16* from, int64_t n, bf16* to) { memcpy(to, from, size_t(n) * 2); }
};
template <> struct DotOf<bf16> { typedef DotPairs type; };
#endif

inline int64_t padded(int64_t dim) { return (dim + 2 * W - 1) / (2 * W) * (2 * W); }

// Where a decode task works: scores, queries, of codes the sums of the queries, what the values' zero points add and the weights as
// they are multiplied; then one query that is rotated. All for a group.
struct DecodeScratch {
  int64_t query_floats, weight_floats, floats;
  float *scores, *queries, *query_sums, *more, *weights, *buffer;

  DecodeScratch(float* at, int64_t group, int64_t head_dim)
      : query_floats(2 * padded(head_dim) + 64), weight_floats(1 + 2 * CHUNK / 4) {
    const int64_t sizes[] = {group * CHUNK_STRIDE, group * query_floats, group, group, group * weight_floats, padded(head_dim)};
    float** const parts[] = {&scores, &queries, &query_sums, &more, &weights, &buffer};
    floats = 0;
    for (int i = 0; i < 6; i++) {
      *parts[i] = at + floats;
      floats += sizes[i];
    }
  }
};

size_t decode_scratch(int64_t group, int64_t head_dim) { return size_t(DecodeScratch(nullptr, group, head_dim).floats); }

// Scores of HEADS query heads with the tokens [begin, end) of a block; `next` is read ahead.
template <class T, int HEADS, int STEPS>
inline void score_block(const T* keys, const char* next, int begin, int end, const typename DotOf<T>::type::Query* query,
                        int64_t query_stride, int64_t dim, float* to) {
  typedef typename DotOf<T>::type Op;
  const int64_t steps = STEPS ? STEPS : dim / Op::STEP;
  const int tail = STEPS ? 0 : int(dim - steps * Op::STEP);
  const int64_t bytes = dim * int64_t(sizeof(T));
  for (int t = begin; t < end; t += 4) {
    const T* rows[4];
    V sums[HEADS][4];
    for (int i = 0; i < 4; i++) {
      rows[i] = keys + (t + i < end ? t + i : end - 1) * dim;
      for (int h = 0; h < HEADS; h++) sums[h][i] = zero();
    }
    if (next)
      for (int64_t line = t * bytes; line < (t + 4) * bytes; line += 64) prefetch(next + line);
    if (STEPS >= 8) {  // long rows one after the other: memory is read ahead best in its order
      for (int i = 0; i < 4; i++)
        for (int64_t s = 0; s < steps; s++) {
          const typename Op::Register key = Op::key(rows[i] + s * Op::STEP);
          for (int h = 0; h < HEADS; h++)
            sums[h][i] = Op::dot(key, Op::query(query + h * query_stride + s * Op::STEP), sums[h][i]);
        }
    } else {  // short rows together: each part of a query is loaded once for four keys
      for (int64_t s = 0; s < steps; s++) {
        typename Op::Register key[4];
        for (int i = 0; i < 4; i++) key[i] = Op::key(rows[i] + s * Op::STEP);
        for (int h = 0; h < HEADS; h++) {
          const typename Op::Register q = Op::query(query + h * query_stride + s * Op::STEP);
          for (int i = 0; i < 4; i++) sums[h][i] = Op::dot(key[i], q, sums[h][i]);
        }
      }
    }
    if (tail) {
      typename Op::Register key[4];
      for (int i = 0; i < 4; i++) key[i] = Op::key_part(rows[i] + steps * Op::STEP, tail);
      for (int h = 0; h < HEADS; h++) {
        const typename Op::Register q = Op::query(query + h * query_stride + steps * Op::STEP);
        for (int i = 0; i < 4; i++) sums[h][i] = Op::dot(key[i], q, sums[h][i]);
      }
    }
    for (int h = 0; h < HEADS; h++)  // up to three too many; the next tokens write over them
      sum4(sums[h][0], sums[h][1], sums[h][2], sums[h][3], to + h * CHUNK_STRIDE + (t - begin));
  }
}

template <class T, int HEADS>
inline void score_heads(const T* keys, const char* next, int begin, int end, const typename DotOf<T>::type::Query* query,
                        int64_t query_stride, int64_t dim, float* to) {
  typedef typename DotOf<T>::type Op;
  if (dim == 64) score_block<T, HEADS, 64 / Op::STEP>(keys, next, begin, end, query, query_stride, dim, to);
  else if (dim == 128) score_block<T, HEADS, 128 / Op::STEP>(keys, next, begin, end, query, query_stride, dim, to);
  else score_block<T, HEADS, 0>(keys, next, begin, end, query, query_stride, dim, to);
}

// Adds weights * values of all blocks for HEADS heads and VECS vectors of value columns (PART columns if VECS is 0).
template <class T, int HEADS, int VECS>
inline void mix_blocks(const DecodeChunk& c, const Places& places, const float* all, int64_t column, int part, bool ahead, float* to) {
  constexpr int N = VECS ? VECS : 1;
  V sums[HEADS][N];
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < N; v++) sums[h][v] = zero();
  const int64_t bytes = c.value_dim * int64_t(sizeof(T));
  for (int64_t b = 0; b < c.blocks; b++) {
    const T* row = (const T*)c.values[b] + c.begin[b] * c.value_dim + column;
    const int64_t later = b + AHEAD;  // past the last values come the keys of the next task
    const char* next = !ahead ? nullptr : (const char*)(later < c.blocks ? c.values[later] : c.coming[later - c.blocks]);
    const float* weights = all + places.first[b];
    for (int t = c.begin[b]; t < c.end[b]; t++, row += c.value_dim, weights++) {
      if (next)
        for (int64_t line = t * bytes; line < (t + 1) * bytes; line += 64) prefetch(next + line);
      V value[N];
      for (int v = 0; v < N; v++) value[v] = VECS ? load(row + v * W) : load_part(row, part);
      for (int h = 0; h < HEADS; h++) {
        const V weight = set1(weights[h * CHUNK_STRIDE]);
        for (int v = 0; v < N; v++) sums[h][v] = fma(weight, value[v], sums[h][v]);
      }
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < N; v++) {
      float* at = to + h * c.value_dim + column + v * W;
      if (VECS) store(at, sums[h][v]);
      else store_part(at, sums[h][v], part);
    }
}

template <class T, int HEADS>
inline void mix_heads(const DecodeChunk& c, const Places& places, const float* weights, bool ahead, float* to) {
  int64_t column = 0;
  constexpr int WIDE = 2 * PANEL;  // vectors: whole rows are read in memory's order, by two heads at once for want of registers
  if constexpr (WIDE >= 8 && HEADS > 2) {
    if (c.value_dim >= WIDE * W) {
      mix_heads<T, 2>(c, places, weights, ahead, to);
      mix_heads<T, HEADS - 2>(c, places, weights + 2 * CHUNK_STRIDE, false, to + 2 * c.value_dim);
      return;
    }
  } else if constexpr (WIDE >= 8) {
    for (; column + WIDE * W <= c.value_dim; column += WIDE * W, ahead = false)
      mix_blocks<T, HEADS, WIDE>(c, places, weights, column, 0, ahead, to);
  }
  for (; column + LANES <= c.value_dim; column += LANES, ahead = false)
    mix_blocks<T, HEADS, PANEL>(c, places, weights, column, 0, ahead, to);
  for (; column + W <= c.value_dim; column += W, ahead = false) mix_blocks<T, HEADS, 1>(c, places, weights, column, 0, ahead, to);
  if (column < c.value_dim) mix_blocks<T, HEADS, 0>(c, places, weights, column, int(c.value_dim - column), ahead, to);
}

// Calls f with how many of the group's heads from `h` on are worked on at once, as a template argument.
#define MOACOMPRESS_HEADS(left, call)                                          \
  do {                                                                         \
    if ((left) == 1) { constexpr int HEADS = 1; call; }                        \
    else if ((left) == 2) { constexpr int HEADS = 2; call; }                   \
    else if ((left) == 3) { constexpr int HEADS = 3; call; }                   \
    else { constexpr int HEADS = 4; call; }                                    \
  } while (0)

// Scores of all query heads with native keys.
template <class T> inline void score_chunk(const DecodeChunk& c, const Places& places, const DecodeScratch& s) {
  typedef typename DotOf<T>::type::Query Query;
  const int64_t stride = padded(c.head_dim) * int64_t(sizeof(float) / sizeof(Query));
  Query* query = (Query*)s.queries;
  for (int64_t h = 0; h < c.group; h++) {
    memset((void*)(query + h * stride), 0, size_t(stride) * sizeof(Query));
    DotOf<T>::type::keep((const T*)c.query + h * c.query_head, c.head_dim, query + h * stride);
  }
  for (int64_t b = 0; b < c.blocks; b++) {
    const T* keys = (const T*)c.keys[b];
    const int64_t later = b + AHEAD, past = later - c.blocks;  // past the last keys come the first values
    const char* next = (const char*)(past < 0 ? c.keys[later] : past < c.blocks ? c.values[past] : nullptr);
    for (int64_t h = 0; h < c.group; h += 4, next = nullptr)
      MOACOMPRESS_HEADS(c.group - h, ({
        score_heads<T, HEADS>(keys, next, c.begin[b], c.end[b], query + h * stride, stride, c.head_dim,
                              s.scores + h * CHUNK_STRIDE + places.first[b]);
      }));
  }
}

// The same with codes.
template <class T, class Op> inline void score_coded_chunk(const DecodeChunk& c, const DecodeScratch& s) {
  const int64_t stride = Op::query_floats(c.key.token_bytes);
  for (int64_t h = 0; h < c.group; h++) {
    widen_row((const T*)c.query + h * c.query_head, c.head_dim, s.buffer);
    hadamard(s.buffer, c.head_dim);
    s.query_sums[h] = Op::keep_query(s.buffer, c.key, s.queries + h * stride);
  }
  for (int64_t b = 0; b < c.blocks; b++) {
    const int64_t later = b + AHEAD, past = later - c.blocks;  // past the last keys come the first values
    Ahead next = {(const char*)(past < 0 ? c.keys[later] : past < c.blocks ? c.values[past] : nullptr),
                  past < 0 ? c.key.bytes : c.value.bytes};
    for (int64_t h = 0; h < c.group; h += 4, next.at = nullptr)
      MOACOMPRESS_HEADS(c.group - h, ({
        score_coded_heads<Op, HEADS>(c.keys[b], c.key, next, s.queries + h * stride, stride, s.query_sums + h,
                                     s.scores + h * CHUNK_STRIDE + b * BLOCK);
      }));
  }
}

// Makes weights of the scores of a head, and takes note of their peak and sum.
inline void weigh_scores(const DecodeChunk& c, const Places& places, int64_t h, float* row) {
  const int tokens = places.count;
  places.hide(c, row);
  V peaks = set1(-__builtin_inff());  // NaN is passed over: its weight will be NaN
  for (int t = 0; t < tokens; t += W) {
    V x = load(row + t);
    x = c.softcap > 0 ? capped(x, c.scaling, c.softcap) : x * set1(c.scaling);
    store(row + t, x);
    peaks = max(x, peaks);
  }
  if (c.softcap > 0) places.hide(c, row);  // the cap has made numbers of it, though none above the peak
  const float peak = largest(peaks);
  const V base = set1(peak == -__builtin_inff() ? 0.f : peak);  // so that the weights of minus infinity are zero
  V totals = zero();
  for (int t = 0; t < tokens; t += W) {
    const V p = exp2((load(row + t) - base) * set1(LOG2_E));
    store(row + t, p);
    totals = totals + p;
  }
  c.peak[h] = peak;
  c.total[h] = sum(totals);
  if (!c.keep) return;
  float* kept = c.keep + h * KEPT;
  kept[0] = c.peak[h];
  kept[1] = c.total[h];
  for (int t = 0; t < tokens; t += W) store(kept + 16 + t, load(row + t));
}

// Reads the weights of a head that the anchor kept, whose values may be of another format, and so its weights in other places.
inline void read_kept(const DecodeChunk& c, const Places& places, int64_t h, float* row) {
  const float* kept = c.kept + h * KEPT;
  c.peak[h] = kept[0];
  c.total[h] = kept[1];
  kept += 16;
  if (places.whole_blocks == c.kept_in_blocks) {
    for (int t = 0; t < places.count; t += W) store(row + t, load(kept + t));
    return;
  }
  for (int64_t b = 0; b < c.blocks; b++) {
    const int count = c.end[b] - c.begin[b];
    if (places.whole_blocks)
      for (int t = 0; t < int(BLOCK); t += W) store(row + b * BLOCK + t, zero());
    memcpy(row + places.first[b], kept + (c.kept_in_blocks ? b * BLOCK + c.begin[b] : 0), size_t(count) * sizeof(float));
    if (!c.kept_in_blocks) kept += count;
  }
}

template <class T> void decode_chunk(const DecodeChunk& c) {
  typedef typename CodesOf<T>::type Op;
  const DecodeScratch s(c.scratch, c.group, c.head_dim);
  const Places places(c);
  if (!c.kept && c.key.format == NATIVE) score_chunk<T>(c, places, s);
  else if (!c.kept) score_coded_chunk<T, Op>(c, s);
  for (int64_t h = 0; h < c.group; h++) {
    float* row = s.scores + h * CHUNK_STRIDE;
    if (c.kept) read_kept(c, places, h, row);
    else weigh_scores(c, places, h, row);
    if (c.value.format == NATIVE) continue;
    s.more[h] = weigh_codes(c, row);
    s.more[h] += Op::keep_weights(c, row, s.weights + h * Op::weight_floats());
  }
  for (int64_t h = 0; h < c.group; h += 4) {
    const float *weights = s.scores + h * CHUNK_STRIDE, *kept = s.weights + h * Op::weight_floats(), *more = s.more + h;
    float* to = c.mixed + h * c.value_dim;
    MOACOMPRESS_HEADS(c.group - h, ({
      if (c.value.format == NATIVE) mix_heads<T, HEADS>(c, places, weights, h == 0, to);
      else if (c.value.format == INT8) mix_coded_heads<Op, 8, HEADS>(c, weights, kept, h == 0, more, to);
      else if (c.value.format == INT6) mix_coded_heads<Op, 6, HEADS>(c, weights, kept, h == 0, more, to);
      else mix_coded_heads<Op, 4, HEADS>(c, weights, kept, h == 0, more, to);
    }));
  }
}

}  // namespace
}  // namespace moacompress
