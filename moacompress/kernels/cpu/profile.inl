// The profile's sweep, written over the vectors of a vec_*.h and included by kernels.inl.
//
// A tile keeps the logits and dO V^T of its lanes and all their keys in scratch memory, so that five matrix products make all
// gradients. Weights are relative to the lane's largest logit: p = exp(logit - peak), and what is divided by their sum is the small
// side of each product. Sums over keys run from the newest key outward, and carry their rounding errors along: a window that holds
// 1e-6 of the probability, or leaves so much out, keeps its digits.

namespace moacompress {
namespace {

inline int64_t padded_dim(int64_t dim) { return (dim + PROFILE_PAD - 1) / PROFILE_PAD * PROFILE_PAD; }

// sum + rest += x, exact up to the rounding of `rest` (Knuth's two-sum).
inline void add_exactly(V& sum, V& rest, V x) {
  const V now = sum + x, added = now - sum;
  rest = rest + ((sum - (now - added)) + (x - added));
  sum = now;
}

// to[r][column] += sum over lanes of from[r][lane] * rows[lane][column], for ROWS keys and VECS vectors of columns.
template <int ROWS, int VECS>
inline void add_products(const float* from, int64_t panels, const float* rows, int64_t stride, float* to) {
  V sums[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) sums[r][v] = load(to + r * stride + v * W);
  for (int64_t panel = 0; panel < panels; panel++, from += TILE * LANES)
    for (int64_t lane = 0; lane < LANES; lane++, rows += stride) {
      V b[VECS];
      for (int v = 0; v < VECS; v++) b[v] = load(rows + v * W);
      for (int r = 0; r < ROWS; r++) {
        const V a = set1(from[r * LANES + lane]);
        for (int v = 0; v < VECS; v++) sums[r][v] = fma(a, b[v], sums[r][v]);
      }
    }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECS; v++) store(to + r * stride + v * W, sums[r][v]);
}
template <int VECS>
inline void add_columns(const float* from, int64_t count, int64_t panels, const float* rows, int64_t stride, float* to) {
  int64_t r = 0;
  for (; r + 4 < count; r += 6) add_products<6, VECS>(from + r * LANES, panels, rows, stride, to + r * stride);
  if (r + 2 < count) add_products<4, VECS>(from + r * LANES, panels, rows, stride, to + r * stride);
  else if (r < count) add_products<2, VECS>(from + r * LANES, panels, rows, stride, to + r * stride);
}
// The same for `count` keys, rounded up to a multiple of four, and all columns.
inline void add_all_products(const float* from, int64_t count, int64_t panels, const float* rows, int64_t stride, float* to) {
  int64_t c = 0;
  for (; c + LANES <= stride; c += LANES) add_columns<PANEL>(from, count, panels, rows + c, stride, to + c);
  for (; c + 2 * W <= stride; c += 2 * W) add_columns<2>(from, count, panels, rows + c, stride, to + c);
  for (; c < stride; c += W) add_columns<1>(from, count, panels, rows + c, stride, to + c);
}

constexpr int STREAMS = 3;  // what is summed over keys: p, p (G - D), and MoA's |E|

// Scratch memory of a tile; all but the whole rows of logits and pulls has the size of a tile.
struct ProfileScratch {
  float *query, *dout, *dquery;   // [panels, dim, LANES]
  float *query_rows, *dout_rows;  // [lanes, padded dim]
  float *peak, *inverse, *delta, *first, *end;  // [lanes]
  float *total, *pulled;          // [2, lanes] sum and rest: of the weights, and of them times G
  float *running;                 // [STREAMS, 2, lanes]
  float *logits, *pulls;          // [panels, keys, LANES]
  float *weights, *grads, *effects;  // [panels, TILE, LANES]
  float *key_store, *value_store, *zeroed_store, *buffer;
  int64_t floats;

  ProfileScratch(float* base, int64_t lanes, int64_t head_dim, int64_t value_dim, int64_t keys) {
    float* at = base;
    const auto take = [&](int64_t count) {
      float* found = at;
      at += (count + 15) / 16 * 16;
      return found;
    };
    const int64_t panels = panels_of(lanes), all = panels * LANES;
    query = take(all * head_dim), dout = take(all * value_dim), dquery = take(all * head_dim);
    query_rows = take(all * padded_dim(head_dim)), dout_rows = take(all * padded_dim(value_dim));
    peak = take(all), inverse = take(all), delta = take(all);
    first = take(all), end = take(all);
    total = take(2 * all), pulled = take(2 * all), running = take(2 * STREAMS * all);
    logits = take(all * keys), pulls = take(all * keys);
    weights = take(all * TILE), grads = take(all * TILE), effects = take(all * TILE);
    key_store = take(TILE * head_dim), value_store = take(TILE * value_dim), zeroed_store = take(TILE * head_dim);
    buffer = take(larger(head_dim, value_dim) + 2 * W);
    floats = at - base;
  }
};

size_t profile_scratch(int64_t lanes, int64_t head_dim, int64_t value_dim, int64_t keys) {
  float none;
  return size_t(ProfileScratch(&none, lanes, head_dim, value_dim, keys).floats);
}

// Pointers to the rows [begin, begin + count) of a KV head, and those rows as float32.
template <class T>
inline void float_rows(const char* base, int64_t bytes, int64_t begin, int64_t count, int64_t dim, float* space, const char** to) {
  const void* from[TILE];
  for (int64_t i = 0; i < count; i++) from[i] = base + (begin + i) * bytes;
  as_floats(from, count, dim, space, (const T*)nullptr, to);
}

// Whether the dense model lets every row see the keys [begin, begin + count).
inline bool all_dense(const ProfileTile& t, int64_t begin, int64_t count) {
  const int64_t oldest = t.positions[0], newest = t.positions[t.rows - 1];
  return begin + count <= oldest + 1 && (t.native_window == 0 || begin > newest - t.native_window);
}
// Whether the dense model lets each lane see a key.
inline Mask in_dense(const ProfileScratch& s, int64_t lane, V column) {
  return both(at_least(column, load(s.first + lane)), at_least(load(s.end + lane) - set1(1.f), column));
}

// Logits as the softmax takes them, G beside them (zero where the dense model sees nothing), and the largest logit of every lane.
template <class T> void profile_scores(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t keys) {
  const char *key_rows[TILE], *value_rows[TILE];
  for (int64_t begin = t.low + keys - TILE; begin >= t.low; begin -= TILE) {
    const int64_t count = smaller(TILE, t.high - begin);
    const bool all = all_dense(t, begin, count);
    float_rows<T>(t.key, t.key_bytes, begin, count, t.head_dim, s.key_store, key_rows);
    float_rows<T>(t.value, t.value_bytes, begin, count, t.value_dim, s.value_store, value_rows);
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t at = panel * LANES;
      float *logits = s.logits + at * keys + (begin - t.low) * LANES, *pulls = s.pulls + at * keys + (begin - t.low) * LANES;
      dots<Float32, PANEL>(key_rows, count, t.head_dim, s.query + at * t.head_dim, logits);
      dots<Float32, PANEL>(value_rows, count, t.value_dim, s.dout + at * t.value_dim, pulls);
      for (int v = 0; v < PANEL; v++) {
        V peak = load(s.peak + at + v * W);
        for (int64_t j = 0; j < count; j++) {
          float* cell = logits + j * LANES + v * W;
          V x = load(cell);
          if (t.softcap > 0) x = capped(x, 1.f, t.softcap);
          if (!all) {
            const Mask mask = in_dense(s, at + v * W, set1(float(begin + j)));
            float* pull = pulls + j * LANES + v * W;
            x = select(mask, x, set1(-__builtin_inff()));
            store(pull, select(mask, load(pull), zero()));
          }
          if (t.softcap > 0 || !all) store(cell, x);
          peak = max(x, peak);  // NaN is passed over: its weight will be NaN
        }
        store(s.peak + at + v * W, peak);
      }
    }
  }
}

inline V weight_of(V logit, V peak) { return exp2((logit - peak) * set1(LOG2_E)); }

// Sums of the weights and of weights times G.
void profile_totals(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t keys) {
  const int64_t all_lanes = panels * LANES;
  memset(s.total, 0, size_t(s.running - s.total) * sizeof(float));
  // oldest keys first: their logits were the last to be made, the newest are the first to be read again
  for (int64_t begin = t.low; begin < t.high; begin += TILE)
    for (int64_t panel = 0; panel < panels; panel++)
      for (int v = 0; v < PANEL; v++) {
        const int64_t lane = panel * LANES + v * W, at = (panel * keys + begin - t.low) * LANES + v * W;
        const int64_t count = smaller(TILE, t.high - begin);
        const V peak = load(s.peak + lane);
        V total = load(s.total + lane), total_rest = load(s.total + all_lanes + lane);
        V pulled = load(s.pulled + lane), pulled_rest = load(s.pulled + all_lanes + lane);
        for (int64_t j = 0; j < count; j++) {
          const V p = weight_of(load(s.logits + at + j * LANES), peak);
          add_exactly(total, total_rest, p);
          add_exactly(pulled, pulled_rest, p * load(s.pulls + at + j * LANES));
        }
        store(s.total + lane, total);
        store(s.total + all_lanes + lane, total_rest);
        store(s.pulled + lane, pulled);
        store(s.pulled + all_lanes + lane, pulled_rest);
      }
}

// Of the keys [begin, begin + count): the weights p, p (G - D), and |E| where it is asked for.
void profile_weights(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t keys, int64_t begin, int64_t count) {
  const bool all = all_dense(t, begin, count);
  for (int64_t panel = 0; panel < panels; panel++)
    for (int v = 0; v < PANEL; v++) {
      const int64_t lane = panel * LANES + v * W, at = (panel * keys + begin - t.low) * LANES + v * W;
      const int64_t to = panel * TILE * LANES + v * W;
      const V peak = load(s.peak + lane), delta = load(s.delta + lane), inverse = load(s.inverse + lane);
      for (int64_t j = 0; j < count; j++) {
        const V p = weight_of(load(s.logits + at + j * LANES), peak);
        V c = p * (load(s.pulls + at + j * LANES) - delta);
        if (!all) c = select(in_dense(s, lane, set1(float(begin + j))), c, zero());  // D may be NaN
        store(s.weights + to + j * LANES, p);
        store(s.grads + to + j * LANES, c);
        if (t.streams > 2) {
          const V alone = max(set1(1.f) - p * inverse, set1(1.1920929e-7f)), effect = c * inverse / alone;
          store(s.effects + to + j * LANES, max(effect, zero() - effect));
        }
      }
      for (int64_t j = count; j % 4; j++) store(s.weights + to + j * LANES, zero()), store(s.grads + to + j * LANES, zero());
    }
}

// Of the keys [begin, begin + count): the sum over the rows that are `lag` tokens or more behind of the square of what the key
// alone would move, sum over heads of p (G - D).
void profile_tokens(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t begin, int64_t count, double* to) {
  for (int64_t j = 0; j < count; j++) {
    for (int64_t at = 0; at < panels * LANES; at += W) {
      const float* cells = s.grads + (at / LANES * TILE + j) * LANES + at % LANES;
      store(s.effects + at, load(cells) * load(s.inverse + at));  // lanes side by side
    }
    V sums = zero();
    for (int64_t row = 0; row < t.rows; row += W) {
      const int part = int(smaller(t.rows - row, W));
      V moved = zero();
      for (int64_t head = 0; head < t.group; head++) moved = moved + load_part(s.effects + head * t.rows + row, part);
      moved = select(at_least(load_part(s.end + row, part), set1(float(begin + j + t.lag + 1))), moved, zero());
      sums = fma(moved, moved, sums);
    }
    to[j] = double(sum(sums));
  }
}

// Adds the cells [from, end) of the block to the running sums, in steps of `step` (1 or -1).
void profile_run(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t from, int64_t end, int64_t step) {
  const int64_t all_lanes = panels * LANES;
  const float* of[STREAMS] = {s.weights, s.grads, s.effects};
  for (int64_t panel = 0; panel < panels; panel++)
    for (int stream = 0; stream < t.streams; stream++) {
      float* running = s.running + stream * 2 * all_lanes + panel * LANES;
      const float* cells = of[stream] + panel * TILE * LANES;
      V sum[PANEL], rest[PANEL];
      for (int v = 0; v < PANEL; v++) sum[v] = load(running + v * W), rest[v] = load(running + all_lanes + v * W);
      for (int64_t j = from; j != end; j += step)
        for (int v = 0; v < PANEL; v++) add_exactly(sum[v], rest[v], load(cells + j * LANES + v * W));
      for (int v = 0; v < PANEL; v++) store(running + v * W, sum[v]), store(running + all_lanes + v * W, rest[v]);
    }
}

inline double running_sum(const ProfileScratch& s, int stream, int64_t all_lanes, int64_t lane) {
  const float* at = s.running + stream * 2 * all_lanes + lane;
  return double(at[0]) + double(at[all_lanes]);
}

// Adds the running sums to what the event's rule sees.
inline void record(const ProfileTile& t, const ProfileScratch& s, int64_t all_lanes, const ProfileEvent& event) {
  for (int stream = 0; stream < t.streams; stream++)
    for (int64_t head = 0; head < t.group; head++)
      t.seen[(stream * t.cells + event.cell) * t.group + head] +=
          running_sum(s, stream, all_lanes, head * t.rows + event.row);
}

// Where the first of ascending numbers is that is at least `x`.
inline int64_t first_at_least(const int32_t* numbers, int64_t count, int32_t x) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (numbers[middle] < x) low = middle + 1;
    else count = middle;
  }
  return low;
}

// Adds to what rules see the keys [begin, begin + count) that they select.
static_assert(LANES <= MOST_LANES, "sums of what is selected need more memory");
void profile_selected(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t begin, int64_t count) {
  const float* of[STREAMS] = {s.weights, s.grads, s.effects};
  for (int64_t i = 0; i < t.choices; i++) {
    const ProfileChoice& rule = t.selected[i];
    if (t.positions[t.rows - 1] < begin || rule.now[t.rows - 1] <= begin - rule.sink) continue;
    memset(t.selected_sums, 0, size_t(t.streams * panels * LANES) * sizeof(float));
    bool any = false;
    for (int64_t at = first_at_least(rule.ever, rule.count, int32_t(begin)); at < rule.count && rule.ever[at] < begin + count; at++) {
      const int32_t* key = rule.ever + at;
      const int64_t first = first_at_least(rule.now, t.rows, int32_t(*key - rule.sink + 1));
      const int64_t last = first_at_least(rule.now, t.rows, rule.evicted[*key]);
      if (first >= last) continue;
      any = true;
      for (int stream = 0; stream < t.streams; stream++)
        for (int64_t head = 0; head < t.group; head++)
          for (int64_t lane = head * t.rows + first; lane < head * t.rows + last;) {
            const int64_t stop = smaller(head * t.rows + last, (lane / LANES + 1) * LANES);
            const float* cells = of[stream] + (lane / LANES * TILE + *key - begin) * LANES + lane % LANES;
            float* to = t.selected_sums + stream * panels * LANES + lane;
            for (; lane + W <= stop; lane += W, cells += W, to += W) store(to, load(to) + load(cells));
            const int rest = int(stop - lane);
            if (rest) store_part(to, load_part(to, rest) + load_part(cells, rest), rest);
            lane = stop;
          }
    }
    for (int64_t stream = 0; any && stream < t.streams; stream++)
      for (int64_t head = 0; head < t.group; head++)
        for (int64_t row = 0; row < t.rows; row++)
          t.seen[(stream * t.cells + row * t.rules + rule.rule) * t.group + head] +=
              double(t.selected_sums[stream * panels * LANES + head * t.rows + row]);
  }
}

// p (G - D) -> gradients of the logits before their soft cap, in place.
void profile_gradients(const ProfileTile& t, const ProfileScratch& s, int64_t panels, int64_t keys, int64_t begin, int64_t count) {
  for (int64_t panel = 0; panel < panels; panel++)
    for (int v = 0; v < PANEL; v++) {
      const int64_t at = (panel * keys + begin - t.low) * LANES + v * W;
      float* grads = s.grads + panel * TILE * LANES + v * W;
      for (int64_t j = 0; j < count; j++) {
        const V share = load(s.logits + at + j * LANES) * set1(1.f / t.softcap);
        // what is not seen has a weight of zero and a logit of minus infinity
        const V c = load(grads + j * LANES) * (set1(1.f) - share * share);
        store(grads + j * LANES, select(not_below(share, set1(-2.f)), c, zero()));
      }
    }
}

// Adds to the keys [begin, begin + count) what `zero_nonfinite` has left out of the products of `from` with the lanes' rows: what
// lies in `panels`, times the lane's share.
void add_nonfinite_products(const ProfileTile& t, const ProfileScratch& s, const float* from, const float* panels, int64_t begin,
                       int64_t count, int64_t dim, int64_t stride, float* to) {
  for (int64_t lane = 0; lane < t.group * t.rows; lane++)
    for (int64_t d = 0; d < dim; d++) {
      const float x = panels[(lane / LANES * dim + d) * LANES + lane % LANES] * s.inverse[lane];
      if (x - x == 0) continue;
      for (int64_t j = 0; j < count; j++) {
        const float key = float(begin + j);
        if (key >= s.first[lane] && key < s.end[lane])
          to[j * stride + d] += from[(lane / LANES * TILE + j) * LANES + lane % LANES] * x;
      }
    }
}

template <class T> void profile_tile(const ProfileTile& t, float* scratch) {
  const int64_t lanes = t.group * t.rows, panels = panels_of(lanes), all_lanes = panels * LANES;
  const int64_t keys = (t.high - t.low + TILE - 1) / TILE * TILE;
  const int64_t query_stride = padded_dim(t.head_dim), dout_stride = padded_dim(t.value_dim);
  const ProfileScratch s(scratch, lanes, t.head_dim, t.value_dim, keys);

  memset(s.query, 0, size_t(s.peak - s.query) * sizeof(float));
  for (int64_t lane = 0; lane < lanes; lane++) {
    const int64_t head = lane / t.rows, position = t.positions[lane % t.rows];
    into_lane((const T*)(t.query + head * t.query_head_bytes + position * t.query_row_bytes), t.head_dim, lane, s.buffer, s.query);
    into_lane((const T*)(t.dout + head * t.dout_head_bytes + position * t.dout_row_bytes), t.value_dim, lane, s.buffer, s.dout);
  }
  for (int64_t i = 0; i < all_lanes * t.head_dim; i++) s.query[i] *= t.scaling;
  for (int64_t lane = 0; lane < all_lanes; lane++) {
    const bool real = lane < lanes;
    const int64_t n = real ? t.positions[lane % t.rows] + 1 : 0;
    s.peak[lane] = real && t.sink_logits ? t.sink_logits[lane / t.rows] : NOTHING;
    s.first[lane] = float(t.native_window ? larger(n - t.native_window, 0) : 0), s.end[lane] = float(n);
  }

  profile_scores<T>(t, s, panels, keys);
  profile_totals(t, s, panels, keys);
  for (int64_t lane = 0; lane < all_lanes; lane++) {
    const bool real = lane < lanes;
    const double escape = real && t.sink_logits ? double(__builtin_expf(t.sink_logits[lane / t.rows] - s.peak[lane])) : 0;
    const double mass = double(s.total[lane]) + double(s.total[all_lanes + lane]);
    const double pulled = double(s.pulled[lane]) + double(s.pulled[all_lanes + lane]);
    s.inverse[lane] = real ? float(1 / (mass + escape)) : 0.f;
    s.delta[lane] = real ? float(pulled / (mass + escape)) : 0.f;
    if (!real) continue;
    LaneSums& sums = t.lane_sums[lane];
    sums.escape = escape;
    sums.delta = double(s.delta[lane]);
    sums.mass = mass;
  }
  memset(s.query_rows, 0, size_t(s.peak - s.query_rows) * sizeof(float));
  for (int64_t lane = 0; lane < lanes; lane++) {
    const int64_t head = lane / t.rows, position = t.positions[lane % t.rows];
    const float share = s.inverse[lane];
    float *query = s.query_rows + lane * query_stride, *dout = s.dout_rows + lane * dout_stride;
    widen_row((const T*)(t.query + head * t.query_head_bytes + position * t.query_row_bytes), t.head_dim, query);
    widen_row((const T*)(t.dout + head * t.dout_head_bytes + position * t.dout_row_bytes), t.value_dim, dout);
    for (int64_t d = 0; d < t.head_dim; d++) query[d] = query[d] * t.scaling * share;
    for (int64_t d = 0; d < t.value_dim; d++) dout[d] *= share;
  }
  const auto zeroed = [](float* at, int64_t count) {  // in place; returns whether anything was not finite
    const float* rows = at;
    const bool nonfinite = !all_finite(rows, count);
    if (nonfinite) zero_nonfinite<float>(&rows, 1, count, at, &rows);
    return nonfinite;
  };
  const bool nonfinite_queries = zeroed(s.query_rows, lanes * query_stride), nonfinite_douts = zeroed(s.dout_rows, lanes * dout_stride);

  // newest keys first: an event of key j takes what is summed once j is in
  memset(s.running, 0, size_t(2 * STREAMS * all_lanes) * sizeof(float));
  const char *key_rows[TILE], *zeroed_rows[TILE];
  const ProfileEvent *event = t.windows, *events_end = t.windows + t.window_events;
  for (int64_t begin = t.low + keys - TILE; begin >= t.low; begin -= TILE) {
    const int64_t count = smaller(TILE, t.high - begin);
    profile_weights(t, s, panels, keys, begin, count);
    if (t.choices) profile_selected(t, s, panels, begin, count);
    for (int64_t j = count - 1; j >= 0;) {
      const int64_t next = event < events_end && event->key >= begin ? event->key - begin : 0;
      profile_run(t, s, panels, j, next - 1, -1);
      for (; event < events_end && event->key == begin + next; event++) record(t, s, all_lanes, *event);
      j = next - 1;
    }
    double of_tokens[TILE];
    if (t.of_tokens) profile_tokens(t, s, panels, begin, count, of_tokens);  // `effects` are done with
    if (t.softcap > 0) profile_gradients(t, s, panels, keys, begin, count);
    float_rows<T>(t.key, t.key_bytes, begin, count, t.head_dim, s.key_store, key_rows);
    const bool nonfinite_keys = !all_finite<float>(key_rows, count, t.head_dim);
    if (nonfinite_keys) zero_nonfinite<float>(key_rows, count, t.head_dim, s.zeroed_store, zeroed_rows);
    for (int64_t panel = 0; panel < panels; panel++) {
      const float* grads = s.grads + panel * TILE * LANES;
      float* dquery = s.dquery + panel * LANES * t.head_dim;
      mix<Float32, PANEL>(nonfinite_keys ? zeroed_rows : key_rows, count, t.head_dim, grads, nullptr, dquery);
      if (nonfinite_keys)
        add_nonfinite<float, PANEL>(
            key_rows, count, t.head_dim, [&](int64_t k, int v) { return load(grads + k * LANES + v * W); },
            [&](int64_t k, int v) { return in_dense(s, panel * LANES + v * W, set1(float(begin + k))); }, s.buffer, dquery);
    }
    float *dkey = t.dkey + begin * query_stride, *dvalue = t.dvalue + begin * dout_stride;
    t.wait(t.order, begin / TILE);
    for (int64_t j = 0; t.of_tokens && j < count; j++) t.of_tokens[begin + j] += of_tokens[j];
    add_all_products(s.grads, count, panels, s.query_rows, query_stride, dkey);
    add_all_products(s.weights, count, panels, s.dout_rows, dout_stride, dvalue);
    if (nonfinite_queries) add_nonfinite_products(t, s, s.grads, s.query, begin, count, t.head_dim, query_stride, dkey);
    if (nonfinite_douts) add_nonfinite_products(t, s, s.weights, s.dout, begin, count, t.value_dim, dout_stride, dvalue);
    t.done(t.order, begin / TILE);
  }
  for (int64_t lane = 0; lane < lanes && t.streams > 2; lane++) t.lane_sums[lane].effect = running_sum(s, 2, all_lanes, lane);

  // sinks, oldest keys first
  memset(s.running, 0, size_t(2 * STREAMS * all_lanes) * sizeof(float));
  event = t.sinks, events_end = t.sinks + t.sink_events;
  for (int64_t begin = t.low; event < events_end; begin += TILE) {
    const int64_t count = smaller(TILE, t.high - begin);
    profile_weights(t, s, panels, keys, begin, count);
    for (int64_t j = 0; j < count && event < events_end;) {
      const int64_t next = smaller(event->key - begin + 1, count);
      profile_run(t, s, panels, j, next, 1);
      for (; event < events_end && event->key == begin + next - 1; event++) record(t, s, all_lanes, *event);
      j = next;
    }
  }

  for (int64_t lane = 0; lane < lanes; lane++) {
    T* to = (T*)(t.dquery + lane / t.rows * t.dquery_head_bytes + t.positions[lane % t.rows] * t.dquery_row_bytes);
    out_of_lane(s.dquery, t.head_dim, lane, t.scaling * s.inverse[lane], s.buffer, to);
  }
}

template <class T> void narrow(const float* from, int64_t count, void* to) { narrow_row(from, count, (T*)to); }

}  // namespace
}  // namespace moacompress
