// Gradients of a prefill without cache: of the queries by tiles of queries, then of keys and values by tiles of keys. The scores are
// made twice, and in return nothing is summed across tasks: no atomics, the same bits for any number of threads.
#include <cmath>
#include <cstring>

#include "tasks.h"

namespace moacompress {
namespace {

struct BackwardJob {
  const BackwardCall& call;
  const Kernels& kernels;
  int64_t rows, query_tiles, key_tiles, pairs, element;

  static char* at(void* base, const Strides& s, int64_t row, int64_t head, int64_t token, int64_t element) {
    return static_cast<char*>(base) + (row * s.row + head * s.head + token * s.token) * element;
  }
  static const char* at(const void* base, const Strides& s, int64_t row, int64_t head, int64_t token, int64_t element) {
    return static_cast<const char*>(base) + (row * s.row + head * s.head + token * s.token) * element;
  }

  Status queries(int64_t tile, int64_t pair, float* scratch) const {
    const Shape& shape = call.shape;
    const int64_t row = pair / shape.kv_heads, head = pair % shape.kv_heads, group = shape.group, first = tile * rows;
    const int64_t end = smaller(first + rows, call.tokens), real = smaller(end, call.valid[row]);
    for (int64_t g = 0; g < group; g++)
      for (int64_t t = larger(first, real); t < end; t++)
        std::memset(at(call.dquery, call.dquery_at, row, head * group + g, t, element), 0, size_t(shape.head_dim * element));
    if (first >= real) return OK;
    PrefillTile work = {};
    work.group = group;
    work.rows = real - first;
    work.head_dim = shape.head_dim;
    work.value_dim = shape.value_dim;
    work.query = at(call.query, call.query_at, row, head * group, first, element);
    work.query_head_bytes = call.query_at.head * element;
    work.query_row_bytes = call.query_at.token * element;
    work.rule = call.rules.of(head);
    work.low = first + 1;
    work.source.columns = columns_of(work.low, real, work.rule);
    work.source.key = kv_part_of(NATIVE, shape.head_dim, element, KEYS);
    work.source.value = kv_part_of(NATIVE, shape.value_dim, element, VALUES);
    work.source.key_chunk = at(call.key, call.key_at, row, head, 0, element);
    work.source.value_chunk = at(call.value, call.value_at, row, head, 0, element);
    work.source.key_bytes = call.key_at.token * element;
    work.source.value_bytes = call.value_at.token * element;
    work.scaling = call.scores.scaling;
    work.softcap = call.scores.softcap;
    work.out = at(call.dquery, call.dquery_at, row, head * group, first, element);
    work.out_head_bytes = call.dquery_at.head * element;
    work.out_row_bytes = call.dquery_at.token * element;
    // `lse` is written by prefill and only read here
    work.lse = const_cast<float*>(call.lse) + pair * group * call.tokens + first;
    work.lse_head = call.tokens;
    work.delta = call.delta + pair * group * call.tokens + first;
    work.dout = at(call.dout, call.dout_at, row, head * group, first, element);
    work.dout_head_bytes = call.dout_at.head * element;
    work.dout_row_bytes = call.dout_at.token * element;
    return kernels.backward_query[shape.dtype](work, scratch) ? OK : MISSING_BLOCK;
  }

  void keys(int64_t tile, int64_t pair, float* scratch) const {
    const Shape& shape = call.shape;
    const int64_t row = pair / shape.kv_heads, head = pair % shape.kv_heads, group = shape.group, first = tile * TILE;
    const int64_t end = smaller(first + TILE, call.tokens), real = smaller(end, call.valid[row]);
    for (int64_t t = larger(first, real); t < end; t++) {
      std::memset(at(call.dkey, call.dkey_at, row, head, t, element), 0, size_t(shape.head_dim * element));
      std::memset(at(call.dvalue, call.dvalue_at, row, head, t, element), 0, size_t(shape.value_dim * element));
    }
    if (first >= real) return;
    KeyTile work = {};
    work.group = group;
    work.tokens = call.valid[row];
    work.first = first;
    work.count = real - first;
    work.head_dim = shape.head_dim;
    work.value_dim = shape.value_dim;
    work.rule = call.rules.of(head);
    work.query = at(call.query, call.query_at, row, head * group, 0, element);
    work.key = at(call.key, call.key_at, row, head, 0, element);
    work.value = at(call.value, call.value_at, row, head, 0, element);
    work.dout = at(call.dout, call.dout_at, row, head * group, 0, element);
    work.query_head_bytes = call.query_at.head * element;
    work.query_row_bytes = call.query_at.token * element;
    work.key_bytes = call.key_at.token * element;
    work.value_bytes = call.value_at.token * element;
    work.dout_head_bytes = call.dout_at.head * element;
    work.dout_row_bytes = call.dout_at.token * element;
    work.lse = call.lse + pair * group * call.tokens;
    work.delta = call.delta + pair * group * call.tokens;
    work.lse_head = call.tokens;
    work.scaling = call.scores.scaling;
    work.softcap = call.scores.softcap;
    work.dkey = at(call.dkey, call.dkey_at, row, head, 0, element);
    work.dvalue = at(call.dvalue, call.dvalue_at, row, head, 0, element);
    work.dkey_bytes = call.dkey_at.token * element;
    work.dvalue_bytes = call.dvalue_at.token * element;
    kernels.backward_key[shape.dtype](work, scratch);
  }

  Status run(int64_t index, float* scratch) const {
    const int64_t tile = index / pairs, pair = index % pairs;
    if (tile < query_tiles) return queries(query_tiles - 1 - tile, pair, scratch);
    keys(tile - query_tiles, pair, scratch);
    return OK;
  }
};

}  // namespace

Status backward(const BackwardCall& call, const Parallel& parallel, Isa isa) {
  const Shape& shape = call.shape;
  const int64_t rows = smaller(tile_rows(shape.group), larger(call.tokens, 1)), pairs = shape.rows * shape.kv_heads;
  const BackwardJob job = {call,  kernels_of(isa), rows, (call.tokens + rows - 1) / rows, (call.tokens + TILE - 1) / TILE,
                           pairs, int64_t(element_size(shape.dtype))};
  const size_t scratch = job.kernels.tile_scratch(shape.group * rows, shape.head_dim, shape.value_dim);
  const int64_t tasks = (job.query_tiles + job.key_tiles) * pairs;
  return run_tasks(parallel, tasks, scratch, [&](int64_t i, float* at) { return job.run(i, at); });
}

}  // namespace moacompress
