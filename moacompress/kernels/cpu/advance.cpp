// One token more in every row of a layer's cache: blocks that no later query sees are given back, a free one is taken where a new
// one begins, one that others name too is copied before it is written to, and the token's keys and values are written.
//
// What stays follows from the number of tokens, as moacompress/runtime/cache/block_runs.py has it for whole chunks; tests hold the two equal.
#include <cstring>

#include "tasks.h"

namespace moacompress {
namespace {

using Runs = Interval[RUNS];

// Finds the blocks to hold at `n` tokens, given those held so far: what is gone stays gone.
void kept_runs(int64_t n, const Rule& rule, int64_t lag, const Runs& held, Runs& now) {
  block_runs(n, rule, now);
  if (lag) {
    Runs earlier;
    block_runs(larger(n - lag, 0), rule, earlier);
    for (int64_t i = 0; i < RUNS; i++) now[i] = {earlier[i].begin, larger(earlier[i].end, now[i].end)};
  }
  for (int64_t i = RUNS - 1; i >= 0; i--) {
    Interval& run = now[i];
    run.begin = larger(held[i].begin, run.begin);
    if (i + 1 == RUNS) continue;  // the window's
    run.end = larger(smaller(run.end, now[i + 1].begin), run.begin);
    // sinks grow out of the window they lie in; once apart from it they can only shrink
    if (held[i].end < held[i + 1].begin) run.end = smaller(run.end, larger(held[i].end, run.begin));
  }
}

char* at_block(const Pool& pool, int64_t id, int64_t element) { return const_cast<char*>(block_of(pool, id, element)); }

struct Job {
  const AdvanceCall& call;
  int64_t pairs, element, next = 0;  // blocks before `next` are taken

  int64_t row(int64_t pair) const { return pair / call.shape.kv_heads; }
  int32_t* ids(int64_t pair) const { return call.ids + pair * call.width; }
  int64_t& bound(int64_t run, int64_t side, int64_t pair) const { return call.runs[(run * 2 + side) * pairs + pair]; }

  bool known(int32_t id) const { return id >= 0 && id < call.blocks; }

  void release(int32_t& id) const {
    if (known(id) && call.refs[id] > 0) call.refs[id]--;
    id = -1;
  }

  // Gives back what does not stay, and takes note of what does.
  void settle(int64_t pair) const {
    const int64_t n = call.lengths[row(pair)] + 1;
    Runs held, now;
    for (int64_t i = 0; i < RUNS; i++) held[i] = {bound(i, 0, pair), bound(i, 1, pair)};
    kept_runs(n, call.rules.of(pair % call.shape.kv_heads), call.lag, held, now);
    for (const Interval& run : held)
      for (int64_t block = larger(run.begin, 0); block < smaller(smaller(run.end, now[RUNS - 1].begin), call.width); block++) {
        bool stays = false;
        for (const Interval& other : now) stays = stays || (block >= other.begin && block < other.end);
        if (!stays) release(ids(pair)[block]);
      }
    for (int64_t i = 0; i < RUNS; i++) {
      bound(i, 0, pair) = now[i].begin;
      bound(i, 1, pair) = now[i].end;
    }
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
