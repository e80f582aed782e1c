// Decode and prefill: what is visible, cut into tasks, and the results of decode's tasks put together.
#include <cmath>
#include <cstring>
#include <new>
#include <optional>

#include "tasks.h"

namespace moacompress {

// The segment that a block lies in, -1 for none.
static inline int64_t segment_of(const Pool& pool, int64_t id) {
  int64_t s = pool.segments - 1;
  while (s > 0 && id < pool.first_block[s]) s--;
  return s < 0 || id < 0 || id >= pool.first_block[s + 1] ? -1 : s;
}

int64_t part_bytes_of(const Pool& pool, int64_t id) {
  const int64_t s = segment_of(pool, id);
  return s < 0 ? -1 : pool.part_bytes[s];
}

const char* block_of(const Pool& pool, int64_t id, int64_t bytes) {
  const int64_t s = segment_of(pool, id);
  if (s < 0 || pool.part_bytes[s] != bytes) return nullptr;
  return static_cast<const char*>(pool.base[s]) + (id - pool.first_block[s]) * pool.block_stride[s];
}

namespace {

// A block that a query reads, and which of its tokens; whether it is one of those that hold what gates select.
struct Part {
  int64_t block, begin, end;
  bool selected;
};

// What the query of one (row, KV head) reads: a list of runs of tokens, and the blocks that they lie in, one run after the other.
// A block that two runs touch is read twice, each time for its own tokens. The last run is of what gates select, by its places.
struct Reads {
  Interval tokens[RUNS + 1];

  static int64_t blocks(const Interval& run) { return run.count() ? (run.end + BLOCK - 1) / BLOCK - run.begin / BLOCK : 0; }
  int64_t count() const {
    int64_t sum = 0;
    for (const Interval& run : tokens) sum += blocks(run);
    return sum;
  }
  Part part(int64_t i) const {
    int64_t at = 0;
    while (at < RUNS && i >= blocks(tokens[at])) i -= blocks(tokens[at++]);
    const int64_t block = tokens[at].begin / BLOCK + i, first = block * BLOCK;
    return {block, larger(tokens[at].begin - first, 0), smaller(tokens[at].end - first, BLOCK), at == RUNS};
  }
};

Reads reads_of(int64_t n, const Rule& rule) {
  const Visible see = visible(n, rule);
  return {{{see.first, see.sink_end}, {see.start, n}, {0, 0}}};
}

struct DecodeJob {
  const DecodeCall& call;
  const Kernels& kernels;
  int64_t pairs, stride;       // (row, KV head) pairs; floats of one task's result
  int64_t threads;             // that share the tasks
  int64_t* first_chunk;        // [pairs + 1] tasks of all pairs before
  std::atomic<int64_t>* left;  // [pairs] tasks that are not done
  float* partial;              // [tasks, stride]: peak [group], total [group], mixed [group, value_dim]
  const int64_t* first_kept;   // [pairs] the anchor's tasks of all its pairs before, where it kept weights

  Reads reads_of_pair(int64_t pair) const {
    const int64_t row = pair / call.shape.kv_heads;
    if (call.shared) return reads_of(call.lengths[row], call.shared->rules.of(pair_read(pair) % call.shape.kv_heads));
    const Rule rule = call.rules.of(pair % call.shape.kv_heads);
    Reads reads = reads_of(call.lengths[row], rule);
    if (call.selected && rule.selects()) reads.tokens[RUNS].end = selected_count(tokens_left(call.lengths[row], rule), rule);
    return reads;
  }

  // The id of a block that a pair reads, -1 where the table has none.
  int32_t id_of(int64_t pair, const Part& part) const {
    const int64_t from = pair_read(pair), width = part.selected ? call.selected->width : call.table.width;
    const int32_t* ids = part.selected ? call.selected->ids : call.table.ids;
    return part.block < width ? ids[from * width + part.block] : -1;
  }

  int64_t pair_of(int64_t chunk) const {  // the last pair whose first task is at most `chunk`
    int64_t low = 0, high = pairs;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }

  Status run(int64_t index, float* scratch) const {
    const Shape& shape = call.shape;
    const int64_t pair = pair_of(index), row = pair / shape.kv_heads, head = pair % shape.kv_heads;
    const int64_t element = int64_t(element_size(shape.dtype));
    const Reads reads = reads_of_pair(pair);
    DecodeChunk chunk = {};
    chunk.group = shape.group;
    chunk.head_dim = shape.head_dim;
    chunk.value_dim = shape.value_dim;
    const KVParts kv_parts = kv_parts_of(call.rules.of(head), shape);
    chunk.key = kv_parts.key;
    chunk.value = kv_parts.value;
    const int64_t from = pair_read(pair), kept = shape.group * KEPT;
    if (call.keep) chunk.keep = call.keep + index * kept;
    if (call.shared) {
      const Rule anchor = call.shared->rules.of(from % shape.kv_heads);
      chunk.kept = call.shared->kept + (first_kept[from] + index - first_chunk[pair]) * kept;
      chunk.kept_in_blocks = !anchor.native();
    }
    chunk.query =
        static_cast<const char*>(call.query) + (row * call.query_row + head * shape.group * call.query_head) * element;
    chunk.query_head = call.query_head;
    chunk.scaling = call.scores.scaling;
    chunk.softcap = call.scores.softcap;
    float* result = partial + index * stride;
    chunk.peak = result;
    chunk.total = result + shape.group;
    chunk.mixed = result + 2 * shape.group;
    chunk.scratch = scratch;
    const int64_t begin = (index - first_chunk[pair]) * CHUNK_BLOCKS;
    chunk.blocks = smaller(CHUNK_BLOCKS, reads.count() - begin);
    for (int64_t k = 0; k < chunk.blocks; k++) {
      const Part part = reads.part(begin + k);
      const int32_t id = id_of(pair, part);
      chunk.begin[k] = int(part.begin);
      chunk.end[k] = int(part.end);
      if (!chunk.kept && !(chunk.keys[k] = block_of(call.keys, id, chunk.key.bytes))) return MISSING_BLOCK;
      if (!(chunk.values[k] = block_of(values_of(head), id, chunk.value.bytes))) return MISSING_BLOCK;
    }
    if (index + threads < first_chunk[pairs]) find_coming(index + threads, chunk);
    kernels.decode[shape.dtype](chunk);
    if (left[pair].fetch_sub(1) == 1) merge(pair);
    return OK;
  }

  // The (row, KV head) whose blocks a pair reads.
  int64_t pair_read(int64_t pair) const {
    const int64_t head = pair % call.shape.kv_heads;
    return call.shared ? pair - head + call.shared->head_map[head] : pair;
  }
  const Pool& values_of(int64_t head) const { return call.shared ? call.shared->values[head] : call.values; }

  // Finds what another task begins with, keys or of kept weights values; what is not there stays null.
  void find_coming(int64_t index, DecodeChunk& chunk) const {
    const int64_t pair = pair_of(index), head = pair % call.shape.kv_heads, begin = (index - first_chunk[pair]) * CHUNK_BLOCKS;
    const KVParts kv_parts = kv_parts_of(call.rules.of(head), call.shape);
    chunk.coming_bytes = call.shared ? kv_parts.value.bytes : kv_parts.key.bytes;
    const Reads reads = reads_of_pair(pair);
    for (int64_t k = 0; k < smaller(AHEAD, reads.count() - begin); k++) {
      const int32_t id = id_of(pair, reads.part(begin + k));
      if (id >= 0) chunk.coming[k] = block_of(call.shared ? values_of(head) : call.keys, id, chunk.coming_bytes);
    }
  }

  // Puts the results of a pair's tasks together, in their order whichever thread comes last.
  void merge(int64_t pair) const {
    const Shape& shape = call.shape;
    const int64_t begin = first_chunk[pair], end = first_chunk[pair + 1];
    for (int64_t g = 0; g < shape.group; g++) {
      const int64_t head = pair % shape.kv_heads * shape.group + g, at = pair * shape.group + g;
      char* out = static_cast<char*>(call.out) + at * shape.value_dim * int64_t(element_size(shape.dtype));
      float peak = -INFINITY, total = 0.f;
      for (int64_t c = begin; c < end; c++) peak = std::fmax(peak, partial[c * stride + g]);
      const float* logit = begin < end && call.scores.sink_logits ? call.scores.sink_logits + head : nullptr;
      if (logit) peak = std::fmax(peak, *logit);
      const float base = peak == -INFINITY ? 0.f : peak;  // so that the weights of minus infinity are zero
      if (logit) total = std::exp(*logit - base);
      float* mixed = partial + begin * stride + 2 * shape.group + g * shape.value_dim;
      for (int64_t c = begin; c < end; c++) {
        const float* part = partial + c * stride;
        const float weight = std::exp(part[g] - base);
        total += weight * part[shape.group + g];
        part += 2 * shape.group + g * shape.value_dim;
        for (int64_t d = 0; d < shape.value_dim; d++) mixed[d] = c == begin ? weight * part[d] : mixed[d] + weight * part[d];
      }
      if (begin < end) {
        for (int64_t d = 0; d < shape.value_dim; d++) mixed[d] /= total;
        if (call.rules.of(pair % shape.kv_heads).value_format != NATIVE) kernels.hadamard(mixed, shape.value_dim);
        kernels.narrow[shape.dtype](mixed, shape.value_dim, out);
      } else {
        std::memset(out, 0, size_t(shape.value_dim) * element_size(shape.dtype));
      }
      if (call.lse) call.lse[at] = begin < end ? peak + std::log(total) : -INFINITY;
    }
  }
};

// The chunk of a prefill as codes, of the KV heads that keep codes: K and V parts of blocks, from the chunk's first token on.
struct CodedChunk {
  const PrefillCall& call;
  const Kernels& kernels;
  const Buffer<int64_t> begins;  // [2, kv_heads + 1] of each head's keys in `memory`, then of its values
  std::optional<Buffer<char>> memory;

  CodedChunk(const PrefillCall& call, const Kernels& kernels)
      : call(call), kernels(kernels), begins(size_t(2 * (call.shape.kv_heads + 1))) {
    if (!begins.get()) return;
    int64_t sum = 0;
    for (int64_t side = 0; side < 2; side++)
      for (int64_t head = 0; head <= call.shape.kv_heads; head++) {
        begins[size_t(side * (call.shape.kv_heads + 1) + head)] = sum;
        if (head == call.shape.kv_heads) continue;
        const KVPart kv_part = kv_part_at(side, head);
        if (kv_part.format != NATIVE) sum += blocks() * kv_part.bytes;
      }
    row_bytes = sum;
    memory.emplace(size_t(sum * call.shape.rows));
  }

  int64_t row_bytes = 0;
  bool there() const { return begins.get() && memory->get(); }
  int64_t blocks() const { return (call.tokens + BLOCK - 1) / BLOCK; }
  KVPart kv_part_at(int64_t side, int64_t head) const {
    const KVParts kv_parts = kv_parts_of(call.rules.of(head), call.shape);
    return side == 0 ? kv_parts.key : kv_parts.value;
  }
  char* of(int64_t side, int64_t row, int64_t head) const {
    return memory->get() + row * row_bytes + begins[size_t(side * (call.shape.kv_heads + 1) + head)];
  }

  // Makes the codes of one block of one (row, KV head).
  Status encode(int64_t index, float* buffer) const {
    const int64_t block = index % blocks(), pair = index / blocks();
    const int64_t row = pair / call.shape.kv_heads, head = pair % call.shape.kv_heads;
    const int64_t element = int64_t(element_size(call.shape.dtype)), end = smaller((block + 1) * BLOCK, call.valid[row]);
    for (int64_t side = 0; side < 2; side++) {
      const KVPart kv_part = kv_part_at(side, head);
      if (kv_part.format == NATIVE) continue;
      const Strides& at = side == 0 ? call.key_at : call.value_at;
      const char* from = static_cast<const char*>(side == 0 ? call.key : call.value) + (row * at.row + head * at.head) * element;
      for (int64_t t = block * BLOCK; t < end; t++)
        kernels.encode[call.shape.dtype](from + t * at.token * element, kv_part, t % BLOCK, of(side, row, head) + block * kv_part.bytes, buffer);
    }
    return OK;
  }
};

struct PrefillJob {
  const PrefillCall& call;
  const Kernels& kernels;
  const CodedChunk& coded;
  int64_t rows, tiles;  // query rows of a tile; tiles of a row

  Status run(int64_t index, float* scratch) const {
    const Shape& shape = call.shape;
    const int64_t element = int64_t(element_size(shape.dtype));
    // the last tiles see the most keys in the mean: they come first, so that no thread is left with a long one
    const int64_t tile = tiles - 1 - index / (shape.rows * shape.kv_heads), pair = index % (shape.rows * shape.kv_heads);
    const int64_t row = pair / shape.kv_heads, head = pair % shape.kv_heads, first = tile * rows;
    const int64_t end = smaller(first + rows, call.tokens), real = smaller(end, call.valid[row]);
    char* out = static_cast<char*>(call.out) + (row * call.out_at.row + head * shape.group * call.out_at.head) * element;
    float* lse = call.lse + pair * shape.group * call.tokens;
    for (int64_t g = 0; g < shape.group; g++)
      for (int64_t t = larger(first, real); t < end; t++) {
        std::memset(out + (g * call.out_at.head + t * call.out_at.token) * element, 0, size_t(shape.value_dim * element));
        lse[g * call.tokens + t] = -INFINITY;
      }
    if (first >= real) return OK;
    const int64_t past = call.past[row];
    PrefillTile work = {};
    work.group = shape.group;
    work.rows = real - first;
    work.head_dim = shape.head_dim;
    work.value_dim = shape.value_dim;
    const Strides &q = call.query_at, &k = call.key_at, &v = call.value_at;
    work.query =
        static_cast<const char*>(call.query) + (row * q.row + head * shape.group * q.head + first * q.token) * element;
    work.query_head_bytes = q.head * element;
    work.query_row_bytes = q.token * element;
    work.rule = call.rules.of(head);
    work.low = past + first + 1;
    work.source.columns = columns_of(work.low, past + real, work.rule);
    work.source.past = past;
    work.source.ids = call.table.ids + pair * call.table.width;
    work.source.width = call.table.width;
    work.source.keys = &call.keys;
    work.source.values = &call.values;
    const KVParts kv_parts = kv_parts_of(work.rule, shape);
    work.source.key = kv_parts.key;
    work.source.value = kv_parts.value;
    const auto find = [&](const KVPart& kv_part, int64_t side, const void* chunk, const Strides& at, const char*& from, int64_t& bytes) {
      const bool native = kv_part.format == NATIVE;
      from = native ? static_cast<const char*>(chunk) + (row * at.row + head * at.head) * element : coded.of(side, row, head);
      bytes = native ? at.token * element : kv_part.bytes;
    };
    find(kv_parts.key, 0, call.key, k, work.source.key_chunk, work.source.key_bytes);
    find(kv_parts.value, 1, call.value, v, work.source.value_chunk, work.source.value_bytes);
    if (call.transient) work.transient = call.transient->of(pair);
    work.scaling = call.scores.scaling;
    work.softcap = call.scores.softcap;
    work.sink_logits = call.scores.sink_logits ? call.scores.sink_logits + head * shape.group : nullptr;
    work.out = out + first * call.out_at.token * element;
    work.out_head_bytes = call.out_at.head * element;
    work.out_row_bytes = call.out_at.token * element;
    work.lse = lse + first;
    work.lse_head = call.tokens;
    const auto& tiles_of = work.rule.native() ? kernels.prefill : kernels.prefill_codes;
    return tiles_of[shape.dtype](work, scratch) ? OK : MISSING_BLOCK;
  }
};

}  // namespace

// Where the row of a token lies, or of codes the part of the block that it is in.
static const char* in_block(const KVPart& kv_part, const char* at, int64_t place) {
  return kv_part.format == NATIVE ? at + place * kv_part.token_bytes : at;
}
static const char* in_chunk(const KVPart& kv_part, const char* at, int64_t bytes, int64_t token) {
  return at + (kv_part.format == NATIVE ? token : token / BLOCK) * bytes;
}

bool find_slots(const RowSource& source, const int64_t* slots, int64_t count, const void** keys, const void** values, int* places) {
  for (int64_t i = 0; i < count; i++) {
    const bool cached = slots[i] >= 0;
    const int64_t token = cached ? slots[i] : -1 - slots[i];
    places[i] = int(token % BLOCK);
    if (!cached) {
      keys[i] = in_chunk(source.key, source.key_chunk, source.key_bytes, token);
      values[i] = in_chunk(source.value, source.value_chunk, source.value_bytes, token);
      continue;
    }
    const char* key = block_of(*source.keys, token / BLOCK, source.key.bytes);
    const char* value = block_of(*source.values, token / BLOCK, source.value.bytes);
    if (!key || !value) return false;
    keys[i] = in_block(source.key, key, places[i]);
    values[i] = in_block(source.value, value, places[i]);
  }
  return true;
}

bool find_rows(const RowSource& source, int64_t column, int64_t count, const void** keys, const void** values, int* places) {
  const char *key = nullptr, *value = nullptr;
  int64_t block = -1;
  for (int64_t i = 0; i < count; i++) {
    const int64_t position = source.columns.position(column + i), ahead = position - source.past;
    if (ahead >= 0) {
      keys[i] = in_chunk(source.key, source.key_chunk, source.key_bytes, ahead);
      values[i] = in_chunk(source.value, source.value_chunk, source.value_bytes, ahead);
      places[i] = int(ahead % BLOCK);
      continue;
    }
    if (position / BLOCK != block) {
      block = position / BLOCK;
      const int32_t id = block < source.width ? source.ids[block] : -1;
      key = block_of(*source.keys, id, source.key.bytes);
      value = block_of(*source.values, id, source.value.bytes);
      if (!key || !value) return false;
    }
    places[i] = int(position % BLOCK);
    keys[i] = in_block(source.key, key, places[i]);
    values[i] = in_block(source.value, value, places[i]);
  }
  return true;
}

void put_token(const Kernels& kernels, DType dtype, const KVPart& kv_part, const void* from, int64_t place, char* to, float* buffer) {
  if (kv_part.format == NATIVE) std::memcpy(to + place * kv_part.token_bytes, from, size_t(kv_part.token_bytes));
  else kernels.encode[dtype](from, kv_part, place, to, buffer);
}

Status put(const PutCall& call, const Parallel& parallel, Isa isa) {
  const Kernels& kernels = kernels_of(isa);
  constexpr int64_t TOKENS = 256;  // of a task
  const int64_t tasks = (call.count + TOKENS - 1) / TOKENS, element = int64_t(element_size(call.dtype));
  return run_tasks(parallel, tasks * call.parts, size_t(call.kv_parts[0].dim + 16), [&](int64_t task, float* buffer) {
    const int64_t part = task % call.parts, begin = task / call.parts * TOKENS;
    for (int64_t i = begin; i < smaller(begin + TOKENS, call.count); i++) {
      const char* from = static_cast<const char*>(call.from) + (i * call.token + part * call.part) * element;
      const int64_t slot = call.slots[i * call.parts + part];
      put_token(kernels, call.dtype, call.kv_parts[part], from, slot % BLOCK, call.to[part] + slot / BLOCK * call.to_block[part], buffer);
    }
    return OK;
  });
}

static int64_t tasks_of(int64_t n, const Rule& rule) { return (reads_of(n, rule).count() + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS; }

size_t kept_floats(const DecodeCall& call) {
  int64_t tasks = 0;
  for (int64_t row = 0; row < call.shape.rows; row++)
    for (int64_t head = 0; head < call.shape.kv_heads; head++) tasks += tasks_of(call.lengths[row], call.rules.of(head));
  return size_t(tasks * call.shape.group * KEPT);
}

Status decode(const DecodeCall& call, const Parallel& parallel, Isa isa) {
  const Shape& shape = call.shape;
  const int64_t pairs = shape.rows * shape.kv_heads, stride = shape.group * (2 + shape.value_dim);
  const Buffer<int64_t> first_chunk(size_t(pairs + 1));
  const Buffer<std::atomic<int64_t>> left(static_cast<size_t>(pairs));
  if (!first_chunk.get() || !left.get()) return NO_MEMORY;
  const Buffer<int64_t> first_kept(size_t(pairs + 1));
  if (!first_kept.get()) return NO_MEMORY;
  DecodeJob job = {call, kernels_of(isa), pairs, stride, parallel.threads, first_chunk.get(), left.get(), nullptr, first_kept.get()};
  for (int64_t pair = 0, sum = 0; call.shared && pair < pairs; pair++) {
    first_kept[size_t(pair)] = sum;
    sum += tasks_of(call.lengths[pair / shape.kv_heads], call.shared->rules.of(pair % shape.kv_heads));
  }
  first_chunk[0] = 0;
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t chunks = (job.reads_of_pair(pair).count() + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    first_chunk[size_t(pair) + 1] = first_chunk[size_t(pair)] + chunks;
    new (&left[size_t(pair)]) std::atomic<int64_t>(chunks);
    if (chunks == 0) job.merge(pair);
  }
  const int64_t tasks = first_chunk[size_t(pairs)];
  const Buffer<float> partial(size_t(tasks * stride));
  if (!partial.get()) return NO_MEMORY;
  job.partial = partial.get();
  const size_t scratch = job.kernels.decode_scratch(shape.group, shape.head_dim);
  return run_tasks(parallel, tasks, scratch, [&](int64_t i, float* at) { return job.run(i, at); });
}

Status prefill(const PrefillCall& call, const Parallel& parallel, Isa isa) {
  const Shape& shape = call.shape;
  const int64_t rows = smaller(tile_rows(shape.group), larger(call.tokens, 1));
  const CodedChunk coded(call, kernels_of(isa));
  if (!coded.there()) return NO_MEMORY;
  if (coded.row_bytes) {
    const auto encode = [&](int64_t i, float* at) { return coded.encode(i, at); };
    const size_t buffer = size_t(larger(shape.head_dim, shape.value_dim) + 16);
    const Status status = run_tasks(parallel, coded.blocks() * shape.rows * shape.kv_heads, buffer, encode);
    if (status != OK) return status;
  }
  const PrefillJob job = {call, kernels_of(isa), coded, rows, (call.tokens + rows - 1) / rows};
  const size_t scratch = job.kernels.tile_scratch(shape.group * rows, shape.head_dim, shape.value_dim);
  const int64_t tasks = job.tiles * shape.rows * shape.kv_heads;
  return run_tasks(parallel, tasks, scratch, [&](int64_t i, float* at) { return job.run(i, at); });
}

}  // namespace moacompress
