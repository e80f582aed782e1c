// The kernels, written once over the vectors of a vec_*.h and included by one file per instruction set.
//
// Decode is in decode.inl. Prefill and backward put queries (or keys, in the backward of keys and values) in the lanes of vectors
// and broadcast the rows of the other side, so that those rows are used where they lie: no packing, and the softmax needs no sum
// across a vector. Products of tiles (amx.inl) take copies of them.

#include "core.h"

namespace moacompress {
namespace {

constexpr int LANES = PANEL * W;
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float NOTHING = -__FLT_MAX__;  // peak of a lane that has seen no key

inline V exp2(V x) {  // relative error 2e-7; 0 below 2^-126; NaN of NaN
  const V low = set1(-126.f);
  const Mask normal = not_below(x, low);
  x = min(set1(127.f), max(low, x));
  const V n = round(x), r = x - n;
  V y = set1(1.535336188319500e-4f);
  y = fma(y, r, set1(1.339887440266574e-3f));
  y = fma(y, r, set1(9.618437357674640e-3f));
  y = fma(y, r, set1(5.550332471162809e-2f));
  y = fma(y, r, set1(2.402264791363012e-1f));
  y = fma(y, r, set1(6.931472028550421e-1f));
  y = fma(y, r, set1(1.f));
  return select(normal, times_power_of_two(y, n), zero());
}

inline V capped(V x, float scaling, float softcap) {  // softcap * tanh(x * scaling / softcap)
  const V twice = min(set1(60.f), x * set1(2.f * LOG2_E * scaling / softcap));
  const V e = exp2(twice);
  return set1(softcap) - set1(2.f * softcap) / (e + set1(1.f));
}

template <class T> inline void widen_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, int(n - i)), int(n - i));
}
template <class T> inline void narrow_row(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, int(n - i)), int(n - i));
}

constexpr int CHUNK = int(CHUNK_BLOCKS * BLOCK);
constexpr int CHUNK_STRIDE = CHUNK + 16;

}  // namespace
}  // namespace moacompress

#include "codes.inl"
#include "decode.inl"

namespace moacompress {
namespace {

// ---- tiles: prefill and backward ----

// A cell is 4 bytes: one float32, or a pair of bfloat16 that the processor multiplies and sums in float32.
struct Float32 {
  typedef V Register;
  static inline V spread(const char* p) { float x; memcpy(&x, p, 4); return set1(x); }
  static inline V lanes(const float* p) { return load(p); }
  static inline V step(V sum, V a, V b) { return fma(a, b, sum); }
};
#ifdef MOACOMPRESS_DOTS
struct PairCells {
  typedef Pairs Register;
  static inline Pairs spread(const char* p) { return spread_pair(p); }
  static inline Pairs lanes(const float* p) { return load_pairs(p); }
  static inline V step(V sum, Pairs a, Pairs b) { return dot_pairs(a, b, sum); }
};
#endif

// to[r][lane] = sum over k of rows[r][k] * panel[k][lane], for ROWS rows and VECS vectors of lanes.
template <class Op, int ROWS, int VECS>
inline void dot_rows(const char* const* rows, int64_t depth, const float* panel, float* to) {
  V sums[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) sums[r][v] = zero();
  for (int64_t k = 0; k < depth; k++, panel += LANES) {
    typename Op::Register b[VECS];
    for (int v = 0; v < VECS; v++) b[v] = Op::lanes(panel + v * W);
    for (int r = 0; r < ROWS; r++) {
      const typename Op::Register a = Op::spread(rows[r] + k * 4);
      for (int v = 0; v < VECS; v++) sums[r][v] = Op::step(sums[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(to + r * LANES + v * W, sums[r][v]);
}
template <class Op, int VECS>
inline void dots(const char* const* rows, int64_t count, int64_t depth, const float* panel, float* to) {
  int64_t r = 0;  // `rows` repeats its last entry up to a multiple of four
  for (; r + 4 < count; r += 6) dot_rows<Op, 6, VECS>(rows + r, depth, panel, to + r * LANES);
  if (r + 2 < count) dot_rows<Op, 4, VECS>(rows + r, depth, panel, to + r * LANES);
  else if (r < count) dot_rows<Op, 2, VECS>(rows + r, depth, panel, to + r * LANES);
}

// to[c][lane] = to[c][lane] * factor[lane] + sum over k of rows[k][column + c] * panel[k][lane], for COLUMNS columns.
template <class Op, int COLUMNS, int VECS>
inline void mix_columns(const char* const* rows, int64_t count, int64_t column, const float* panel, const V* factor, float* to) {
  V sums[COLUMNS][VECS];
  for (int c = 0; c < COLUMNS; c++)
    for (int v = 0; v < VECS; v++) {
      sums[c][v] = load(to + (column + c) * LANES + v * W);
      if (factor) sums[c][v] = sums[c][v] * factor[v];
    }
  for (int64_t k = 0; k < count; k++, panel += LANES) {
    typename Op::Register b[VECS];
    for (int v = 0; v < VECS; v++) b[v] = Op::lanes(panel + v * W);
    for (int c = 0; c < COLUMNS; c++) {
      const typename Op::Register a = Op::spread(rows[k] + (column + c) * 4);
      for (int v = 0; v < VECS; v++) sums[c][v] = Op::step(sums[c][v], a, b[v]);
    }
  }
  for (int c = 0; c < COLUMNS; c++)
    for (int v = 0; v < VECS; v++) store(to + (column + c) * LANES + v * W, sums[c][v]);
}
template <class Op, int VECS>
inline void mix(const char* const* rows, int64_t count, int64_t columns, const float* panel, const V* factor, float* to) {
  int64_t c = 0;
  for (; c + 6 <= columns; c += 6) mix_columns<Op, 6, VECS>(rows, count, c, panel, factor, to);
  for (; c + 4 <= columns; c += 4) mix_columns<Op, 4, VECS>(rows, count, c, panel, factor, to);
  for (; c < columns; c++) mix_columns<Op, 1, VECS>(rows, count, c, panel, factor, to);
}

// Calls f with the number of vectors that `lanes` lanes of a panel need, as a template argument.
#define MOACOMPRESS_VECTORS(lanes, call)     \
  do {                                       \
    if ((lanes) <= W) { constexpr int VECS = 1; call; }                          \
    else if (PANEL > 2 && (lanes) <= 2 * W) { constexpr int VECS = PANEL > 2 ? 2 : 1; call; } \
    else { constexpr int VECS = PANEL; call; }                                   \
  } while (0)

inline void repeat_last(const char** rows, int64_t count) {
  for (int64_t i = count; i % 4; i++) rows[i] = rows[count - 1];
}

// Rows as float32: where they lie, or widened into `store`.
inline void as_floats(const void* const* from, int64_t count, int64_t, float*, const float*, const char** to) {
  for (int64_t i = 0; i < count; i++) to[i] = (const char*)from[i];
  repeat_last(to, count);
}
template <class T>
inline void as_floats(const void* const* from, int64_t count, int64_t dim, float* store, const T*, const char** to) {
  for (int64_t i = 0; i < count; i++) {
    widen_row((const T*)from[i], dim, store + i * dim);
    to[i] = (const char*)(store + i * dim);
  }
  repeat_last(to, count);
}

// Writes a row into one lane of the panels.
template <class T> inline void into_lane(const T* row, int64_t dim, int64_t lane, float* buffer, float* panels) {
  widen_row(row, dim, buffer);
  float* to = panels + lane / LANES * dim * LANES + lane % LANES;
  for (int64_t d = 0; d < dim; d++) to[d * LANES] = buffer[d];
}
template <class T>
inline void out_of_lane(const float* panels, int64_t dim, int64_t lane, float factor, float* buffer, T* row, bool rotate = false,
                        float rest = 0.f) {
  const float* from = panels + lane / LANES * dim * LANES + lane % LANES;
  for (int64_t d = 0; d < dim; d++) buffer[d] = (from[d * LANES] + rest) * factor;
  if (rotate) hadamard(buffer, dim);
  narrow_row(buffer, dim, row);
}

inline int64_t panels_of(int64_t lanes) { return (lanes + LANES - 1) / LANES; }

size_t tile_scratch(int64_t lanes, int64_t head_dim, int64_t value_dim) {
  const int64_t most = larger(panels_of(lanes), panels_of(TILE)) * LANES, dims = head_dim + value_dim;
  return size_t(2 * most * dims + 10 * most + 3 * TILE * LANES + 2 * TILE * dims + dims + 2 * W);
}

// What a lane does not see has a weight of zero, and zero times a number that is not finite is NaN. That shows in a tile's sums,
// which are looked at once they are made. Then the tile is made again, with care: where some lanes do not see some rows, products
// are made without such numbers (`zero_nonfinite`), which are then added for the lanes that see them (`add_nonfinite`).
template <class T, class Row> inline bool all_finite(const Row* const* rows, int64_t count, int64_t dim) {
  V sums[4] = {zero(), zero(), zero(), zero()};  // of zero times every number
  for (int64_t k = 0; k < count; k++) {
    const T* row = (const T*)rows[k];
    int64_t d = 0;
    for (; d + 4 * W <= dim; d += 4 * W)
      for (int i = 0; i < 4; i++) sums[i] = fma(load(row + d + i * W), zero(), sums[i]);
    for (; d + W <= dim; d += W) sums[0] = fma(load(row + d), zero(), sums[0]);
    if (d < dim) sums[0] = fma(load_part(row + d, int(dim - d)), zero(), sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) == 0;
}
inline bool all_finite(const float* numbers, int64_t count) { return all_finite<float>(&numbers, 1, count); }
// Copies rows to `store`, with zeros for numbers that are not finite.
template <class T, class Row> void zero_nonfinite(const Row* const* rows, int64_t count, int64_t dim, float* store, const Row** to) {
  T* copy = (T*)store;
  for (int64_t k = 0; k < count; k++, copy += dim) {
    for (int64_t d = 0; d < dim; d += W) {
      const int n = int(smaller(dim - d, W));
      const V x = load_part((const T*)rows[k] + d, n);
      store_part(copy + d, select(at_least(x - x, zero()), x, zero()), n);
    }
    to[k] = (const Row*)copy;
  }
}
// to[column][lane] += weight(k, v) * rows[k][column], for the numbers that are not finite and the lanes that see their rows.
template <class T, int VECS, class Row, class Weight, class Sees>
void add_nonfinite(const Row* const* rows, int64_t count, int64_t dim, Weight weight, Sees sees, float* buffer, float* to) {
  for (int64_t k = 0; k < count; k++) {
    widen_row((const T*)rows[k], dim, buffer);
    for (int64_t d = 0; d < dim; d++) {
      if (buffer[d] - buffer[d] == 0) continue;
      for (int v = 0; v < VECS; v++) {
        float* at = to + d * LANES + v * W;
        const V before = load(at);
        store(at, select(sees(k, v), fma(weight(k, v), set1(buffer[d]), before), before));
      }
    }
  }
}

// Bounds of what each lane sees, in columns of the tile: [a, b) and [c, d).
struct Bounds {
  float *a, *b, *c, *d;
  Bounds from(int64_t lane) const { return {a + lane, b + lane, c + lane, d + lane}; }
};
inline Mask seen(V column, V a, V b, V c, V d) {
  // x < b as b - 1 >= x: the bounds are whole numbers
  const V one = set1(1.f);
  return either(both(at_least(column, a), at_least(b - one, column)), both(at_least(column, c), at_least(d - one, column)));
}
inline Mask seen(V column, const Bounds& bounds, int v) {
  return seen(column, load(bounds.a + v * W), load(bounds.b + v * W), load(bounds.c + v * W), load(bounds.d + v * W));
}
inline void set_bounds(const PrefillTile& t, int64_t lanes, const Bounds& to) {
  for (int64_t lane = 0; lane < lanes; lane++) {
    const bool real = lane < t.group * t.rows;
    const int64_t n = t.low + lane % t.rows;
    const Visible v = visible(n, t.rule);
    const Columns& columns = t.source.columns;
    to.a[lane] = real ? float(columns.column(v.first)) : 0.f;
    to.b[lane] = real ? float(columns.column(v.sink_end)) : 0.f;
    to.c[lane] = real ? float(columns.column(v.start)) : 0.f;
    to.d[lane] = real ? float(columns.column(n)) : 0.f;
  }
}
// Whether every row of the tile sees all of the columns [begin, end).
inline bool all_seen(const PrefillTile& t, int64_t begin, int64_t end) {
  const Columns& columns = t.source.columns;
  const Visible a = visible(t.low, t.rule), b = visible(t.low + t.rows - 1, t.rule);
  return (columns.column(b.start) <= begin && end <= columns.column(t.low)) ||
         (columns.column(b.first) <= begin && end <= columns.column(a.sink_end));
}

// Which lanes see key k of a tile of columns, vector v of their panel.
struct SeesColumns {
  Bounds bounds;
  int64_t begin;  // column of the first key
  struct OfVector {
    V a, b, c, d;
    int64_t begin;
    Mask operator()(int64_t k) const { return seen(set1(float(begin + k)), a, b, c, d); }
  };
  OfVector of(int v) const {
    return {load(bounds.a + v * W), load(bounds.b + v * W), load(bounds.c + v * W), load(bounds.d + v * W), begin};
  }
};
// The same of transient tokens, by how many have left the window when a lane's query attends.
struct SeesTransient {
  const float *left, *entered, *last;
  struct OfVector {
    V left;
    const float *entered, *last;
    Mask operator()(int64_t k) const { return both(at_least(left, set1(entered[k])), at_least(set1(last[k]), left)); }
  };
  OfVector of(int v) const { return {load(left + v * W), entered, last}; }
};

// Scores -> weights relative to the lane's new peak, in place; returns in `factor` what older sums must be scaled by.
template <int VECS, class Sees>
inline void softmax_step(float* scores, int64_t count, bool all, const Sees& sees, float scaling, float softcap, float* peak,
                         float* total, V* factor) {
  const V to_log2 = set1(softcap > 0 ? LOG2_E : scaling * LOG2_E);
  for (int v = 0; v < VECS; v++) {
    float* at = scores + v * W;
    const V before = load(peak + v * W);
    V now = before;  // NaN is passed over: its weight will be NaN
    if (all && softcap <= 0) {
      for (int64_t j = 0; j < count; j++) now = max(load(at + j * LANES), now);
    } else {
      const typename Sees::OfVector sees_key = sees.of(v);
      for (int64_t j = 0; j < count; j++) {
        V x = load(at + j * LANES);
        if (softcap > 0) x = capped(x, scaling, softcap);
        if (!all) x = select(sees_key(j), x, set1(-__builtin_inff()));
        store(at + j * LANES, x);
        now = max(x, now);
      }
    }
    V sum = zero();
    for (int64_t j = 0; j < count; j++) {
      const V p = exp2((load(at + j * LANES) - now) * to_log2);
      store(at + j * LANES, p);
      sum = sum + p;
    }
    factor[v] = exp2((before - now) * to_log2);
    store(total + v * W, fma(load(total + v * W), factor[v], sum));
    store(peak + v * W, now);
  }
}

#ifdef MOACOMPRESS_DOTS
// Weights of two keys in one cell; the keys beyond `count` are zero.
template <int VECS> inline void pair_weights(float* weights, int64_t count) {
  for (int64_t k = 0; 2 * k < count; k++)
    for (int v = 0; v < VECS; v++) {
      const float* at = weights + 2 * k * LANES + v * W;
      store_pairs(weights + k * LANES + v * W, pair_rounded(load(at), 2 * k + 1 < count ? load(at + LANES) : zero()));
    }
}
// The weight of one of them, as it was rounded.
inline V weight_of_pair(const float* weights, int64_t key, int v) {
  const Pairs cell = load_pairs(weights + key / 2 * LANES + v * W);
  return key % 2 ? high_of(cell) : low_of(cell);
}
// Values of two keys in one cell.
inline void pair_values(const void* const* from, int64_t count, int64_t dim, float* store, const char** to) {
  for (int64_t k = 0; 2 * k < count; k++) {
    const bf16 *a = (const bf16*)from[2 * k], *b = 2 * k + 1 < count ? (const bf16*)from[2 * k + 1] : nullptr;
    uint32_t* row = (uint32_t*)(store + k * dim);
    int64_t d = 0;
    for (; d + W <= dim; d += W) store_pairs(row + d, pair_rows(a + d, b ? b + d : nullptr));
    for (; d < dim; d++) row[d] = uint32_t(a[d].bits) | (b ? uint32_t(b[d].bits) << 16 : 0u);
    to[k] = (const char*)row;
  }
}
#endif

// How a dtype's tiles are multiplied; `Row` is what the rows of values are of that `values` takes. `extra` is memory of three numbers
// of every lane, and there is more, as for scores.
template <class Op, class OfValues> struct TileOf {
  typedef OfValues Row;
  inline void find_values(const void**, const int*, int64_t, const KVPart&, float*) {}
  inline bool finite_values(const void* const* rows, int64_t count, int64_t dim) const { return all_finite<Row>(rows, count, dim); }
  // Scores of the keys for the lanes of a panel, from some lane on.
  template <int VECS> inline void scores(const char* const* rows, int64_t count, int64_t depth, const float* panel, int64_t, float* to) {
    dots<Op, VECS>(rows, count, depth, panel, to);
  }
  template <int VECS>
  inline void mix(const char* const* rows, int64_t count, int64_t columns, const float* panel, const V* factor, float* to) {
    moacompress::mix<Op, VECS>(rows, count, columns, panel, factor, to);
  }
  // What is to be added to every number of a lane.
  inline float rest(int64_t) const { return 0.f; }
  inline bool finite() const { return true; }
};
template <class T> struct FloatTile : TileOf<Float32, T> {
  FloatTile(const PrefillTile&, int64_t, float*, float*) {}
  static inline int64_t depth(const PrefillTile& t) { return t.head_dim; }
  inline void lane(const T* row, const KVPart& key, int64_t lane, float* buffer, float* panels) {
    into_lane(row, key.dim, lane, buffer, panels);
  }
  inline void keys(const void* const* from, const int*, int64_t count, const KVPart& kv_part, float* store, const char** to) {
    as_floats(from, count, kv_part.dim, store, (const T*)nullptr, to);
  }
  inline int64_t values(const void* const* from, int64_t count, int64_t dim, float* store, const char** to) {
    as_floats(from, count, dim, store, (const T*)nullptr, to);
    return count;
  }
  template <int VECS, class Sees> inline void weights(float*, int64_t, int64_t, const V*, const Sees&) {}
  inline V weight(const float* at, int64_t key, int v) const { return load(at + key * LANES + v * W); }
};
#ifdef MOACOMPRESS_DOTS
struct PairTile : TileOf<PairCells, bf16> {
  PairTile(const PrefillTile&, int64_t, float*, float*) {}
  static inline int64_t depth(const PrefillTile& t) { return t.head_dim / 2; }
  inline void lane(const bf16* row, const KVPart& key, int64_t lane, float*, float* panels) {
    const int64_t cells = key.dim / 2;
    float* to = panels + lane / LANES * cells * LANES + lane % LANES;
    for (int64_t d = 0; d < cells; d++) memcpy(to + d * LANES, row + 2 * d, 4);
  }
  inline void keys(const void* const* from, const int*, int64_t count, const KVPart&, float*, const char** to) {
    for (int64_t i = 0; i < count; i++) to[i] = (const char*)from[i];
    repeat_last(to, count);
  }
  inline int64_t values(const void* const* from, int64_t count, int64_t dim, float* store, const char** to) {
    pair_values(from, count, dim, store, to);
    return (count + 1) / 2;
  }
  template <int VECS, class Sees> inline void weights(float* at, int64_t count, int64_t, const V*, const Sees&) {
    pair_weights<VECS>(at, count);
  }
  inline V weight(const float* at, int64_t key, int v) const { return weight_of_pair(at, key, v); }
};
#endif

// Codes are expanded, a tile of them at a time, to float32 in their rotated basis.
template <class T> struct CodesTile : FloatTile<float> {
  using FloatTile<float>::FloatTile;
  inline void lane(const T* row, const KVPart& key, int64_t lane, float* buffer, float* panels) {
    widen_row(row, key.dim, buffer);
    if (key.format != NATIVE) hadamard(buffer, key.dim);
    float* to = panels + lane / LANES * key.dim * LANES + lane % LANES;
    for (int64_t d = 0; d < key.dim; d++) to[d * LANES] = buffer[d];
  }
  static inline void floats(const void* const* from, const int* places, int64_t count, const KVPart& kv_part, float* store) {
    for (int64_t i = 0; i < count; i++) {
      if (kv_part.format == NATIVE) widen_row((const T*)from[i], kv_part.dim, store + i * kv_part.dim);
      else expand(from[i], places[i], kv_part, store + i * kv_part.dim);
    }
  }
  inline void keys(const void* const* from, const int* places, int64_t count, const KVPart& kv_part, float* store, const char** to) {
    floats(from, places, count, kv_part, store);
    for (int64_t i = 0; i < count; i++) to[i] = (const char*)(store + i * kv_part.dim);
    repeat_last(to, count);
  }
  inline void find_values(const void** rows, const int* places, int64_t count, const KVPart& kv_part, float* store) {
    floats(rows, places, count, kv_part, store);
    for (int64_t i = 0; i < count; i++) rows[i] = store + i * kv_part.dim;
  }
};

#ifdef MOACOMPRESS_AMX
}  // namespace
}  // namespace moacompress
#include "amx.inl"
namespace moacompress {
namespace {
#endif

template <class T, class Tile> bool prefill_with(const PrefillTile& t, float* scratch, bool careful = false) {
  typedef typename Tile::Row Row;
  const int64_t lanes = t.group * t.rows, panels = panels_of(lanes), all_lanes = panels * LANES;
  const int64_t depth = Tile::depth(t);
  float* query = scratch;
  float* out = query + all_lanes * depth;
  float* peak = out + all_lanes * t.value_dim;
  float* total = peak + all_lanes;
  const Bounds bounds = {total + all_lanes, total + 2 * all_lanes, total + 3 * all_lanes, total + 4 * all_lanes};
  float* left = total + 5 * all_lanes;
  float* const extra = left + all_lanes;
  float* scores = extra + 3 * all_lanes;
  float* key_store = scores + 2 * TILE * LANES;
  float* value_store = key_store + TILE * t.head_dim;
  float* zeroed_store = value_store + TILE * t.value_dim;
  float* buffer = zeroed_store + TILE * t.value_dim;
  Tile tile(t, all_lanes, extra, scores + TILE * LANES);

  memset(query, 0, size_t(all_lanes * (depth + t.value_dim)) * sizeof(float));
  for (int64_t lane = 0; lane < lanes; lane++)
    tile.lane((const T*)(t.query + lane / t.rows * t.query_head_bytes + lane % t.rows * t.query_row_bytes), t.source.key, lane,
               buffer, query);
  for (int64_t lane = 0; lane < all_lanes; lane++) peak[lane] = NOTHING, total[lane] = 0.f;
  set_bounds(t, all_lanes, bounds);

  const void *keys[TILE], *values[TILE], *zeroed_values[TILE];
  const char *key_rows[TILE], *value_rows[TILE];
  int places[TILE];
  // Takes in the keys that were found; `sees_from` gives of the panel at a lane which lanes see which of them.
  const auto take = [&](int64_t count, bool all, const auto& sees_from) {
    tile.keys(keys, places, count, t.source.key, key_store, key_rows);
    tile.find_values(values, places, count, t.source.value, value_store);
    const bool nonfinite = careful && !all && !tile.finite_values(values, count, t.value_dim);
    if (nonfinite) zero_nonfinite<Row>(values, count, t.value_dim, zeroed_store, zeroed_values);
    const int64_t cells = tile.values(nonfinite ? zeroed_values : values, count, t.value_dim, value_store, value_rows);
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t at = panel * LANES;
      const auto sees = sees_from(at);
      V factor[PANEL];
      MOACOMPRESS_VECTORS(lanes - at, ({
        tile.template scores<VECS>(key_rows, count, depth, query + at * depth, at, scores);
        softmax_step<VECS>(scores, count, all, sees, t.scaling, t.softcap, peak + at, total + at, factor);
        tile.template weights<VECS>(scores, count, at, factor, sees);
        tile.template mix<VECS>(value_rows, cells, t.value_dim, scores, factor, out + at * t.value_dim);
        if (nonfinite)
          add_nonfinite<Row, VECS>(
              values, count, t.value_dim, [&](int64_t k, int v) { return tile.weight(scores, k, v); },
              [&](int64_t k, int v) { return sees.of(v)(k); }, buffer, out + at * t.value_dim);
      }));
    }
  };
  const int64_t columns = t.source.columns.count();
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int64_t count = smaller(TILE, columns - begin);
    if (!find_rows(t.source, begin, count, keys, values, places)) return false;
    take(count, all_seen(t, begin, begin + count), [&](int64_t at) { return SeesColumns{bounds.from(at), begin}; });
  }
  if (const int64_t transient = t.transient.count()) {
    const int64_t first = tokens_left(t.low, t.rule), last = tokens_left(t.low + t.rows - 1, t.rule);
    for (int64_t lane = 0; lane < all_lanes; lane++)
      left[lane] = lane < lanes ? float(tokens_left(t.low + lane % t.rows, t.rule)) : -1.f;
    int64_t slots[TILE];
    float admitted[TILE], until[TILE];  // seen while so many have left at most
    bool all = true;
    int64_t count = 0;
    for (int64_t i = 0; i < transient; i++) {
      if (t.transient.admitted[i] <= last && t.transient.evicted[i] > first) {
        all = all && t.transient.admitted[i] <= first && t.transient.evicted[i] > last;
        slots[count] = t.transient.slots[i];
        admitted[count] = float(t.transient.admitted[i]);
        until[count++] = float(t.transient.evicted[i] - 1);
      }
      if (!count || (count < TILE && i + 1 < transient)) continue;
      if (!find_slots(t.source, slots, count, keys, values, places)) return false;
      take(count, all, [&](int64_t at) { return SeesTransient{left + at, admitted, until}; });
      all = true;
      count = 0;
    }
  }
  if (!careful && !(all_finite(out, all_lanes * t.value_dim) && tile.finite())) return prefill_with<T, Tile>(t, scratch, true);
  for (int64_t lane = 0; lane < lanes; lane++) {
    const int64_t head = lane / t.rows, row = lane % t.rows;
    float top = peak[lane] * (t.softcap > 0 ? 1.f : t.scaling), sum = total[lane], factor = 1.f;
    if (t.sink_logits) {
      const float logit = t.sink_logits[head], most = logit > top ? logit : top;
      factor = __builtin_expf(top - most);
      sum = sum * factor + __builtin_expf(logit - most);
      top = most;
    }
    t.lse[head * t.lse_head + row] = top + __builtin_logf(sum);
    out_of_lane(out, t.value_dim, lane, factor / sum, buffer, (T*)(t.out + head * t.out_head_bytes + row * t.out_row_bytes),
                t.source.value.format != NATIVE, tile.rest(lane));
  }
  return true;
}

template <class T> bool prefill_tile(const PrefillTile& t, float* scratch) { return prefill_with<T, FloatTile<T>>(t, scratch); }
template <class T> bool prefill_codes_tile(const PrefillTile& t, float* scratch) { return prefill_with<T, CodesTile<T>>(t, scratch); }
#ifdef MOACOMPRESS_DOTS
template <> bool prefill_tile<bf16>(const PrefillTile& t, float* scratch) {
#ifdef MOACOMPRESS_AMX
  if (AmxTile::fits(t)) return prefill_with<bf16, AmxTile>(t, scratch);
#endif
  if (t.head_dim % 2) return prefill_with<bf16, FloatTile<bf16>>(t, scratch);
  return prefill_with<bf16, PairTile>(t, scratch);
}
#endif
#ifdef MOACOMPRESS_AMX
template <> bool prefill_codes_tile<bf16>(const PrefillTile& t, float* scratch) {
  if (!AmxTile::fits(t)) return prefill_with<bf16, CodesTile<bf16>>(t, scratch);
  return prefill_with<bf16, AmxTile>(t, scratch);
}
#endif

// Scores and their gradients' first factor -> weights P and gradients of the scores dS, both in place.
inline void weigh(V& score, V& grad, Mask visible, V lse, V delta, float scaling, float softcap) {
  V slope = set1(scaling), x = score * set1(scaling);
  if (softcap > 0) {
    x = capped(score, scaling, softcap);
    const V share = x * set1(1.f / softcap);
    slope = slope * (set1(1.f) - share * share);
  }
  score = select(visible, exp2((x - lse) * set1(LOG2_E)), zero());
  grad = select(visible, score * (grad - delta) * slope, zero());
}

template <class T> bool backward_query_with(const PrefillTile& t, float* scratch, bool careful) {
  const int64_t lanes = t.group * t.rows, panels = panels_of(lanes), all_lanes = panels * LANES;
  float* query = scratch;
  float* dout = query + all_lanes * t.head_dim;
  float* dquery = dout + all_lanes * t.value_dim;
  float* lse = dquery + all_lanes * t.head_dim;
  float* delta = lse + all_lanes;
  const Bounds bounds = {delta + all_lanes, delta + 2 * all_lanes, delta + 3 * all_lanes, delta + 4 * all_lanes};
  float* scores = delta + 5 * all_lanes;
  float* grads = scores + TILE * LANES;
  float* key_store = grads + TILE * LANES;
  float* value_store = key_store + TILE * t.head_dim;
  float* zeroed_store = value_store + TILE * t.value_dim;
  float* buffer = zeroed_store + TILE * t.head_dim;

  memset(query, 0, size_t(all_lanes * (2 * t.head_dim + t.value_dim + 2)) * sizeof(float));
  for (int64_t lane = 0; lane < lanes; lane++) {
    const int64_t head = lane / t.rows, row = lane % t.rows;
    into_lane((const T*)(t.query + head * t.query_head_bytes + row * t.query_row_bytes), t.head_dim, lane, buffer, query);
    into_lane((const T*)(t.dout + head * t.dout_head_bytes + row * t.dout_row_bytes), t.value_dim, lane, buffer, dout);
    lse[lane] = t.lse[head * t.lse_head + row];
    delta[lane] = t.delta[head * t.lse_head + row];
  }
  set_bounds(t, all_lanes, bounds);

  const void *keys[TILE], *values[TILE];
  const char *key_rows[TILE], *value_rows[TILE], *zeroed_rows[TILE];
  int places[TILE];
  const int64_t columns = t.source.columns.count();
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int64_t count = smaller(TILE, columns - begin);
    if (!find_rows(t.source, begin, count, keys, values, places)) return false;
    as_floats(keys, count, t.head_dim, key_store, (const T*)nullptr, key_rows);
    as_floats(values, count, t.value_dim, value_store, (const T*)nullptr, value_rows);
    const bool nonfinite = careful && !all_seen(t, begin, begin + count) && !all_finite<float>(key_rows, count, t.head_dim);
    if (nonfinite) zero_nonfinite<float>(key_rows, count, t.head_dim, zeroed_store, zeroed_rows);
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t at = panel * LANES;
      const Bounds here = bounds.from(at);
      dots<Float32, PANEL>(key_rows, count, t.head_dim, query + at * t.head_dim, scores);
      dots<Float32, PANEL>(value_rows, count, t.value_dim, dout + at * t.value_dim, grads);
      for (int v = 0; v < PANEL; v++) {
        const int64_t lane = at + v * W;
        const V a = load(bounds.a + lane), b = load(bounds.b + lane), c = load(bounds.c + lane), d = load(bounds.d + lane);
        for (int64_t j = 0; j < count; j++) {
          const int64_t cell = j * LANES + v * W;
          V score = load(scores + cell), grad = load(grads + cell);
          weigh(score, grad, seen(set1(float(begin + j)), a, b, c, d), load(lse + lane), load(delta + lane), t.scaling,
                t.softcap);
          store(grads + cell, grad);
        }
      }
      mix<Float32, PANEL>(nonfinite ? zeroed_rows : key_rows, count, t.head_dim, grads, nullptr, dquery + at * t.head_dim);
      if (nonfinite)
        add_nonfinite<float, PANEL>(
            key_rows, count, t.head_dim, [&](int64_t k, int v) { return load(grads + k * LANES + v * W); },
            [&](int64_t k, int v) { return seen(set1(float(begin + k)), here, v); }, buffer, dquery + at * t.head_dim);
    }
  }
  if (!careful && !all_finite(dquery, all_lanes * t.head_dim)) return backward_query_with<T>(t, scratch, true);
  for (int64_t lane = 0; lane < lanes; lane++)
    out_of_lane(dquery, t.head_dim, lane, 1.f, buffer,
                (T*)(t.out + lane / t.rows * t.out_head_bytes + lane % t.rows * t.out_row_bytes));
  return true;
}

template <class T> bool backward_query_tile(const PrefillTile& t, float* scratch) {
  return backward_query_with<T>(t, scratch, false);
}

template <class T> void backward_key_with(const KeyTile& t, float* scratch, bool careful) {
  const int64_t panels = panels_of(t.count), all_lanes = panels * LANES;
  float* key = scratch;
  float* value = key + all_lanes * t.head_dim;
  float* dkey = value + all_lanes * t.value_dim;
  float* dvalue = dkey + all_lanes * t.head_dim;
  float* scores = dvalue + all_lanes * t.value_dim;
  float* grads = scores + TILE * LANES;
  float* query_store = grads + TILE * LANES;
  float* dout_store = query_store + TILE * t.head_dim;
  float* zeroed_store = dout_store + TILE * t.value_dim;
  float* position = zeroed_store + TILE * (t.head_dim + t.value_dim);
  float* buffer = position + all_lanes;

  memset(key, 0, size_t(all_lanes * 2 * (t.head_dim + t.value_dim)) * sizeof(float));
  for (int64_t lane = 0; lane < t.count; lane++) {
    into_lane((const T*)(t.key + (t.first + lane) * t.key_bytes), t.head_dim, lane, buffer, key);
    into_lane((const T*)(t.value + (t.first + lane) * t.value_bytes), t.value_dim, lane, buffer, value);
  }
  for (int64_t lane = 0; lane < all_lanes; lane++) position[lane] = lane < t.count ? float(t.first + lane) : -1.f;

  const void *queries[TILE], *douts[TILE];
  const char *query_rows[TILE], *dout_rows[TILE], *zeroed_queries[TILE], *zeroed_douts[TILE];
  for (int64_t begin = t.first; begin < t.tokens; begin += TILE) {
    const int64_t count = smaller(TILE, t.tokens - begin), last = t.first + t.count;
    const Columns columns = columns_of(begin + 1, begin + count, t.rule);
    const bool sinks = columns.first < last && t.first < columns.first + columns.head;
    if (!sinks && !(columns.start < last && t.first < columns.end)) continue;
    for (int64_t head = 0; head < t.group; head++) {
      for (int64_t i = 0; i < count; i++) {
        queries[i] = t.query + head * t.query_head_bytes + (begin + i) * t.query_row_bytes;
        douts[i] = t.dout + head * t.dout_head_bytes + (begin + i) * t.dout_row_bytes;
      }
      as_floats(queries, count, t.head_dim, query_store, (const T*)nullptr, query_rows);
      as_floats(douts, count, t.value_dim, dout_store, (const T*)nullptr, dout_rows);
      const bool nonfinite =
          careful && !(all_finite<float>(query_rows, count, t.head_dim) && all_finite<float>(dout_rows, count, t.value_dim));
      if (nonfinite) {
        zero_nonfinite<float>(query_rows, count, t.head_dim, zeroed_store, zeroed_queries);
        zero_nonfinite<float>(dout_rows, count, t.value_dim, zeroed_store + TILE * t.head_dim, zeroed_douts);
      }
      const float *lse = t.lse + head * t.lse_head + begin, *delta = t.delta + head * t.lse_head + begin;
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t at = panel * LANES;
        dots<Float32, PANEL>(query_rows, count, t.head_dim, key + at * t.head_dim, scores);
        dots<Float32, PANEL>(dout_rows, count, t.value_dim, value + at * t.value_dim, grads);
        for (int64_t i = 0; i < count; i++) {
          const int64_t n = begin + i + 1;
          const Visible see = visible(n, t.rule);
          const V a = set1(float(see.first)), b = set1(float(see.sink_end)), c = set1(float(see.start)), d = set1(float(n));
          for (int v = 0; v < PANEL; v++) {
            const int64_t cell = i * LANES + v * W;
            V score = load(scores + cell), grad = load(grads + cell);
            weigh(score, grad, seen(load(position + at + v * W), a, b, c, d), set1(lse[i]), set1(delta[i]), t.scaling,
                  t.softcap);
            store(scores + cell, score);
            store(grads + cell, grad);
          }
        }
        mix<Float32, PANEL>(nonfinite ? zeroed_douts : dout_rows, count, t.value_dim, scores, nullptr, dvalue + at * t.value_dim);
        mix<Float32, PANEL>(nonfinite ? zeroed_queries : query_rows, count, t.head_dim, grads, nullptr, dkey + at * t.head_dim);
        if (!nonfinite) continue;
        const auto sees = [&](int64_t i, int v) {
          const Visible see = visible(begin + i + 1, t.rule);
          return seen(load(position + at + v * W), set1(float(see.first)), set1(float(see.sink_end)), set1(float(see.start)),
                      set1(float(begin + i + 1)));
        };
        const auto of = [](const float* panel) { return [=](int64_t i, int v) { return load(panel + i * LANES + v * W); }; };
        add_nonfinite<float, PANEL>(dout_rows, count, t.value_dim, of(scores), sees, buffer, dvalue + at * t.value_dim);
        add_nonfinite<float, PANEL>(query_rows, count, t.head_dim, of(grads), sees, buffer, dkey + at * t.head_dim);
      }
    }
  }
  if (!careful && !all_finite(dkey, all_lanes * (t.head_dim + t.value_dim))) return backward_key_with<T>(t, scratch, true);
  for (int64_t lane = 0; lane < t.count; lane++) {
    out_of_lane(dkey, t.head_dim, lane, 1.f, buffer, (T*)(t.dkey + (t.first + lane) * t.dkey_bytes));
    out_of_lane(dvalue, t.value_dim, lane, 1.f, buffer, (T*)(t.dvalue + (t.first + lane) * t.dvalue_bytes));
  }
}

template <class T> void backward_key_tile(const KeyTile& t, float* scratch) { backward_key_with<T>(t, scratch, false); }

}  // namespace
}  // namespace moacompress

#include "linear.inl"
#ifdef MOACOMPRESS_AMX
#include "linear_tiles.inl"
#endif
#include "blocks.inl"
#include "profile.inl"

#define MOACOMPRESS_KERNELS(name)                                                                   \
  const Kernels name = {decode_scratch,                                                             \
                        tile_scratch,                                                               \
                        {decode_chunk<float>, decode_chunk<bf16>, decode_chunk<f16>},               \
                        {prefill_tile<float>, prefill_tile<bf16>, prefill_tile<f16>},               \
                        {prefill_codes_tile<float>, prefill_codes_tile<bf16>, prefill_codes_tile<f16>}, \
                        {encode<float>, encode<bf16>, encode<f16>},                                 \
                        hadamard,                                                                   \
                        {backward_query_tile<float>, backward_query_tile<bf16>, backward_query_tile<f16>}, \
                        {backward_key_tile<float>, backward_key_tile<bf16>, backward_key_tile<f16>}, \
                        profile_scratch,                                                            \
                        {profile_tile<float>, profile_tile<bf16>, profile_tile<f16>},               \
                        {narrow<float>, narrow<bf16>, narrow<f16>},                                 \
                        {linear_tile<float>, linear_tile<bf16>, linear_tile<f16>},                  \
                        panel_floats,                                                               \
                        lay_out,                                                                    \
                        linear_tiles,                                                               \
                        block_scratch,                                                              \
                        {linear_blocks_tile<float>, linear_blocks_tile<bf16>, linear_blocks_tile<f16>}, \
                        {expand_blocks_tile<float>, expand_blocks_tile<bf16>, expand_blocks_tile<f16>}, \
                        {rotate_head<float>, rotate_head<bf16>, rotate_head<f16>},                  \
                        {gate_row<float>, gate_row<bf16>, gate_row<f16>},                           \
                        {add_row<float>, add_row<bf16>, add_row<f16>},                              \
                        {norm_row<float>, norm_row<bf16>, norm_row<f16>}}
