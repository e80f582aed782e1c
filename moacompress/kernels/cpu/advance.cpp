// One token more in every row of a layer's cache: blocks that no later query sees are given back, a free one is taken where a new
// one begins, one that others name too is copied before it is written to, and the token's keys and values are written.
//
// What stays follows from the number of tokens, as moacompress/runtime/cache/block_runs.py has it for whole chunks; tests hold the two equal.
#include <cstring>

#include "selecting.h"

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
  int64_t wanted = 0;  // where the run after this one was to begin
  for (int64_t i = RUNS - 1; i >= 0; i--) {
    Interval& run = now[i];
    const int64_t begin = run.begin, after = wanted;
    wanted = begin;
    run.begin = larger(held[i].begin, begin);
    if (i + 1 == RUNS) continue;  // the window's
    run.end = larger(smaller(run.end, now[i + 1].begin), run.begin);
    // sinks grow out of the window they lie in; once apart from it they can only shrink
    if (held[i].end < held[i + 1].begin) run.end = smaller(run.end, larger(held[i].end, run.begin));
    // what was held as sinks' before a roll back is held where the window was then
    if (after < held[i].end) run.end = smaller(held[i].end, now[i + 1].begin);
  }
}

struct Job {
  const AdvanceCall& call;
  const Kernels& kernels;
  int64_t pairs, element;
  float* buffer;
  int64_t next[FORMATS * FORMATS] = {};  // for each pair of formats: blocks before it are taken, or of other formats

  Rule rule(int64_t pair) const { return call.rules.of(pair % call.shape.kv_heads); }
  KVParts kv_parts(int64_t pair) const { return kv_parts_of(rule(pair), call.shape); }
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

  // ---- the tokens that gates select ----

  bool chooses(int64_t pair) const { return call.selected && rule(pair).selects(); }
  int32_t* selected(int64_t pair) const { return call.selected->ids + pair * call.selected->width; }

  Selecting selecting(int64_t pair) const {
    return {rule(pair), kv_parts(pair), {&call.keys, &call.values, &call.shared_values[0]}, ids(pair), call.width, selected(pair), call.selected->width};
  }

  // Keeps a token that leaves, and takes note that it has left.
  void keep(int64_t pair, const Admission& found) const {
    if (found.position >= 0) call.selected->left[pair]++;
    selecting(pair).keep(found);
  }

  // ---- blocks ----

  const int64_t* shared_values(int64_t pair) const { return call.shared_value_bytes + pair % call.shape.kv_heads * call.value_sets; }

  // Whether a block has beside its own values those that a pair's have, and no others.
  bool has_shared_values(int64_t id, int64_t pair) const {
    for (int64_t value_set = 0; value_set < call.value_sets; value_set++)
      if (part_bytes_of(call.shared_values[value_set], id) != shared_values(pair)[value_set]) return false;
    return true;
  }

  // Gives a pair a free block in the place of an id, with what is there in it.
  bool take(int64_t pair, int32_t& id) {
    const KVParts kv_parts = this->kv_parts(pair);
    int64_t from_start = 0;
    int64_t& free = call.value_sets ? from_start : next[kv_parts.key.format * FORMATS + kv_parts.value.format];
    const int64_t key_bytes = kv_parts.key.bytes, value_bytes = kv_parts.value.bytes;
    const auto fits = [&](int64_t id) {
      return call.refs[id] == 0 && block_of(call.keys, id, key_bytes) && block_of(call.values, id, value_bytes) && has_shared_values(id, pair);
    };
    while (free < call.blocks && !fits(free)) free++;
    if (free == call.blocks) return false;
    if (known(id)) {
      std::memcpy(at_block(call.keys, free, key_bytes), block_of(call.keys, id, key_bytes), size_t(key_bytes));
      std::memcpy(at_block(call.values, free, value_bytes), block_of(call.values, id, value_bytes), size_t(value_bytes));
      for (int64_t value_set = 0; value_set < call.value_sets; value_set++) {
        const int64_t bytes = shared_values(pair)[value_set];
        if (bytes) std::memcpy(at_block(call.shared_values[value_set], free, bytes), block_of(call.shared_values[value_set], id, bytes), size_t(bytes));
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
    const auto put = [&](const Pool& pool, const KVPart& kv_part, const void* token, const Strides& at) {
      const char* from = static_cast<const char*>(token) + (row(pair) * at.row + head * at.head) * element;
      put_token(kernels, call.shape.dtype, kv_part, from, before % BLOCK, at_block(pool, id, kv_part.bytes), buffer);
    };
    const KVParts kv_parts = this->kv_parts(pair);
    put(call.keys, kv_parts.key, call.key, call.key_at);
    put(call.values, kv_parts.value, call.value, call.value_at);
    if (chooses(pair)) selecting(pair).pools.scores_of(id)[before % BLOCK] = call.selected->scores[pair];
  }

  // Says that a pair lacks a block, and those after it that want one of its kind too.
  template <class Wants> Missing lacking(int64_t pair, const Wants& wants) const {
    Missing missing = {0, pair % call.shape.kv_heads};
    const Rule first = rule(pair);
    for (; pair < pairs; pair++) {
      const Rule other = rule(pair);
      bool same = other.key_format == first.key_format && other.value_format == first.value_format;
      for (int64_t value_set = 0; value_set < call.value_sets; value_set++) same = same && shared_values(pair)[value_set] == shared_values(missing.head)[value_set];
      missing.blocks += same && wants(pair);
    }
    return missing;
  }

  // Keeps the tokens that leave windows and that gates select. OK with `missing` where the cache lacks room: made again, it goes on.
  Status choose(Missing& missing) {
    const Buffer<Admission> admissions(static_cast<size_t>(pairs));
    if (!admissions.get()) return NO_MEMORY;
    for (int64_t pair = 0; pair < pairs; pair++) {
      admissions[size_t(pair)] = {-1, -1};
      if (chooses(pair) &&
          !selecting(pair).next(call.lengths[row(pair)], call.selected->left[pair], admissions[size_t(pair)]))
        return MISSING_BLOCK;
      if (admissions[size_t(pair)].place / BLOCK >= call.selected->width) {
        missing = {TABLE_TOO_NARROW, 0};
        return OK;
      }
    }
    const auto wants = [&](int64_t pair) {
      const int64_t place = admissions[size_t(pair)].place;
      return place >= 0 && (!known(selected(pair)[place / BLOCK]) || call.refs[selected(pair)[place / BLOCK]] > 1);
    };
    for (int64_t pair = 0; pair < pairs; pair++)
      if (wants(pair) && !take(pair, selected(pair)[admissions[size_t(pair)].place / BLOCK])) {
        missing = lacking(pair, wants);
        return OK;
      }
    for (int64_t pair = 0; pair < pairs; pair++) keep(pair, admissions[size_t(pair)]);
    return OK;
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
  missing = {0, 0};
  if (call.selected) {  // before the window's blocks are given back
    const Status status = job.choose(missing);
    if (status != OK || missing.blocks) return status;
  }
  for (int64_t pair = 0; pair < job.pairs; pair++) job.settle(pair);
  for (int64_t pair = 0; pair < job.pairs; pair++)
    if (job.wanting(pair) && !job.take(pair, job.ids(pair)[call.lengths[job.row(pair)] / BLOCK])) {
      missing = job.lacking(pair, [&](int64_t other) { return job.wanting(other); });
      return OK;
    }
  for (int64_t pair = 0; pair < job.pairs; pair++) job.write(pair);
  for (int64_t row = 0; row < call.shape.rows; row++) call.lengths[row]++;
  missing = {0, 0};
  return OK;
}

Status put_shared_values(const SharedValuesCall& call, Isa isa) {
  const Shape& shape = call.shape;
  const Buffer<float> buffer(size_t(shape.value_dim + 16));
  if (!buffer.get()) return NO_MEMORY;
  const int64_t element = int64_t(element_size(shape.dtype));
  for (int64_t row = 0; row < shape.rows; row++)
    for (int64_t head = 0; head < shape.kv_heads; head++) {
      const int64_t at = call.lengths[row] - 1, pair = row * shape.kv_heads + call.head_map[head];
      const KVPart kv_part = kv_parts_of(call.rules.of(head), shape).value;
      const int32_t id = at >= 0 && at / BLOCK < call.table.width ? call.table.ids[pair * call.table.width + at / BLOCK] : -1;
      const char* to = block_of(call.values[head], id, kv_part.bytes);
      if (!to) return MISSING_BLOCK;
      const char* from = static_cast<const char*>(call.value) + (row * call.value_at.row + head * call.value_at.head) * element;
      put_token(kernels_of(isa), shape.dtype, kv_part, from, at % BLOCK, const_cast<char*>(to), buffer.get());
    }
  return OK;
}

}  // namespace moacompress
