// The profile's sweep: an attention layer's backward and, from the same weights, what every candidate rule would move.
//
// A task is some query rows of one KV head and all keys that they see. Tasks of a KV head add to the gradients of the same keys:
// they take turns at each block of keys, oldest rows first, so that sums come out the same for any number of threads without a copy
// of them per thread. A task only ever waits for one that was taken before it, which has a thread already.
#include <atomic>
#include <cfloat>
#include <cstring>
#include <initializer_list>
#include <new>
#include <thread>

#include "tasks.h"

namespace moacompress {
namespace {

int64_t rounded_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Which of the tiles of a KV head may add to each block of keys; one more place is for the sums.
struct Order {
  std::atomic<int64_t>* turns;
  int64_t tile;

  static void wait(void* order, int64_t block) {
    const Order& me = *static_cast<Order*>(order);
    while (me.turns[block].load(std::memory_order_acquire) != me.tile) std::this_thread::yield();
  }
  static void done(void* order, int64_t block) {
    const Order& me = *static_cast<Order*>(order);
    me.turns[block].store(me.tile + 1, std::memory_order_release);
  }
};

// What a row sees under a rule, and what need not be computed for it.
struct Seen {
  int32_t sink_end, start;
  bool first_only;  // nothing of the sinks: they are hidden by the native window or before the tile's keys
  bool full;        // all that the dense model sees
};

// Memory of one task beside the kernel's own, laid out in a thread's scratch memory.
struct Workspace {
  double *seen, *sums;
  LaneSums* lanes;
  Seen* cells;
  ProfileEvent *windows, *sinks;
  int32_t* counts;
  ProfileChoice* selected;
  int32_t* now;
  float *selected_sums, *kernel;
  size_t bytes;

  Workspace(char* base, int64_t streams, int64_t cells_count, int64_t group, int64_t lane_count, int64_t rules, int64_t keys,
            int64_t choosing) {
    size_t used = 0;
    const auto take = [&](int64_t count, size_t size) {
      char* found = base + used;
      used = (used + size_t(count) * size + 63) / 64 * 64;
      return static_cast<void*>(found);
    };
    seen = static_cast<double*>(take(streams * cells_count * group, sizeof(double)));
    sums = static_cast<double*>(take(4 * rules, sizeof(double)));
    lanes = static_cast<LaneSums*>(take(lane_count, sizeof(LaneSums)));
    cells = static_cast<Seen*>(take(cells_count, sizeof(Seen)));
    windows = static_cast<ProfileEvent*>(take(cells_count, sizeof(ProfileEvent)));
    sinks = static_cast<ProfileEvent*>(take(cells_count, sizeof(ProfileEvent)));
    counts = static_cast<int32_t*>(take(keys + 1, sizeof(int32_t)));
    selected = static_cast<ProfileChoice*>(take(choosing, sizeof(ProfileChoice)));
    now = static_cast<int32_t*>(take(choosing ? cells_count : 0, sizeof(int32_t)));
    selected_sums = static_cast<float*>(take(choosing ? streams * rounded_up(lane_count, MOST_LANES) : 0, sizeof(float)));
    kernel = static_cast<float*>(take(0, sizeof(float)));
    bytes = used;
  }
};

struct ProfileJob {
  const ProfileCall& call;
  const Kernels& kernels;
  const int64_t* alive;  // [count] rows with a cotangent, ascending
  int64_t count, rows, tiles, most_keys, blocks, element, native_window;
  float *dkey, *dvalue;         // [kv_heads, blocks * TILE, padded dim]
  std::atomic<int64_t>* turns;  // [kv_heads, blocks + 1]
  int64_t choosing;             // rules that select
  const int32_t* ever;          // [kv_heads, ways, tokens] the keys that are ever selected, in front
  const int64_t* ever_count;    // [kv_heads, ways]

  int64_t streams() const { return call.baselines ? 3 : 2; }
  int64_t key_stride() const { return rounded_up(call.shape.head_dim, PROFILE_PAD); }
  int64_t value_stride() const { return rounded_up(call.shape.value_dim, PROFILE_PAD); }
  Workspace workspace(char* base) const {
    return {base,      streams(),       rows * call.rules.count, call.shape.group, rows * call.shape.group, call.rules.count,
            most_keys, choosing};
  }

  const char* at(const void* base, const Strides& s, int64_t head) const {
    return static_cast<const char*>(base) + head * s.head * element;
  }
  char* at(void* base, const Strides& s, int64_t head) const { return static_cast<char*>(base) + head * s.head * element; }

  // Keys that the rows of a tile see, from the block that holds the oldest one.
  void keys_of(int64_t tile, int64_t& low, int64_t& high) const {
    const int64_t first = alive[tile * rows], last = alive[smaller((tile + 1) * rows, count) - 1];
    low = native_window ? larger(0, first + 1 - native_window) / TILE * TILE : 0;
    high = last + 1;
  }

  // Sorts what is read of the windows newest key first, and of the sinks oldest key first.
  void events(const Workspace& space, ProfileTile& work) const {
    const int64_t keys = work.high - work.low;
    for (int64_t row = 0; row < work.rows; row++) {
      const int64_t n = work.positions[row] + 1;
      for (int64_t rule = 0; rule < call.rules.count; rule++) {
        const Visible see = visible(n, call.rules.of(rule));
        const int64_t left = larger(see.start - see.sink_end, 0);
        space.cells[row * call.rules.count + rule] = {int32_t(see.sink_end), int32_t(see.start),
                                                see.sink_end <= larger(see.first, work.low), kept_of(rule, left) >= left};
      }
    }
    for (const bool sinks : {false, true}) {
      std::memset(space.counts, 0, size_t(keys + 1) * sizeof(int32_t));
      const auto place = [&](const Seen& seen) {
        if (seen.full || (sinks && seen.first_only)) return int64_t(-1);
        return sinks ? seen.sink_end - 1 - work.low : work.high - 1 - seen.start;
      };
      for (int64_t cell = 0; cell < work.cells; cell++) {
        const int64_t to = place(space.cells[cell]);
        if (to >= 0) space.counts[to + 1]++;
      }
      for (int64_t key = 0; key < keys; key++) space.counts[key + 1] += space.counts[key];
      ProfileEvent* events = sinks ? space.sinks : space.windows;
      (sinks ? work.sink_events : work.window_events) = space.counts[keys];
      for (int64_t cell = 0; cell < work.cells; cell++) {
        const Seen& seen = space.cells[cell];
        const int64_t to = place(seen);
        if (to < 0) continue;
        events[space.counts[to]++] = {sinks ? seen.sink_end - 1 : seen.start, int32_t(cell / call.rules.count), int32_t(cell)};
      }
    }
    work.windows = space.windows;
    work.sinks = space.sinks;
  }

  // How many of so many tokens that have left the window a rule keeps; none where it is asked for its windows alone.
  int64_t kept_of(int64_t rule, int64_t left) const {
    return call.choices.of_rule && call.choices.of_rule[rule] >= 0 ? selected_count(left, call.rules.of(rule)) : 0;
  }

  // Says what the rules that select see on the rows of a tile.
  void choices(const Workspace& space, ProfileTile& work, int64_t head) const {
    int64_t found = 0;
    for (int64_t rule = 0; choosing && rule < call.rules.count; rule++) {
      const int64_t way = call.choices.of_rule[rule];
      if (way < 0) continue;
      const int64_t at = head * call.choices.ways + way;
      int32_t* now = space.now + found * work.rows;
      for (int64_t row = 0; row < work.rows; row++) {
        const Seen& seen = space.cells[row * call.rules.count + rule];
        now[row] = int32_t(larger(seen.start - seen.sink_end, 0));
      }
      space.selected[found++] = {rule, call.rules.at(0, rule), call.choices.evicted + at * call.tokens, ever + at * call.tokens,
                               ever_count[at], now};
    }
    work.selected = space.selected;
    work.choices = found;
    work.rules = call.rules.count;
    work.selected_sums = space.selected_sums;
  }

  // Adds what the rows of a tile give to `space.sums`.
  void sum_up(const Workspace& space, const ProfileTile& work) const {
    const int64_t group = work.group, size = work.cells * group, rules = call.rules.count;
    const auto positive = [](double x) { return x < 0 ? 0 : x; };  // NaN stays
    for (int64_t cell = 0; cell < work.cells; cell++) {
      const Seen& seen = space.cells[cell];
      const int64_t row = cell / rules;
      double* sums = space.sums + cell % rules;
      double delta = 0, effect = 0, mass = 0;
      for (int64_t g = 0; g < group; g++) {
        const LaneSums& lane = space.lanes[g * work.rows + row];
        const double* at = work.seen + cell * group + g;
        const double all = lane.mass + lane.escape, smallest = double(FLT_MIN) * all;
        const double share = at[0] + lane.escape;
        delta += (at[size] - lane.escape * lane.delta) / (share < smallest ? smallest : share);
        if (!call.baselines || seen.full) continue;
        effect += positive(lane.effect - at[2 * size]);
        mass += positive(lane.mass - at[0]) / all;
      }
      if (!seen.full) {
        sums[0] += delta * delta;
        sums[rules] += delta;
      }
      if (call.baselines) {
        sums[2 * rules] += effect;
        sums[3 * rules] += mass / double(group);
      }
    }
  }

  Status run(int64_t index, float* scratch) const {
    // tiles come in their order: one waits for those before it, and no thread may hold a later one alone
    const Shape& shape = call.shape;
    const int64_t tile = index / shape.kv_heads, head = index % shape.kv_heads, group = shape.group;
    const Workspace space = workspace(reinterpret_cast<char*>(scratch));
    Order order = {turns + head * (blocks + 1), tile};
    ProfileTile work = {};
    work.group = group;
    work.rows = smaller(rows, count - tile * rows);
    work.head_dim = shape.head_dim;
    work.value_dim = shape.value_dim;
    work.positions = alive + tile * rows;
    keys_of(tile, work.low, work.high);
    work.native_window = native_window;
    work.scaling = call.scores.scaling;
    work.softcap = call.scores.softcap;
    work.sink_logits = call.scores.sink_logits ? call.scores.sink_logits + head * group : nullptr;
    work.query = at(call.query, call.query_at, head * group);
    work.key = at(call.key, call.key_at, head);
    work.value = at(call.value, call.value_at, head);
    work.dout = at(call.dout, call.dout_at, head * group);
    work.query_head_bytes = call.query_at.head * element;
    work.query_row_bytes = call.query_at.token * element;
    work.key_bytes = call.key_at.token * element;
    work.value_bytes = call.value_at.token * element;
    work.dout_head_bytes = call.dout_at.head * element;
    work.dout_row_bytes = call.dout_at.token * element;
    work.dquery = at(call.dquery, call.dquery_at, head * group);
    work.dquery_head_bytes = call.dquery_at.head * element;
    work.dquery_row_bytes = call.dquery_at.token * element;
    work.dkey = dkey + head * blocks * TILE * key_stride();
    work.dvalue = dvalue + head * blocks * TILE * value_stride();
    work.lag = call.lag;
    work.of_tokens = call.of_tokens ? call.of_tokens + head * call.tokens : nullptr;
    work.streams = int(streams());
    work.cells = work.rows * call.rules.count;
    work.seen = space.seen;
    work.lane_sums = space.lanes;
    work.order = &order;
    work.wait = Order::wait;
    work.done = Order::done;
    std::memset(space.seen, 0, size_t(streams() * work.cells * group) * sizeof(double));
    std::memset(space.sums, 0, size_t(4 * call.rules.count) * sizeof(double));
    events(space, work);
    choices(space, work, head);
    kernels.profile[shape.dtype](work, space.kernel);
    sum_up(space, work);
    Order::wait(&order, blocks);
    for (int64_t kind = 0; kind < (call.baselines ? 4 : 2); kind++)
      for (int64_t rule = 0; rule < call.rules.count; rule++)
        call.sums[(kind * shape.kv_heads + head) * call.rules.count + rule] += space.sums[kind * call.rules.count + rule];
    Order::done(&order, blocks);
    return OK;
  }

  // Writes the gradients of a block of keys in the call's dtype.
  Status write(int64_t index) const {
    const Shape& shape = call.shape;
    const int64_t head = index / blocks, first = index % blocks * TILE;
    for (int64_t token = first; token < smaller(first + TILE, call.tokens); token++) {
      const int64_t row = head * blocks * TILE + token;
      kernels.narrow[shape.dtype](dkey + row * key_stride(), shape.head_dim,
                                  at(call.dkey, call.dkey_at, head) + token * call.dkey_at.token * element);
      kernels.narrow[shape.dtype](dvalue + row * value_stride(), shape.value_dim,
                                  at(call.dvalue, call.dvalue_at, head) + token * call.dvalue_at.token * element);
    }
    return OK;
  }
};

// Whether a row of numbers has one that is not zero, of either sign.
bool any(const void* row, int64_t count, DType dtype) {
  if (dtype == F32) {
    for (int64_t i = 0; i < count; i++)
      if (static_cast<const float*>(row)[i] != 0) return true;
  } else {
    for (int64_t i = 0; i < count; i++)
      if (static_cast<const uint16_t*>(row)[i] & 0x7fff) return true;
  }
  return false;
}

}  // namespace

Status profile(const ProfileCall& call, const Parallel& parallel, Isa isa) {
  const Shape& shape = call.shape;
  const int64_t heads = shape.kv_heads * shape.group, element = int64_t(element_size(shape.dtype));
  const Buffer<int64_t> alive(static_cast<size_t>(call.tokens));
  if (!alive.get()) return NO_MEMORY;
  int64_t count = 0;
  for (int64_t token = 0; token < call.tokens; token++) {
    bool found = false;
    for (int64_t head = 0; head < heads && !found; head++)
      found = any(static_cast<const char*>(call.dout) + (head * call.dout_at.head + token * call.dout_at.token) * element,
                  shape.value_dim, shape.dtype);
    if (found) alive[size_t(count++)] = token;
    for (int64_t head = 0; head < heads && !found; head++)
      std::memset(static_cast<char*>(call.dquery) + (head * call.dquery_at.head + token * call.dquery_at.token) * element, 0,
                  size_t(shape.head_dim * element));
  }
  *call.alive = count;
  const int64_t rows = smaller(larger(PROFILE_LANES / shape.group, 1), larger(count, 1)), tiles = (count + rows - 1) / rows;
  const int64_t blocks = (call.tokens + TILE - 1) / TILE;
  const int64_t native_window = call.rules.of(0).native_window;
  ProfileJob job = {call, kernels_of(isa), alive.get(), count, rows, tiles, 0, blocks, element, native_window, nullptr, nullptr, nullptr,
                    0, nullptr, nullptr};
  const size_t key_floats = size_t(shape.kv_heads * blocks * TILE * job.key_stride());
  const size_t value_floats = size_t(shape.kv_heads * blocks * TILE * job.value_stride());
  const Buffer<float> dkey(key_floats), dvalue(value_floats);
  const Buffer<std::atomic<int64_t>> turns(size_t(shape.kv_heads * (blocks + 1)));
  if (!dkey.get() || !dvalue.get() || !turns.get()) return NO_MEMORY;
  std::memset(dkey.get(), 0, key_floats * sizeof(float));
  std::memset(dvalue.get(), 0, value_floats * sizeof(float));
  for (int64_t i = 0; i < shape.kv_heads * (blocks + 1); i++) new (&turns[size_t(i)]) std::atomic<int64_t>(0);
  for (int64_t tile = tiles - 1; tile >= 0; tile--) {  // the first tile that sees a block has the first turn
    int64_t low, high;
    job.keys_of(tile, low, high);
    job.most_keys = larger(job.most_keys, rounded_up(high - low, TILE));
    for (int64_t head = 0; head < shape.kv_heads; head++)
      for (int64_t block = low / TILE; block * TILE < high; block++) turns[size_t(head * (blocks + 1) + block)].store(tile);
  }
  const int64_t every = call.choices.of_rule ? shape.kv_heads * call.choices.ways : 0;
  const Buffer<int32_t> ever(size_t(every * call.tokens));
  const Buffer<int64_t> ever_count(static_cast<size_t>(every));
  if (!ever.get() || !ever_count.get()) return NO_MEMORY;
  if (call.choices.of_rule) {
    std::memset(ever_count.get(), 0, size_t(every) * sizeof(int64_t));
    for (int64_t rule = 0; rule < call.rules.count; rule++) {
      const int64_t way = call.choices.of_rule[rule], sink = call.rules.at(0, rule);
      job.choosing += way >= 0;
      for (int64_t head = 0; way >= 0 && head < shape.kv_heads; head++) {
        const int64_t at = head * call.choices.ways + way;
        if (ever_count[size_t(at)]) continue;  // another rule selects the same
        for (int64_t key = sink; key < call.tokens; key++)
          if (call.choices.evicted[at * call.tokens + key] > key - sink + 1) ever[size_t(at * call.tokens + ever_count[size_t(at)]++)] = int32_t(key);
      }
    }
    job.ever = ever.get();
    job.ever_count = ever_count.get();
  }
  std::memset(call.sums, 0, size_t((call.baselines ? 4 : 2) * shape.kv_heads * call.rules.count) * sizeof(double));
  if (call.of_tokens) std::memset(call.of_tokens, 0, size_t(shape.kv_heads * call.tokens) * sizeof(double));
  job.dkey = dkey.get();
  job.dvalue = dvalue.get();
  job.turns = turns.get();
  char nowhere;
  const size_t own = job.workspace(&nowhere).bytes / sizeof(float);
  const size_t floats = own + job.kernels.profile_scratch(shape.group * rows, shape.head_dim, shape.value_dim, job.most_keys);
  const Status status =
      run_tasks(parallel, tiles * shape.kv_heads, floats, [&](int64_t i, float* at) { return job.run(i, at); });
  if (status != OK) return status;
  return run_tasks(parallel, blocks * shape.kv_heads, 0, [&](int64_t i, float*) { return job.write(i); });
}

}  // namespace moacompress
