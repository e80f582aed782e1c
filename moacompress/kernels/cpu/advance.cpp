// One token more in every row of a layer's cache: blocks that no later query sees are given back, a free one is taken where a new
// one begins, one that others name too is copied before it is written to, and the token's keys and values are written.
//
// What stays follows from the number of tokens, as moacompress/runtime/runs.py has it for whole chunks; tests hold the two equal.
#include <cstring>

#include "tasks.h"

namespace moacompress {
namespace {

struct Runs {
  int64_t a, b, c, d;  // the sinks' blocks [a, b), the window's [c, d)
};

Runs runs_at(int64_t n, const Rule& rule) {
  const Visible see = visible(n, rule);
  const int64_t a = see.first / BLOCK, c = see.start / BLOCK, b = smaller((see.sink_end + BLOCK - 1) / BLOCK, c);
  return {a, see.sink_end > see.first ? larger(a, b) : a, c, (n + BLOCK - 1) / BLOCK};
}

Runs kept_runs(int64_t n, const Rule& rule, int64_t lag, const Runs& held) {
  Runs runs = runs_at(n, rule);
  if (lag) {
    const Runs earlier = runs_at(larger(n - lag, 0), rule);
    runs = {earlier.a, larger(earlier.b, runs.b), earlier.c, runs.d};
  }
  const int64_t a = larger(held.a, runs.a), c = larger(held.c, runs.c);  // what is gone stays gone
  int64_t b = larger(smaller(runs.b, c), a);
  // sinks grow out of the window they lie in; once apart from it they can only shrink
  if (held.b < held.c) b = smaller(b, larger(held.b, a));
  return {a, b, c, runs.d};
}

char* at_block(const Pool& pool, int64_t id, int64_t element) { return const_cast<char*>(block_of(pool, id, element)); }

struct Job {
  const AdvanceCall& call;
  int64_t pairs, element, next = 0;  // blocks before `next` are taken

  int64_t row(int64_t pair) const { return pair / call.shape.kv_heads; }
  int32_t* ids(int64_t pair) const { return call.ids + pair * call.width; }
  int64_t& bound(int64_t which, int64_t pair) const { return call.runs[which * pairs + pair]; }

  bool known(int32_t id) const { return id >= 0 && id < call.blocks; }

  void release(int32_t& id) const {
    if (known(id) && call.refs[id] > 0) call.refs[id]--;
    id = -1;
  }

  // Gives back what does not stay, and takes note of what does.
  void settle(int64_t pair) const {
    const int64_t n = call.lengths[row(pair)] + 1;
    const Runs held = {bound(0, pair), bound(1, pair), bound(2, pair), bound(3, pair)};
    const Runs now = kept_runs(n, call.rules.of(pair % call.shape.kv_heads), call.lag, held);
    const auto drop = [&](int64_t low, int64_t high) {
      for (int64_t block = larger(low, 0); block < smaller(high, call.width); block++)
        if ((block < now.a || block >= now.b) && block < now.c) release(ids(pair)[block]);
    };
    drop(held.a, held.b);
    drop(held.c, smaller(now.c, held.d));
    bound(0, pair) = now.a;
    bound(1, pair) = now.b;
    bound(2, pair) = now.c;
    bound(3, pair) = now.d;
  }

  // Whether the token's block is still to be taken: none is there, or others name it too.
  bool wanting(int64_t pair) const {
    const int32_t id = ids(pair)[call.lengths[row(pair)] / BLOCK];
    return !known(id) || call.refs[id] > 1;
  }

  bool take(int64_t pair) {
    while (next < call.blocks && call.refs[next] != 0) next++;
    if (next == call.blocks) return false;
    int32_t& id = ids(pair)[call.lengths[row(pair)] / BLOCK];
    if (known(id)) {
      copy(call.keys, next, id, call.shape.head_dim);
      copy(call.values, next, id, call.shape.value_dim);
      call.refs[id]--;
    }
    id = int32_t(next);
    call.refs[next] = 1;
    return true;
  }

  void copy(const Pool& pool, int64_t to, int64_t from, int64_t dim) const {
    std::memcpy(at_block(pool, to, element), block_of(pool, from, element), size_t(BLOCK * dim * element));
  }

  void write(int64_t pair) const {
    const int64_t before = call.lengths[row(pair)], head = pair % call.shape.kv_heads;
    const int32_t id = ids(pair)[before / BLOCK];
    const auto put = [&](const Pool& pool, const void* token, const Strides& at, int64_t dim) {
      const char* from = static_cast<const char*>(token) + (row(pair) * at.row + head * at.head) * element;
      std::memcpy(at_block(pool, id, element) + before % BLOCK * dim * element, from, size_t(dim * element));
    };
    put(call.keys, call.key, call.key_at, call.shape.head_dim);
    put(call.values, call.value, call.value_at, call.shape.value_dim);
  }
};

}  // namespace

int64_t advance(const AdvanceCall& call) {
  for (int64_t row = 0; row < call.shape.rows; row++)
    if (call.lengths[row] / BLOCK >= call.width) return TABLE_TOO_NARROW;
  Job job = {call, call.shape.rows * call.shape.kv_heads, int64_t(element_size(call.shape.dtype))};
  for (int64_t pair = 0; pair < job.pairs; pair++) job.settle(pair);
  for (int64_t pair = 0; pair < job.pairs; pair++)
    if (job.wanting(pair) && !job.take(pair)) {
      int64_t missing = 0;
      for (; pair < job.pairs; pair++) missing += job.wanting(pair);
      return missing;
    }
  for (int64_t pair = 0; pair < job.pairs; pair++) job.write(pair);
  for (int64_t row = 0; row < call.shape.rows; row++) call.lengths[row]++;
  return 0;
}

}  // namespace moacompress
