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

// Puts a token into its place of a half of a block.
void put_token(const Kernels& kernels, DType dtype, const Half& half, const void* from, int64_t place, char* to, float* buffer) {
  if (half.format == NATIVE) std::memcpy(to + place * half.token_bytes, from, size_t(half.token_bytes));
  else kernels.encode[dtype](from, half, place, to, buffer);
}

char* at_block(const Pool& pool, int64_t id, int64_t bytes) { return const_cast<char*>(block_of(pool, id, bytes)); }

struct Job {
  const AdvanceCall& call;
  const Kernels& kernels;
  int64_t pairs, element;
  float* buffer;
  int64_t next[FORMATS * FORMATS] = {};  // for each pair of formats: blocks before it are taken, or of other formats

  Rule rule(int64_t pair) const { return call.rules.of(pair % call.shape.kv_heads); }
  Halves halves(int64_t pair) const { return halves_of(rule(pair), call.shape); }
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
    kept_runs(n, rule(pair), call.lag, held, now);
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

  const int64_t* beside(int64_t pair) const { return call.beside_bytes + pair % call.shape.kv_heads * call.planes; }

  // Whether a block has beside its own values those that a pair's have, and no others.
  bool has_beside(int64_t id, int64_t pair) const {
    for (int64_t plane = 0; plane < call.planes; plane++)
      if (half_bytes_of(call.beside[plane], id) != beside(pair)[plane]) return false;
    return true;
  }

  bool take(int64_t pair) {
    const Halves halves = this->halves(pair);
    int64_t from_start = 0;
    int64_t& free = call.planes ? from_start : next[halves.key.format * FORMATS + halves.value.format];
    const int64_t key_bytes = halves.key.bytes, value_bytes = halves.value.bytes;
    const auto fits = [&](int64_t id) {
      return call.refs[id] == 0 && block_of(call.keys, id, key_bytes) && block_of(call.values, id, value_bytes) && has_beside(id, pair);
    };
    while (free < call.blocks && !fits(free)) free++;
    if (free == call.blocks) return false;
    int32_t& id = ids(pair)[call.lengths[row(pair)] / BLOCK];
    if (known(id)) {
      std::memcpy(at_block(call.keys, free, key_bytes), block_of(call.keys, id, key_bytes), size_t(key_bytes));
      std::memcpy(at_block(call.values, free, value_bytes), block_of(call.values, id, value_bytes), size_t(value_bytes));
      for (int64_t plane = 0; plane < call.planes; plane++) {
        const int64_t bytes = beside(pair)[plane];
        if (bytes) std::memcpy(at_block(call.beside[plane], free, bytes), block_of(call.beside[plane], id, bytes), size_t(bytes));
      }
      call.refs[id]--;
    }
    id = int32_t(free);
    call.refs[free] = 1;
    return true;
  }

  void write(int64_t pair) const {
    const int64_t before = call.lengths[row(pair)], head = pair % call.shape.kv_heads;
    const int32_t id = ids(pair)[before / BLOCK];
    const auto put = [&](const Pool& pool, const Half& half, const void* token, const Strides& at) {
      const char* from = static_cast<const char*>(token) + (row(pair) * at.row + head * at.head) * element;
      put_token(kernels, call.shape.dtype, half, from, before % BLOCK, at_block(pool, id, half.bytes), buffer);
    };
    const Halves halves = this->halves(pair);
    put(call.keys, halves.key, call.key, call.key_at);
    put(call.values, halves.value, call.value, call.value_at);
  }
};

}  // namespace

Status advance(const AdvanceCall& call, Isa isa, Missing& missing) {
  missing = {TABLE_TOO_NARROW, 0};
  for (int64_t row = 0; row < call.shape.rows; row++)
    if (call.lengths[row] / BLOCK >= call.width) return OK;
  const Buffer<float> buffer(size_t(larger(call.shape.head_dim, call.shape.value_dim) + 16));
  if (!buffer.get()) return NO_MEMORY;
  Job job = {call, kernels_of(isa), call.shape.rows * call.shape.kv_heads, int64_t(element_size(call.shape.dtype)), buffer.get()};
  for (int64_t pair = 0; pair < job.pairs; pair++) job.settle(pair);
  for (int64_t pair = 0; pair < job.pairs; pair++)
    if (job.wanting(pair) && !job.take(pair)) {
      missing = {0, pair % call.shape.kv_heads};
      const Rule lacking = job.rule(pair);
      for (; pair < job.pairs; pair++) {
        const Rule rule = job.rule(pair);
        bool same = rule.key_format == lacking.key_format && rule.value_format == lacking.value_format;
        for (int64_t plane = 0; plane < call.planes; plane++) same = same && job.beside(pair)[plane] == job.beside(missing.head)[plane];
        missing.blocks += same && job.wanting(pair);
      }
      return OK;
    }
  for (int64_t pair = 0; pair < job.pairs; pair++) job.write(pair);
  for (int64_t row = 0; row < call.shape.rows; row++) call.lengths[row]++;
  missing = {0, 0};
  return OK;
}

Status put_beside(const BesideCall& call, Isa isa) {
  const Shape& shape = call.shape;
  const Buffer<float> buffer(size_t(shape.value_dim + 16));
  if (!buffer.get()) return NO_MEMORY;
  const int64_t element = int64_t(element_size(shape.dtype));
  for (int64_t row = 0; row < shape.rows; row++)
    for (int64_t head = 0; head < shape.kv_heads; head++) {
      const int64_t at = call.lengths[row] - 1, pair = row * shape.kv_heads + call.head_map[head];
      const Half half = halves_of(call.rules.of(head), shape).value;
      const int32_t id = at >= 0 && at / BLOCK < call.table.width ? call.table.ids[pair * call.table.width + at / BLOCK] : -1;
      const char* to = block_of(call.values[head], id, half.bytes);
      if (!to) return MISSING_BLOCK;
      const char* from = static_cast<const char*>(call.value) + (row * call.value_at.row + head * call.value_at.head) * element;
      put_token(kernels_of(isa), shape.dtype, half, from, at % BLOCK, const_cast<char*>(to), buffer.get());
    }
  return OK;
}

}  // namespace moacompress
