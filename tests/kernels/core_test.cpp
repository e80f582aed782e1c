// The kernels' core without torch, against a plain sum in double precision. Built with the address and undefined-behaviour
// sanitizers: every tensor is its own allocation of its exact size, and what no query sees is NaN. In every other test one number
// of what is seen is NaN too: so must be what is made of it, and nothing else.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../moacompress/kernels/cpu/tasks.h"

using namespace moacompress;

namespace {

std::mt19937 random_source(7);

int64_t pick(int64_t low, int64_t high) { return low + int64_t(random_source() % uint32_t(high - low + 1)); }
int64_t pick_of(std::vector<int64_t> of) { return of[size_t(pick(0, int64_t(of.size()) - 1))]; }

// The columns of a table of random rules.
std::vector<int64_t> random_rules(int64_t count, int64_t min_window, int64_t native_window) {
  std::vector<int64_t> columns(static_cast<size_t>(RULE_NUMBERS * count));
  for (int64_t i = 0; i < count; i++) {
    const int64_t numbers[] = {pick_of({4, 16, 64}), pick_of({0, 20, 64, 1000}), pick_of({0, 100, 600, 1024}), min_window, native_window,
                               NATIVE, NATIVE, pick_of({0, 30}), pick_of({0, 90})};
    for (int64_t number = 0; number < RULE_NUMBERS; number++) columns[size_t(number * count + i)] = numbers[number];
  }
  return columns;
}

// Numbers that all three dtypes hold exactly, so that one double-precision result fits them all.
double number() { return double(pick(-12, 12)) / 8; }

struct Data {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[]> bytes;
  Data(DType d, int64_t n) : dtype(d), count(n), bytes(new char[size_t(n) * element_size(d)]) {
    for (int64_t i = 0; i < n; i++) set(i, NAN);
  }
  void set(int64_t i, double x) {
    const float f = float(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t half = uint16_t(bits >> 16);
    if (dtype == F32) {
      std::memcpy(bytes.get() + 4 * i, &f, 4);
      return;
    }
    if (dtype == F16) half = std::isnan(x) ? 0x7e00 : x == 0 ? 0 : uint16_t((half & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
    std::memcpy(bytes.get() + 2 * i, &half, 2);
  }
  double get(int64_t i) const {
    uint32_t bits = 0;
    uint16_t half;
    float f;
    if (dtype == F32) std::memcpy(&bits, bytes.get() + 4 * i, 4);
    else {
      std::memcpy(&half, bytes.get() + 2 * i, 2);
      if (dtype == BF16) bits = uint32_t(half) << 16;
      else {
        const double sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, rest = half & 1023;
        if (exponent == 31) return NAN;
        return sign * (exponent > 0 ? std::ldexp(1024 + rest, int(exponent) - 25) : std::ldexp(rest, -24));
      }
    }
    std::memcpy(&f, &bits, 4);
    return f;
  }
};

void run_threads(void*, int threads, void (*body)(void*), void* arg) {
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; i++) pool.emplace_back(body, arg);
  for (std::thread& thread : pool) thread.join();
}

int failures = 0;

void near(double found, double wanted, double tolerance, const char* what, int isa, int dtype) {
  if (std::isnan(wanted) ? std::isnan(found) : std::isinf(wanted) ? found == wanted : std::fabs(found - wanted) <= tolerance) return;
  if (failures++ < 10) std::printf("%s, %s, dtype %d: %g instead of %g\n", what, isa_name(Isa(isa)), dtype, found, wanted);
}

// Makes NaN of a number of one of the tensors, or of none; returns whether it did.
bool spoil(std::vector<Data*> tensors) {
  Data& data = *tensors[size_t(pick(0, int64_t(tensors.size()) - 1))];
  if (data.count == 0 || pick(0, 1)) return false;
  data.set(pick(0, data.count - 1), NAN);
  return true;
}

// One (row, KV head, query) by the definitions: out[value_dim], then lse.
template <class Key, class Value>
std::vector<double> plain(const double* query, int64_t dim, int64_t value_dim, int64_t n, const Rule& rule, const Scores& scores,
                          int64_t head, Key key, Value value) {
  const Visible see = visible(n, rule);
  std::vector<double> out(size_t(value_dim) + 1, 0.0);
  double total = scores.sink_logits ? std::exp(double(scores.sink_logits[head])) : 0;
  for (int64_t j = 0; j < n; j++) {
    if (!((j >= see.first && j < see.sink_end) || j >= see.start)) continue;
    double x = 0;
    for (int64_t d = 0; d < dim; d++) x += query[d] * key(j, d);
    x *= scores.scaling;
    if (scores.softcap > 0) x = scores.softcap * std::tanh(x / scores.softcap);
    total += std::exp(x);
    for (int64_t d = 0; d < value_dim; d++) out[size_t(d)] += std::exp(x) * value(j, d);
  }
  for (int64_t d = 0; d < value_dim; d++) out[size_t(d)] /= total;
  out[size_t(value_dim)] = std::log(total);
  return out;
}

void test(Isa isa, DType dtype) {
  const double tolerance = dtype == F32 ? 2e-5 : dtype == F16 ? 3e-3 : 3e-2;
  const int64_t rows = pick(1, 3), kv_heads = pick(1, 2), group = pick_of({1, 2, 3, 5}), heads = kv_heads * group;
  const int64_t dim = pick_of({16, 24, 40, 64, 80, 13, 128}), value_dim = pick_of({16, 24, 64, 72, 9, 128});
  const int64_t tokens = pick_of({1, 3, 17, 70});
  std::vector<int64_t> past, valid;
  int64_t longest = 0;
  for (int64_t r = 0; r < rows; r++) {
    past.push_back(pick_of({0, 1, 15, 16, 40, 100, 300}));
    valid.push_back(pick(0, tokens));
    longest = larger(longest, past.back());
  }
  std::vector<float> logits;
  for (int64_t h = 0; h < heads; h++) logits.push_back(float(number()));
  const std::vector<int64_t> columns = random_rules(kv_heads, pick_of({1, 16, 32}), pick_of({0, 0, 5, 50}));
  const RuleTable rules = {columns.data(), kv_heads};
  const Scores scores = {0.25f, float(pick_of({0, 0, 3})), pick(0, 1) ? logits.data() : nullptr};
  const Shape shape = {dtype, rows, kv_heads, group, dim, value_dim};

  // the pool in two segments; every block of every (row, KV head) has an id, in random order
  const int64_t width = (longest + BLOCK - 1) / BLOCK + 1, blocks = rows * kv_heads * width, cut = blocks / 3;
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (size_t i = 0; i < table.size(); i++) table[i] = int32_t(i);
  std::shuffle(table.begin(), table.end(), random_source);
  Data k0(dtype, cut * BLOCK * dim), k1(dtype, (blocks - cut) * BLOCK * dim);
  Data v0(dtype, cut * BLOCK * value_dim), v1(dtype, (blocks - cut) * BLOCK * value_dim);
  const auto cell = [&](Data& a, Data& b, int64_t pair, int64_t j, int64_t size, int64_t d, double* set) {
    const int64_t id = table[size_t(pair * width + j / BLOCK)];
    Data& segment = id < cut ? a : b;
    const int64_t at = ((id < cut ? id : id - cut) * BLOCK + j % BLOCK) * size + d;
    if (set) segment.set(at, *set);
    return segment.get(at);
  };
  for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
    const int64_t n = past[size_t(pair / kv_heads)];
    // what decode sees, and what the first query of a chunk sees or a later one
    for (int64_t j = 0; j < n; j++) {
      const Visible a = visible(n, rules.of(pair % kv_heads)), b = visible(n + 1, rules.of(pair % kv_heads));
      if (!((j >= a.first && j < larger(a.sink_end, b.sink_end)) || j >= smaller(a.start, b.start))) continue;
      for (int64_t d = 0; d < larger(dim, value_dim); d++) {
        double x = number();
        if (d < dim) cell(k0, k1, pair, j, dim, d, &x);
        x = number();
        if (d < value_dim) cell(v0, v1, pair, j, value_dim, d, &x);
      }
    }
  }
  const void *key_base[] = {k0.bytes.get(), k1.bytes.get()}, *value_base[] = {v0.bytes.get(), v1.bytes.get()};
  const int64_t element = int64_t(element_size(dtype)), first_block[] = {0, cut, blocks};
  const int64_t key_stride[] = {BLOCK * dim * element, BLOCK * dim * element};
  const int64_t value_stride[] = {BLOCK * value_dim * element, BLOCK * value_dim * element};
  const Pool keys = {2, key_base, key_stride, key_stride, first_block};
  const Pool values = {2, value_base, value_stride, value_stride, first_block};

  Data query(dtype, rows * heads * tokens * dim), key(dtype, rows * kv_heads * tokens * dim);
  Data value(dtype, rows * kv_heads * tokens * value_dim), out(dtype, rows * heads * tokens * value_dim);
  for (int64_t i = 0; i < query.count; i++) query.set(i, number());
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < kv_heads; h++)
      for (int64_t t = 0; t < valid[size_t(r)]; t++) {
        for (int64_t d = 0; d < dim; d++) key.set(((r * kv_heads + h) * tokens + t) * dim + d, number());
        for (int64_t d = 0; d < value_dim; d++) value.set(((r * kv_heads + h) * tokens + t) * value_dim + d, number());
      }
  const bool spoilt = spoil({&query, &key, &value});
  std::unique_ptr<float[]> lse(new float[size_t(rows * heads * tokens)]);
  const Parallel parallel = {int(pick(1, 5)), run_threads, nullptr};
  const auto strides = [&](int64_t count, int64_t size) { return Strides{count * tokens * size, tokens * size, size}; };
  PrefillCall call = {shape,  rules, scores, tokens, query.bytes.get(), key.bytes.get(), value.bytes.get(),
                      strides(heads, dim), strides(kv_heads, dim), strides(kv_heads, value_dim), keys, values,
                      {table.data(), width}, past.data(), valid.data(), out.bytes.get(), strides(heads, value_dim), lse.get()};
  if (prefill(call, parallel, isa) != OK) failures++, std::printf("prefill failed\n");
  std::vector<double> q(static_cast<size_t>(dim));
  const auto compare = [&](const Data& found, const float* found_lse, int64_t at, const std::vector<double>& wanted, const char* what) {
    for (int64_t d = 0; d < value_dim; d++) near(found.get(at * value_dim + d), wanted[size_t(d)], tolerance, what, isa, dtype);
    near(found_lse[at], wanted[size_t(value_dim)], 1e-4, what, isa, dtype);
  };
  std::vector<double> nothing(size_t(value_dim) + 1, 0.0);
  nothing.back() = -INFINITY;
  for (int64_t lane = 0; lane < rows * heads * tokens; lane++) {
    const int64_t r = lane / tokens / heads, h = lane / tokens % heads, t = lane % tokens, pair = r * kv_heads + h / group;
    for (int64_t d = 0; d < dim; d++) q[size_t(d)] = query.get(lane * dim + d);
    const int64_t before = past[size_t(r)];
    const auto from = [&](Data& a, Data& b, const Data& chunk, int64_t size) {
      return [&, size, pair, before](int64_t j, int64_t d) {
        return j < before ? cell(a, b, pair, j, size, d, nullptr) : chunk.get((pair * tokens + j - before) * size + d);
      };
    };
    compare(out, lse.get(), lane,
            t < valid[size_t(r)] ? plain(q.data(), dim, value_dim, before + t + 1, rules.of(h / group), scores, h,
                                         from(k0, k1, key, dim), from(v0, v1, value, value_dim))
                                 : nothing,
            "prefill");
  }

  // with selected tokens: that it stays inside its memory; Python's tests compare its numbers
  std::vector<int64_t> begins = {0}, slots;
  for (int64_t pair = 0; pair < rows * kv_heads; pair++) {
    const int64_t last = past[size_t(pair / kv_heads)] - 1;  // a token that every query of the cache's end sees
    if (last >= 0) slots.push_back(table[size_t(pair * width + last / BLOCK)] * BLOCK + last % BLOCK);
    for (int64_t t = 0; t < valid[size_t(pair / kv_heads)]; t++)
      if (pick(0, 2)) slots.push_back(-1 - t);
    begins.push_back(int64_t(slots.size()));
  }
  std::vector<int64_t> places(slots.size()), given(slots.size()), positions(slots.size()), admitted(slots.size()), evicted(slots.size());
  for (size_t i = 0; i < slots.size(); i++) {
    given[i] = pick(-9, 9);
    admitted[i] = pick(-1, 40);
    positions[i] = pick(-1, 5);
  }
  std::vector<int64_t> selects(size_t(RULE_NUMBERS), 0);
  selects[size_t(RULE_NUMBERS) - 2] = pick(0, 9);
  selects[size_t(RULE_NUMBERS) - 1] = pick(0, 200);
  const EvictionSchedule competing = {begins.data(), positions.data(), admitted.data(), evicted.data(), places.data()};
  if (eviction_schedule(competing, rows * kv_heads, {selects.data(), 1}, given.data()) != OK)
    failures++, std::printf("eviction_schedule failed\n");
  const TransientTokens transient = {begins.data(), slots.data(), admitted.data(), evicted.data()};
  call.transient = &transient;
  if (prefill(call, parallel, isa) != OK) failures++, std::printf("prefill with selected tokens failed\n");
  call.transient = nullptr;

  DecodeCall one = {shape, rules, scores, query.bytes.get(), heads * tokens * dim, tokens * dim, keys, values,
                    {table.data(), width}, past.data(), nullptr, nullptr, nullptr, nullptr};
  Data small(dtype, rows * heads * value_dim);
  std::unique_ptr<float[]> small_lse(new float[size_t(rows * heads)]);
  one.out = small.bytes.get();
  one.lse = small_lse.get();
  if (decode(one, parallel, isa) != OK) failures++, std::printf("decode failed\n");
  for (int64_t lane = 0; lane < rows * heads; lane++) {
    const int64_t r = lane / heads, h = lane % heads, pair = r * kv_heads + h / group;
    for (int64_t d = 0; d < dim; d++) q[size_t(d)] = query.get(lane * tokens * dim + d);
    const auto from = [&](Data& a, Data& b, int64_t size) {
      return [&, size, pair](int64_t j, int64_t d) { return cell(a, b, pair, j, size, d, nullptr); };
    };
    compare(small, small_lse.get(), lane,
            past[size_t(r)] ? plain(q.data(), dim, value_dim, past[size_t(r)], rules.of(h / group), scores, h, from(k0, k1, dim),
                                    from(v0, v1, value_dim))
                            : nothing,
            "decode");
  }

  // the backward: that it stays inside its memory and writes all of it; Python's tests compare its numbers
  Data dout(dtype, rows * heads * tokens * value_dim), dquery(dtype, query.count), dkey(dtype, key.count), dvalue(dtype, value.count);
  for (int64_t i = 0; i < dout.count; i++) dout.set(i, number());
  std::vector<int64_t> none(static_cast<size_t>(rows), 0);
  call.past = none.data();
  if (prefill(call, parallel, isa) != OK) failures++, std::printf("prefill without cache failed\n");
  std::unique_ptr<float[]> delta(new float[size_t(rows * heads * tokens)]);
  for (int64_t i = 0; i < rows * heads * tokens; i++) delta[size_t(i)] = float(number());
  const BackwardCall back = {shape, rules, scores, tokens, query.bytes.get(), key.bytes.get(), value.bytes.get(),
                             dout.bytes.get(), strides(heads, dim), strides(kv_heads, dim), strides(kv_heads, value_dim),
                             strides(heads, value_dim), valid.data(), lse.get(), delta.get(), dquery.bytes.get(),
                             dkey.bytes.get(), dvalue.bytes.get(), strides(heads, dim), strides(kv_heads, dim),
                             strides(kv_heads, value_dim)};
  if (backward(back, parallel, isa) != OK) failures++, std::printf("backward failed\n");
  for (const Data* data : {&dquery, &dkey, &dvalue})
    for (int64_t i = 0; i < data->count; i++)
      if (!spoilt && std::isnan(data->get(i)) && failures++ < 10) std::printf("backward left NaN, %s\n", isa_name(isa));

  // a table without the blocks is refused, not read
  for (int32_t& id : table) id = pick(0, 1) ? -1 : int32_t(blocks);
  call.past = past.data();
  bool needed = false;
  for (int64_t r = 0; r < rows; r++) needed = needed || past[size_t(r)] > 0;
  const Status wanted = needed ? MISSING_BLOCK : OK;
  if (decode(one, parallel, isa) != wanted) failures++, std::printf("decode took a missing block\n");
}

// The profile's sweep of one sample against the definitions: what each rule's output moves along the cotangent, and that gradients
// are finite and zero where they must be. Python's tests compare the gradients.
void test_profile(Isa isa, DType dtype) {
  const int64_t kv_heads = pick(1, 3), group = pick_of({1, 2, 3, 5}), heads = kv_heads * group, tokens = pick_of({1, 2, 17, 70, 150});
  const int64_t dim = pick_of({16, 24, 40, 64, 80, 13}), value_dim = pick_of({16, 24, 64, 9, 72}), rules = pick(1, 9);
  const int64_t native = pick_of({0, 0, 5, 50}), min_window = pick_of({1, 16, 32});
  const std::vector<int64_t> columns = random_rules(rules, min_window, native);
  const RuleTable asked = {columns.data(), rules};
  std::vector<float> logits;
  for (int64_t h = 0; h < heads; h++) logits.push_back(float(number()));
  const Scores scores = {0.25f, float(pick_of({0, 0, 3})), pick(0, 1) ? logits.data() : nullptr};
  const bool baselines = pick(0, 1);
  Data query(dtype, heads * tokens * dim), key(dtype, kv_heads * tokens * dim), value(dtype, kv_heads * tokens * value_dim);
  Data dout(dtype, heads * tokens * value_dim), dquery(dtype, query.count), dkey(dtype, key.count), dvalue(dtype, value.count);
  for (Data* data : {&query, &key, &value, &dout})
    for (int64_t i = 0; i < data->count; i++) data->set(i, number());
  std::vector<bool> silent;
  for (int64_t t = 0; t < tokens; t++) {
    silent.push_back(pick(0, 3) == 0);
    for (int64_t i = 0; silent.back() && i < heads * value_dim; i++)
      dout.set(((i / value_dim) * tokens + t) * value_dim + i % value_dim, i % 2 ? 0.0 : -0.0);
  }
  const bool spoilt = spoil({&query, &key, &value, &dout});
  for (int64_t i = 0; i < dout.count; i++)
    if (std::isnan(dout.get(i))) silent[size_t(i / value_dim % tokens)] = false;
  const int64_t kinds = baselines ? 4 : 2;
  std::unique_ptr<double[]> sums(new double[size_t(kinds * kv_heads * rules)]);
  std::unique_ptr<double[]> of_tokens(new double[size_t(kv_heads * tokens)]);
  std::unique_ptr<int64_t> alive(new int64_t(-1));
  const auto strides = [&](int64_t count, int64_t size) { return Strides{count * tokens * size, tokens * size, size}; };
  const Shape shape = {dtype, 1, kv_heads, group, dim, value_dim};
  const ProfileCall call = {shape, asked, scores, tokens, query.bytes.get(), key.bytes.get(), value.bytes.get(), dout.bytes.get(),
                            strides(heads, dim), strides(kv_heads, dim), strides(kv_heads, value_dim), strides(heads, value_dim),
                            dquery.bytes.get(), dkey.bytes.get(), dvalue.bytes.get(), strides(heads, dim), strides(kv_heads, dim),
                            strides(kv_heads, value_dim), baselines, sums.get(), pick(0, 40),
                            pick(0, 1) ? of_tokens.get() : nullptr, alive.get(),
                            {0, nullptr, nullptr}};
  const Parallel parallel = {int(pick(1, 5)), run_threads, nullptr};
  if (profile(call, parallel, isa) != OK) failures++, std::printf("profile failed\n");
  for (const Data* data : {&dquery, &dkey, &dvalue})
    for (int64_t i = 0; i < data->count; i++)
      if (!spoilt && std::isnan(data->get(i)) && failures++ < 10) std::printf("profile left NaN, %s\n", isa_name(isa));

  std::vector<double> squares(static_cast<size_t>(kv_heads * rules), 0.0), total = squares, size = squares;
  std::vector<double> q(static_cast<size_t>(dim));
  const Rule full = {0, 0, 1024, 1, native, NATIVE, NATIVE};
  int64_t rows = 0;
  for (int64_t t = 0; t < tokens; t++) {
    rows += !silent[size_t(t)];
    for (int64_t h = 0; h < kv_heads && !silent[size_t(t)]; h++)
      for (int64_t r = 0; r < rules; r++) {
        const Visible then = visible(t + 1, asked.of(r));
        if (then.sink_end >= then.start) continue;
        double delta = 0;
        for (int64_t g = h * group; g < (h + 1) * group; g++) {
          for (int64_t d = 0; d < dim; d++) q[size_t(d)] = query.get((g * tokens + t) * dim + d);
          const auto moved = [&](const Rule& rule) {
            const std::vector<double> out = plain(
                q.data(), dim, value_dim, t + 1, rule, scores, g,
                [&](int64_t j, int64_t d) { return key.get((h * tokens + j) * dim + d); },
                [&](int64_t j, int64_t d) { return value.get((h * tokens + j) * value_dim + d); });
            double along = 0;
            for (int64_t d = 0; d < value_dim; d++) along += out[size_t(d)] * dout.get((g * tokens + t) * value_dim + d);
            return along;
          };
          delta += moved(asked.of(r)) - moved(full);
        }
        squares[size_t(h * rules + r)] += delta * delta;
        total[size_t(h * rules + r)] += delta;
        size[size_t(h * rules + r)] += std::fabs(delta);
      }
  }
  if (*alive != rows && failures++ < 10) std::printf("profile saw %ld rows, not %ld\n", long(*alive), long(rows));
  for (int64_t i = 0; i < kv_heads * rules; i++) {
    near(sums[size_t(i)], squares[size_t(i)], 1e-4 * squares[size_t(i)] + 1e-8, "profile's squares", isa, dtype);
    near(sums[size_t(kv_heads * rules + i)], total[size_t(i)], 1e-5 * size[size_t(i)] + 1e-4, "profile's total", isa, dtype);
  }
}

// Many single tokens into a cache of two segments that begins empty: it stays inside its memory, every token that a later query sees
// is where the table says, blocks are counted as often as they are named, and a pool or a table that is too small changes nothing.
void test_advance(Isa isa, DType dtype) {
  const int64_t rows = pick(1, 3), kv_heads = pick(1, 3), pairs = rows * kv_heads, dim = pick(1, 9), value_dim = pick(1, 20);
  const int64_t steps = pick(1, 200), width = (steps + BLOCK - 1) / BLOCK, blocks = pairs * width, cut = blocks / 3;
  std::vector<int64_t> lengths(static_cast<size_t>(rows), 0), runs(static_cast<size_t>(2 * RUNS * pairs), 0);
  const std::vector<int64_t> columns = random_rules(kv_heads, pick_of({1, 16, 32}), pick_of({0, 0, 5, 50}));
  const RuleTable rules = {columns.data(), kv_heads};
  std::vector<int32_t> table(static_cast<size_t>(pairs * width), -1), refs(static_cast<size_t>(blocks), 0);
  Data k0(dtype, cut * BLOCK * dim), k1(dtype, (blocks - cut) * BLOCK * dim);
  Data v0(dtype, cut * BLOCK * value_dim), v1(dtype, (blocks - cut) * BLOCK * value_dim);
  const void *key_base[] = {k0.bytes.get(), k1.bytes.get()}, *value_base[] = {v0.bytes.get(), v1.bytes.get()};
  const int64_t element = int64_t(element_size(dtype)), first_block[] = {0, cut, blocks};
  const int64_t key_stride[] = {BLOCK * dim * element, BLOCK * dim * element};
  const int64_t value_stride[] = {BLOCK * value_dim * element, BLOCK * value_dim * element};
  Data key(dtype, pairs * dim), value(dtype, pairs * value_dim);
  AdvanceCall call = {{dtype, rows, kv_heads, 1, dim, value_dim}, rules, pick_of({0, 0, 20}), key.bytes.get(), value.bytes.get(),
                      {kv_heads * dim, dim, dim}, {kv_heads * value_dim, value_dim, value_dim},
                      {2, key_base, key_stride, key_stride, first_block}, {2, value_base, value_stride, value_stride, first_block},
                      table.data(), width,
                      lengths.data(), runs.data(), refs.data(), blocks, 0, nullptr, nullptr};
  const auto number_of = [](int64_t pair, int64_t j, int64_t d) { return double((pair * 31 + j * 7 + d * 3) % 97 - 48) / 8; };
  const auto fail = [](const char* what) {
    if (failures++ < 10) std::printf("advance: %s\n", what);
  };
  const auto advanced = [&] {
    Missing missing;
    return advance(call, isa, missing) == OK ? missing.blocks : -2;
  };
  std::fill(refs.begin(), refs.end(), 1);
  if (advanced() != pairs || lengths[0] != 0) fail("a full pool was written to");
  std::fill(refs.begin(), refs.end(), 0);
  for (int64_t n = 1; n <= steps; n++) {
    for (int64_t pair = 0; pair < pairs; pair++) {
      for (int64_t d = 0; d < dim; d++) key.set(pair * dim + d, number_of(pair, n - 1, d));
      for (int64_t d = 0; d < value_dim; d++) value.set(pair * value_dim + d, number_of(pair, n - 1, d + 50));
    }
    if (advanced() != 0 || lengths[0] != n) fail("a token was not taken");
    std::vector<int32_t> named(static_cast<size_t>(blocks), 0);
    for (const int32_t id : table)
      if (id >= 0) named[size_t(id)]++;
    if (named != refs) fail("blocks are not counted as they are named");
    for (int64_t pair = 0; pair < pairs; pair++) {
      const Visible see = visible(n, rules.of(pair % kv_heads));
      for (int64_t j = 0; j < n; j++) {
        if (!((j >= see.first && j < see.sink_end) || j >= see.start)) continue;
        const int32_t id = table[size_t(pair * width + j / BLOCK)];
        if (id < 0) {
          fail("a block that is seen is gone");
          continue;
        }
        const int64_t at = (id < cut ? id : id - cut) * BLOCK + j % BLOCK;
        for (int64_t d = 0; d < dim; d++)
          if ((id < cut ? k0 : k1).get(at * dim + d) != number_of(pair, j, d)) fail("a key is not where it should be");
        for (int64_t d = 0; d < value_dim; d++)
          if ((id < cut ? v0 : v1).get(at * value_dim + d) != number_of(pair, j, d + 50)) fail("a value is not where it should be");
      }
    }
  }
  for (int64_t& n : lengths) n = width * BLOCK;
  if (advanced() != TABLE_TOO_NARROW || lengths[0] != width * BLOCK) fail("a token went beyond the table");
}

// What a token's codes stand for, by the words of docs/formats.md, in the basis that it came in.
std::vector<double> meant(const char* at, const KVPart& kv_part, int64_t place) {
  const auto half_number = [](const char* from) {
    Data one(F16, 1);
    std::memcpy(one.bytes.get(), from, 2);
    return one.get(0);
  };
  const double scale = half_number(at + kv_part.scales + 2 * place), zero = half_number(at + kv_part.zeros + 2 * place);
  const auto* codes = reinterpret_cast<const unsigned char*>(at);
  const auto byte = [&](int64_t i) {
    return int(codes[kv_part.side == KEYS ? i / 4 * 64 + place * 4 + i % 4 : place / 4 * 4 * kv_part.token_bytes + i * 4 + place % 4]);
  };
  const int64_t first = (kv_part.dim + 1) / 2, row = (kv_part.dim + 15) / 16 * 4, block = kv_part.dim & -kv_part.dim;
  std::vector<double> turned, found(static_cast<size_t>(kv_part.dim), 0.0);
  for (int64_t d = 0; d < kv_part.dim; d++) {
    int code = 0;
    if (kv_part.format == INT8) code = byte(d);
    else if (kv_part.format == INT4) code = d < first ? byte(d) & 15 : byte(d - first) >> 4;
    else if (d < 3 * row) code = byte(d) & 63;
    else for (int64_t k = 0; k < 3; k++) code |= byte(k * row + d - 3 * row) >> 6 << 2 * k;
    turned.push_back(scale * code + zero);
  }
  for (int64_t d = 0; d < kv_part.dim; d++)
    for (int64_t e = d / block * block; e < (d / block + 1) * block; e++)
      found[size_t(d)] += (__builtin_popcountll(size_t((d % block) & (e % block))) % 2 ? -1 : 1) * turned[size_t(e)] / std::sqrt(double(block));
  return found;
}

// Single tokens into a cache with formats, as many blocks of each KV head's formats in a segment of their exact size; then decode and prefill
// against what the codes stand for, which is near what was fed. A second layer copies attention: its values lie in value sets beside the
// first one's, a value set for each of its KV heads that reads the same head.
void test_codes(Isa isa, DType dtype) {
  const int64_t rows = pick(1, 2), kv_heads = pick(1, 3), pairs = rows * kv_heads, group = pick_of({1, 2, 3, 5}), heads = kv_heads * group;
  const int64_t dim = pick_of({16, 24, 40, 64, 80, 13, 128}), value_dim = pick_of({16, 24, 64, 72, 9, 128});
  const int64_t steps = pick(1, 90), tokens = pick_of({1, 3, 17, 70}), width = (steps + BLOCK - 1) / BLOCK, each = rows * width;
  const int64_t element = int64_t(element_size(dtype));
  std::vector<int64_t> columns = random_rules(kv_heads, pick_of({1, 16, 32}), pick_of({0, 0, 5, 50}));
  for (int64_t i = 5 * kv_heads; i < 7 * kv_heads; i++) columns[size_t(i)] = pick(0, FORMATS - 1);
  const RuleTable rules = {columns.data(), kv_heads};
  const Shape shape = {dtype, rows, kv_heads, group, dim, value_dim};
  struct Side {
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<const void*> base;
    std::vector<int64_t> bytes, first{0};
    std::vector<KVPart> kv_parts;
    Pool pool() const { return {int64_t(base.size()), base.data(), bytes.data(), bytes.data(), first.data()}; }
  } sides[2];
  for (int64_t head = 0; head < kv_heads; head++)
    for (int64_t side = 0; side < 2; side++) {
      Side& to = sides[side];
      to.kv_parts.push_back(kv_part_of(side ? rules.of(head).value_format : rules.of(head).key_format, side ? value_dim : dim, element, side));
      const int64_t bytes = to.kv_parts.back().bytes;
      to.memory.emplace_back(new char[size_t(each * bytes)]);
      std::memset(to.memory.back().get(), 0xff, size_t(each * bytes));
      to.base.push_back(to.memory.back().get());
      to.bytes.push_back(bytes);
      to.first.push_back(to.first.back() + each);
    }
  std::vector<int64_t> head_map, value_set_of, reuse_columns(columns);
  for (int64_t head = 0; head < kv_heads; head++) {
    const int64_t of = pick(0, kv_heads - 1);
    value_set_of.push_back(std::count(head_map.begin(), head_map.end(), of));
    head_map.push_back(of);
    for (int64_t i = 0; i < 6; i++) reuse_columns[size_t(i * kv_heads + head)] = columns[size_t(i * kv_heads + of)];
    reuse_columns[size_t(6 * kv_heads + head)] = pick(0, FORMATS - 1);
  }
  const RuleTable reuse_rules = {reuse_columns.data(), kv_heads};
  std::vector<int64_t> shared_value_bytes(static_cast<size_t>(kv_heads * kv_heads), 0);
  for (int64_t head = 0; head < kv_heads; head++)
    shared_value_bytes[size_t(head_map[size_t(head)] * kv_heads + value_set_of[size_t(head)])] =
        kv_part_of(reuse_rules.of(head).value_format, value_dim, element, VALUES).bytes;
  std::vector<Side> value_sets(static_cast<size_t>(kv_heads));
  std::vector<Pool> shared_values, reuse_values;
  for (int64_t value_set = 0; value_set < kv_heads; value_set++) {
    Side& to = value_sets[size_t(value_set)];
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t bytes = shared_value_bytes[size_t(head * kv_heads + value_set)];
      to.memory.emplace_back(bytes ? new char[size_t(each * bytes)] : nullptr);
      if (bytes) std::memset(to.memory.back().get(), 0xff, size_t(each * bytes));
      to.base.push_back(to.memory.back().get());
      to.bytes.push_back(bytes);
      to.first.push_back(to.first.back() + each);
    }
    shared_values.push_back(to.pool());
  }
  for (const int64_t value_set : value_set_of) reuse_values.push_back(value_sets[size_t(value_set)].pool());
  std::vector<int64_t> lengths(static_cast<size_t>(rows), 0), runs(static_cast<size_t>(2 * RUNS * pairs), 0);
  std::vector<int32_t> table(static_cast<size_t>(pairs * width), -1), refs(static_cast<size_t>(kv_heads * each), 0);
  Data key(dtype, pairs * tokens * dim), value(dtype, pairs * tokens * value_dim), query(dtype, rows * heads * tokens * dim);
  const auto strides = [&](int64_t count, int64_t size) { return Strides{count * tokens * size, tokens * size, size}; };
  const auto renew = [&](int64_t at) {  // the numbers of one token of the chunk
    for (int64_t pair = 0; pair < pairs; pair++) {
      for (int64_t d = 0; d < dim; d++) key.set((pair * tokens + at) * dim + d, number());
      for (int64_t d = 0; d < value_dim; d++) value.set((pair * tokens + at) * value_dim + d, number());
    }
  };
  AdvanceCall call = {shape, rules, 0, key.bytes.get(), value.bytes.get(), strides(kv_heads, dim), strides(kv_heads, value_dim),
                      sides[0].pool(), sides[1].pool(), table.data(), width, lengths.data(), runs.data(), refs.data(), kv_heads * each,
                      kv_heads, shared_values.data(), shared_value_bytes.data()};
  const SharedValuesCall reuse_call = {shape, reuse_rules, value.bytes.get(), strides(kv_heads, value_dim), head_map.data(), reuse_values.data(),
                                {table.data(), width}, lengths.data()};
  const auto fail = [&](const char* what) {
    if (failures++ < 10) std::printf("codes, %s, dtype %d: %s\n", isa_name(isa), dtype, what);
  };
  const auto in_pool = [&](const Side& pool, const KVPart& kv_part, int64_t pair, int64_t j) {  // a token as it is kept
    const int32_t id = table[size_t(pair * width + j / BLOCK)];
    if (id < 0 || id >= kv_heads * each || pool.bytes[size_t(id / each)] != kv_part.bytes) {
      fail("a block is not of the formats of its head");
      return std::vector<double>(static_cast<size_t>(kv_part.dim), 0.0);
    }
    const char* at = pool.memory[size_t(id / each)].get() + id % each * kv_part.bytes;
    if (kv_part.format != NATIVE) return meant(at, kv_part, j % BLOCK);
    Data copy(dtype, kv_part.dim);
    std::memcpy(copy.bytes.get(), at + j % BLOCK * kv_part.token_bytes, size_t(kv_part.token_bytes));
    std::vector<double> found;
    for (int64_t d = 0; d < kv_part.dim; d++) found.push_back(copy.get(d));
    return found;
  };
  const auto token = [&](int64_t side, int64_t pair, int64_t j) {
    return in_pool(sides[side], sides[side].kv_parts[size_t(pair % kv_heads)], pair, j);
  };
  for (int64_t n = 1; n <= steps; n++) {
    renew(0);
    Missing missing;
    if (advance(call, isa, missing) != OK || missing.blocks != 0) fail("a token was not taken");
    for (int64_t i = 0; i < value.count && n > 1; i++)
      if (i / value_dim % tokens == 0) value.set(i, number());  // those of the other layer
    if (put_shared_values(reuse_call, isa) != OK) fail("a token was not put beside another");
    for (int64_t pair = 0; pair < pairs; pair++) {
      const std::vector<double> k = token(0, pair, n - 1);
      const int64_t format = sides[0].kv_parts[size_t(pair % kv_heads)].format;
      const double bound = format == INT4 ? 0.8 : format == INT6 ? 0.2 : 0.06;  // of numbers in [-1.5, 1.5]
      for (int64_t d = 0; d < dim; d++)
        near(k[size_t(d)], key.get(pair * tokens * dim + d), bound * std::sqrt(double(dim & -dim)), "a key's codes", isa, dtype);
    }
  }
  for (int64_t t = 0; t < tokens; t++) renew(t);
  for (int64_t i = 0; i < query.count; i++) query.set(i, number());
  const std::vector<int64_t> valid(static_cast<size_t>(rows), tokens);
  Data out(dtype, rows * heads * tokens * value_dim), one(dtype, rows * heads * value_dim);
  std::unique_ptr<float[]> lse(new float[size_t(rows * heads * tokens)]), one_lse(new float[size_t(rows * heads)]);
  const Scores scores = {0.25f, float(pick_of({0, 0, 3})), nullptr};
  const Parallel parallel = {int(pick(1, 5)), run_threads, nullptr};
  const PrefillCall fill = {shape, rules, scores, tokens, query.bytes.get(), key.bytes.get(), value.bytes.get(), strides(heads, dim),
                            strides(kv_heads, dim), strides(kv_heads, value_dim), sides[0].pool(), sides[1].pool(),
                            {table.data(), width}, lengths.data(), valid.data(), out.bytes.get(), strides(heads, value_dim), lse.get()};
  if (prefill(fill, parallel, isa) != OK) fail("prefill failed");
  DecodeCall step = {shape, rules, scores, query.bytes.get(), heads * tokens * dim, tokens * dim, sides[0].pool(),
                     sides[1].pool(), {table.data(), width}, lengths.data(), one.bytes.get(), one_lse.get(), nullptr, nullptr};
  const std::unique_ptr<float[]> weights(new float[kept_floats(step)]);
  step.keep = weights.get();
  if (decode(step, parallel, isa) != OK) fail("decode failed");
  step.keep = nullptr;
  // the other layer, by the weights that were kept, against the queries and keys that they are of
  Data its_query(dtype, rows * heads * dim), copied(dtype, one.count);
  for (int64_t lane = 0; lane < rows * heads; lane++) {
    const int64_t h = lane % heads, from = lane - h + head_map[size_t(h / group)] * group + h % group;
    for (int64_t d = 0; d < dim; d++) its_query.set(lane * dim + d, query.get(from * tokens * dim + d));
  }
  const Shared by_weights = {head_map.data(), reuse_values.data(), rules, weights.get()};
  const DecodeCall copy = {shape, reuse_rules, scores, nullptr, 0, 0, sides[0].pool(), sides[1].pool(), {table.data(), width}, lengths.data(),
                           copied.bytes.get(), nullptr, nullptr, &by_weights};
  if (decode(copy, parallel, isa) != OK) fail("decode with another layer's weights failed");
  const double tolerance = dtype == F32 ? 1e-4 : dtype == F16 ? 3e-3 : 3e-2;
  std::vector<float> buffer(static_cast<size_t>(larger(dim, value_dim) + 16));
  std::vector<double> q(static_cast<size_t>(dim));
  for (int64_t lane = 0; lane < rows * heads; lane++) {
    const int64_t r = lane / heads, h = lane % heads, pair = r * kv_heads + h / group, head = h / group;
    std::vector<std::vector<double>> kept[2];
    for (int64_t side = 0; side < 2; side++) {
      const KVPart& kv_part = sides[side].kv_parts[size_t(head)];
      Data& chunk = side ? value : key;
      const Visible see = visible(steps, rules.of(head)), then = visible(steps + 1, rules.of(head));
      for (int64_t j = 0; j < steps; j++) {
        const auto by = [&](const Visible& v) { return (j >= v.first && j < v.sink_end) || j >= v.start; };
        kept[side].push_back(by(see) || by(then) ? token(side, pair, j) : std::vector<double>(static_cast<size_t>(kv_part.dim), NAN));
      }
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t first = (pair * tokens + t) * kv_part.dim;
        std::vector<double> numbers;
        for (int64_t d = 0; d < kv_part.dim; d++) numbers.push_back(chunk.get(first + d));
        if (kv_part.format != NATIVE) {
          const std::unique_ptr<char[]> block(new char[size_t(kv_part.bytes)]);
          kernels_of(isa).encode[dtype](chunk.bytes.get() + first * element, kv_part, 0, block.get(), buffer.data());
          numbers = meant(block.get(), kv_part, 0);
        }
        kept[side].push_back(numbers);
      }
    }
    const auto from = [&](int64_t side) { return [&, side](int64_t j, int64_t d) { return kept[side][size_t(j)][size_t(d)]; }; };
    const auto compare = [&](const Data& found, const float* sums, int64_t at, int64_t n, const char* what) {
      const std::vector<double> wanted = plain(q.data(), dim, value_dim, n, rules.of(head), scores, h, from(0), from(1));
      for (int64_t d = 0; d < value_dim; d++) near(found.get(at * value_dim + d), wanted[size_t(d)], tolerance, what, isa, dtype);
      near(sums[at], wanted[size_t(value_dim)], 1e-3, what, isa, dtype);
    };
    const int64_t of = head_map[size_t(head)];
    const KVPart reuse_half = kv_part_of(reuse_rules.of(head).value_format, value_dim, element, VALUES);
    for (int64_t d = 0; d < dim; d++) q[size_t(d)] = its_query.get(lane * dim + d);
    std::vector<std::vector<double>> its[2];
    const Visible its_view = visible(steps, reuse_rules.of(head));
    for (int64_t j = 0; j < steps; j++) {
      const bool seen = (j >= its_view.first && j < its_view.sink_end) || j >= its_view.start;
      const Side& value_set = value_sets[size_t(value_set_of[size_t(head)])];
      its[0].push_back(seen ? token(0, r * kv_heads + of, j) : std::vector<double>(static_cast<size_t>(dim), NAN));
      its[1].push_back(seen ? in_pool(value_set, reuse_half, r * kv_heads + of, j) : std::vector<double>(static_cast<size_t>(value_dim), NAN));
    }
    const auto its_side = [&](int64_t side) { return [&, side](int64_t j, int64_t d) { return its[side][size_t(j)][size_t(d)]; }; };
    const std::vector<double> wanted = plain(q.data(), dim, value_dim, steps, reuse_rules.of(head), scores, h, its_side(0), its_side(1));
    for (int64_t d = 0; d < value_dim; d++)
      near(copied.get(lane * value_dim + d), wanted[size_t(d)], tolerance, "decode with copied weights", isa, dtype);
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t d = 0; d < dim; d++) q[size_t(d)] = query.get((lane * tokens + t) * dim + d);
      compare(out, lse.get(), lane * tokens + t, steps + t + 1, "prefill of codes");
      if (t == 0) compare(one, one_lse.get(), lane, steps, "decode of codes");
    }
  }
  for (int32_t& id : table) id = int32_t((id + each) % (kv_heads * each));  // blocks of other heads, and so maybe of other sizes
  decode(step, parallel, isa);
}

// Linear layers of the same input, all at once, some of them gated or added to something.
// Single tokens into a cache whose rules select, with formats: after every token the places that gates fill hold just the tokens that
// the definition keeps, to the bit as they were in the window, and decode sees them beside sinks and window. Blocks that others name
// too are copied before they are written to.
void test_selected(Isa isa, DType dtype) {
  const int64_t rows = pick(1, 2), kv_heads = pick(1, 3), pairs = rows * kv_heads, group = pick_of({1, 2, 3}), heads = kv_heads * group;
  const int64_t dim = pick_of({16, 24, 40, 64, 13}), value_dim = pick_of({16, 24, 64, 9}), steps = pick(1, 150);
  const int64_t width = (steps + BLOCK - 1) / BLOCK, each = 12 * rows * width;
  std::vector<int64_t> columns = random_rules(kv_heads, 16, 0);
  for (int64_t i = 5 * kv_heads; i < 7 * kv_heads; i++) columns[size_t(i)] = pick(0, FORMATS - 1);
  for (int64_t head = 0; head < kv_heads; head++) {
    columns[size_t(1 * kv_heads + head)] = pick_of({0, 20, 64});
    columns[size_t(2 * kv_heads + head)] = pick_of({0, 100, 600});
    columns[size_t(7 * kv_heads + head)] = pick_of({0, 1, 9, 40});
    columns[size_t(8 * kv_heads + head)] = pick_of({0, 0, 100, 1024});
  }
  const RuleTable rules = {columns.data(), kv_heads};
  struct Side {
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<const void*> base;
    std::vector<int64_t> bytes, first{0};
    Pool pool() const { return {int64_t(base.size()), base.data(), bytes.data(), bytes.data(), first.data()}; }
  } sides[3];  // keys, values, scores
  std::vector<int64_t> score_bytes;
  for (int64_t head = 0; head < kv_heads; head++) {
    const KVParts kv_parts = kv_parts_of(rules.of(head), {dtype, rows, kv_heads, group, dim, value_dim});
    score_bytes.push_back(rules.of(head).selects() ? SCORE_BYTES * BLOCK : 0);
    const int64_t bytes[] = {kv_parts.key.bytes, kv_parts.value.bytes, score_bytes.back()};
    for (int64_t side = 0; side < 3; side++) {
      sides[side].memory.emplace_back(bytes[side] ? new char[size_t(each * bytes[side])] : nullptr);
      if (bytes[side]) std::memset(sides[side].memory.back().get(), 0xff, size_t(each * bytes[side]));
      sides[side].base.push_back(sides[side].memory.back().get());
      sides[side].bytes.push_back(bytes[side]);
      sides[side].first.push_back(sides[side].first.back() + each);
    }
  }
  std::vector<int64_t> lengths(static_cast<size_t>(rows), 0), runs(static_cast<size_t>(2 * RUNS * pairs), 0), left(static_cast<size_t>(pairs), 0);
  std::vector<int32_t> table(static_cast<size_t>(pairs * width), -1), kept_ids(table), refs(static_cast<size_t>(kv_heads * each), 0);
  std::vector<int16_t> given(static_cast<size_t>(pairs), 0);
  Data key(dtype, pairs * dim), value(dtype, pairs * value_dim), query(dtype, rows * heads * dim), out(dtype, rows * heads * value_dim);
  std::unique_ptr<float[]> lse(new float[size_t(rows * heads)]);
  const Pool shared_values[] = {sides[2].pool()};
  const Selected selected = {kept_ids.data(), width, left.data(), given.data()};
  const Shape shape = {dtype, rows, kv_heads, group, dim, value_dim};
  const AdvanceCall call = {shape, rules, 0, key.bytes.get(), value.bytes.get(), {kv_heads * dim, dim, dim},
                            {kv_heads * value_dim, value_dim, value_dim}, sides[0].pool(), sides[1].pool(), table.data(), width,
                            lengths.data(), runs.data(), refs.data(), kv_heads * each, 1, shared_values, score_bytes.data(), &selected};
  const Scores scores = {0.25f, 0.f, nullptr};
  const DecodeCall step = {shape, rules, scores, query.bytes.get(), heads * dim, dim, sides[0].pool(), sides[1].pool(),
                           {table.data(), width}, lengths.data(), out.bytes.get(), lse.get(), nullptr, nullptr, &selected};
  const auto fail = [](const char* what) {
    if (failures++ < 10) std::printf("chosen: %s\n", what);
  };
  struct Fed {
    std::vector<double> key, value;
    int16_t score;
  };
  std::vector<std::vector<Fed>> fed(static_cast<size_t>(pairs));
  std::vector<std::vector<int64_t>> kept(static_cast<size_t>(pairs));  // positions, by their places
  std::vector<int64_t> gone(static_cast<size_t>(pairs), 0);
  const auto read = [&](int64_t side, int64_t pair, int32_t id, int64_t place) {
    const int64_t head = pair % kv_heads, count = side ? value_dim : dim;
    const KVParts kv_parts = kv_parts_of(rules.of(head), shape);
    const KVPart& kv_part = side ? kv_parts.value : kv_parts.key;
    const int64_t segment = id / each;  // of KV heads of the same formats any will do
    const char* at = static_cast<const char*>(sides[side].base[size_t(segment)]) + (id - segment * each) * kv_part.bytes;
    if (kv_part.format != NATIVE) return meant(at, kv_part, place);
    Data one(dtype, count);
    std::memcpy(one.bytes.get(), at + place * kv_part.token_bytes, size_t(kv_part.token_bytes));
    std::vector<double> found;
    for (int64_t d = 0; d < count; d++) found.push_back(one.get(d));
    return found;
  };
  std::vector<int32_t> held;  // ids of blocks that another cache names too
  for (int64_t n = 1; n <= steps; n++) {
    for (Data* data : {&key, &value, &query})
      for (int64_t i = 0; i < data->count; i++) data->set(i, number());
    for (int64_t pair = 0; pair < pairs; pair++) given[size_t(pair)] = int16_t(pick(-4, 4));
    if (pick(0, 9) == 0)
      for (const int32_t id : kept_ids)
        if (id >= 0 && refs[size_t(id)] == 1) refs[size_t(id)]++, held.push_back(id);
    Missing missing;
    if (advance(call, isa, missing) != OK || missing.blocks || lengths[0] != n) {
      fail("a token was not taken");
      return;
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
      const Rule rule = rules.of(pair % kv_heads);
      const Visible see = visible(n, rule);
      const int32_t id = table[size_t(pair * width + (n - 1) / BLOCK)];
      fed[size_t(pair)].push_back({read(0, pair, id, (n - 1) % BLOCK), read(1, pair, id, (n - 1) % BLOCK), given[size_t(pair)]});
      auto& places = kept[size_t(pair)];
      for (int64_t& count = gone[size_t(pair)]; rule.selects() && rule.sink + count < see.start;) {
        const int64_t token = rule.sink + count++;
        int64_t least = -1;
        for (size_t place = 0; place < places.size(); place++)
          if (least < 0 || fed[size_t(pair)][size_t(places[place])].score < fed[size_t(pair)][size_t(places[size_t(least)])].score) least = int64_t(place);
        if (int64_t(places.size()) < smaller(count, rule.select_alpha + rule.select_beta_q * count / 1024)) places.push_back(token);
        else if (least >= 0 && fed[size_t(pair)][size_t(token)].score > fed[size_t(pair)][size_t(places[size_t(least)])].score)
          places[size_t(least)] = token;
      }
      for (size_t place = 0; place < places.size(); place++) {
        const int32_t at = kept_ids[size_t(pair * width) + place / BLOCK];
        const Fed& token = fed[size_t(pair)][size_t(places[place])];
        if (at < 0 || read(0, pair, at, int64_t(place) % BLOCK) != token.key || read(1, pair, at, int64_t(place) % BLOCK) != token.value) {
          fail("a place has not the token that is kept there");
          return;
        }
      }
    }
    const Parallel parallel = {int(pick(1, 4)), run_threads, nullptr};
    if (decode(step, parallel, isa) != OK) fail("decode failed");
    for (int64_t pair = 0; pair < pairs; pair++)
      for (int64_t g = 0; g < group; g++) {
        const int64_t lane = pair * group + g;  // [rows, heads]
        const Rule rule = rules.of(pair % kv_heads);
        const Visible see = visible(n, rule);
        double total = 0;
        std::vector<double> sum(static_cast<size_t>(value_dim), 0.0);
        for (int64_t j = 0; j < n; j++) {
          const auto& places = kept[size_t(pair)];
          if (!(j < see.sink_end || j >= see.start || std::find(places.begin(), places.end(), j) != places.end())) continue;
          const Fed& token = fed[size_t(pair)][size_t(j)];
          double x = 0;
          for (int64_t d = 0; d < dim; d++) x += query.get(lane * dim + d) * token.key[size_t(d)];
          total += std::exp(0.25 * x);
          for (int64_t d = 0; d < value_dim; d++) sum[size_t(d)] += std::exp(0.25 * x) * token.value[size_t(d)];
        }
        for (int64_t d = 0; d < value_dim; d++)
          if (std::fabs(out.get(lane * value_dim + d) - sum[size_t(d)] / total) > 6e-2) {
            fail("decode sees other tokens than are kept");
            return;
          }
      }
  }
  std::vector<int32_t> named(refs.size(), 0);
  for (const std::vector<int32_t>* ids : {&table, &kept_ids})
    for (const int32_t id : *ids)
      if (id >= 0) named[size_t(id)]++;
  for (const int32_t id : held) named[size_t(id)]++;
  if (named != refs) fail("blocks are not counted as they are named");
}

void test_linear(Isa isa, DType dtype) {
  const int64_t rows = pick(0, 3) ? pick(0, 20) : pick(21, 70), inputs = pick(0, 2) ? pick(0, 90) : 32 * pick(1, 3), count = pick(1, 3), threads = pick(1, 5);
  Data x(dtype, rows * inputs);
  for (int64_t i = 0; i < x.count; i++) x.set(i, number());
  std::vector<Data> weights, biases, outs, ups, residuals;
  std::vector<LinearCall> calls;
  for (int64_t c = 0; c < count; c++) {
    const int64_t outputs = pick(1, 60);
    weights.emplace_back(dtype, outputs * inputs);
    biases.emplace_back(dtype, outputs);
    outs.emplace_back(dtype, rows * outputs);
    ups.emplace_back(dtype, outputs * inputs);
    residuals.emplace_back(dtype, rows * outputs);
    for (Data* data : {&weights.back(), &biases.back(), &ups.back(), &residuals.back()})
      for (int64_t i = 0; i < data->count; i++) data->set(i, number());
    calls.push_back({dtype, rows, inputs, outputs, x.bytes.get(), weights.back().bytes.get(),
                     pick(0, 1) ? biases.back().bytes.get() : nullptr, outs.back().bytes.get(),
                     pick(0, 1) ? ups.back().bytes.get() : nullptr, pick(0, 1) ? residuals.back().bytes.get() : nullptr});
  }
  const Parallel parallel = {int(threads), run_threads, nullptr};
  if (linear(calls.data(), count, parallel, isa) != OK) failures++;
  for (size_t c = 0; c < calls.size(); c++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t o = 0; o < calls[c].outputs; o++) {
        double wanted = calls[c].bias ? biases[c].get(o) : 0;
        for (int64_t i = 0; i < inputs; i++) wanted += x.get(r * inputs + i) * weights[c].get(o * inputs + i);
        double bound = (dtype == F32 ? 1e-6 : dtype == BF16 ? 8e-3 : 1e-3) * (1 + std::fabs(wanted));
        if (calls[c].up) {
          double up = 0;
          for (int64_t i = 0; i < inputs; i++) up += x.get(r * inputs + i) * ups[c].get(o * inputs + i);
          wanted *= up / (1 + std::exp(-wanted));
          bound *= 3 * (1 + std::fabs(up));
        }
        if (calls[c].residual) wanted += residuals[c].get(r * calls[c].outputs + o), bound *= 2;
        near(outs[c].get(r * calls[c].outputs + o), wanted, bound, "linear", isa, dtype);
      }
}

void test_rotate(Isa isa, DType dtype) {
  const int64_t rows = pick(1, 4), heads = pick(1, 4), half = pick(1, 40), dim = 2 * half;
  const bool shared = pick(0, 1), subtracts = pick(0, 1);
  Data x(dtype, rows * heads * dim), before(dtype, rows * heads * dim), cos(dtype, (shared ? 1 : rows) * dim), sin(dtype, cos.count);
  Data less(F32, heads * dim);
  for (int64_t i = 0; i < less.count; i++) less.set(i, 10 * number());
  for (Data* data : {&before, &cos, &sin})
    for (int64_t i = 0; i < data->count; i++) data->set(i, number());
  for (int64_t i = 0; i < x.count; i++) x.set(i, before.get(i));
  rotate({dtype, rows, heads, dim, x.bytes.get(), cos.bytes.get(), sin.bytes.get(), shared ? 0 : dim, shared ? 0 : dim,
          subtracts ? reinterpret_cast<const float*>(less.bytes.get()) : nullptr}, isa);
  for (int64_t i = 0; i < x.count; i++) {
    const int64_t d = i % dim, at = (shared ? 0 : i / (heads * dim)) * dim + d;
    const double other = d < half ? -before.get(i + half) : before.get(i - half);
    const double rotated = before.get(i) * cos.get(at) + other * sin.get(at);
    const double wanted = rotated - (subtracts ? less.get(i % (heads * dim)) : 0);
    near(x.get(i), wanted, (dtype == F32 ? 2e-6 : dtype == BF16 ? 8e-3 : 1e-3) * (1 + std::fabs(rotated) + std::fabs(wanted)), "rotate", isa,
         dtype);
  }
}

void test_norm(Isa isa, DType dtype) {
  const int64_t rows = pick(0, 5), size = pick(1, 90);
  Data x(dtype, rows * size), weight(dtype, size), out(dtype, rows * size);
  for (Data* data : {&x, &weight})
    for (int64_t i = 0; i < data->count; i++) data->set(i, number());
  norm({dtype, rows, size, x.bytes.get(), weight.bytes.get(), 1e-2f, out.bytes.get()}, isa);
  for (int64_t r = 0; r < rows; r++) {
    double squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x.get(r * size + i) * x.get(r * size + i);
    for (int64_t i = 0; i < size; i++) {
      const double wanted = weight.get(i) * x.get(r * size + i) / std::sqrt(squares / double(size) + 1e-2);
      near(out.get(r * size + i), wanted, (dtype == F32 ? 1e-6 : dtype == BF16 ? 2e-2 : 2e-3) * (1 + std::fabs(wanted)), "norm", isa, dtype);
    }
  }
}

}  // namespace

// With an argument it only says which instruction set would be chosen.
int main(int count, char**) {
  int tests = 0;
  std::printf("best: %s\n", isa_name(best_isa()));
  if (count > 1) return 0;
  for (int i = 0; i < 24; i++, tests++) test_advance(PORTABLE, DType(i % 3));
  for (int isa = PORTABLE; isa < ISAS; isa++) {
    if (!isa_works(Isa(isa))) {
      std::printf("%s: not on this processor\n", isa_name(Isa(isa)));
      continue;
    }
    for (int i = 0; i < 24; i++, tests++) test(Isa(isa), DType(i % 3));
    for (int i = 0; i < 24; i++, tests++) test_codes(Isa(isa), DType(i % 3));
    for (int i = 0; i < 24; i++, tests++) test_selected(Isa(isa), DType(i % 3));
    for (int i = 0; i < 24; i++, tests++) test_profile(Isa(isa), DType(i % 3));
    for (int i = 0; i < 90; i++, tests++) test_linear(Isa(isa), DType(i % 3));
    for (int i = 0; i < 60; i++, tests++) test_rotate(Isa(isa), DType(i % 3));
    for (int i = 0; i < 60; i++, tests++) test_norm(Isa(isa), DType(i % 3));
  }
  std::printf("%d tests, %d failures\n", tests, failures);
  return failures != 0;
}
