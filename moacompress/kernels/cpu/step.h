// A decode step's parts as the operators are given them: what they are checked to be once, and what is then done with them.
#pragma once
#include <cmath>
#include <cstring>

#include "binding.h"
#include "tasks.h"

namespace moacompress {

// KV heads that a number of what a step lacks has place for.
constexpr int64_t SHORTFALL_HEADS = 1 << 16;

// A layer's cache and the rules it is kept by. Views of tensors that must outlive it.
struct LayerCache {
  PoolViews keys, values;
  int32_t* ids;
  int64_t width, *lengths, *runs;
  int32_t* refs;
  int64_t blocks, lag;
  Rest rest;
  // values of layers that share the keys: value sets, views of them, and of each KV head the bytes of their parts
  std::vector<PoolViews> shared_values{};
  std::vector<Pool> value_sets{};
  std::vector<int64_t> shared_value_bytes{};
  // the tokens that gates select; or no ids
  Selected selected{};

  LayerCache(const Tensors& keys, const Tensors& values, const Tensor& table, const Tensor& lengths, const Tensor& runs,
             const Tensor& refs, const Rest& rest, int64_t lag, const Shape& shape, ScalarType type, const char* op)
      : keys(keys, shape.head_dim, type, op, "keys"), values(values, shape.value_dim, type, op, "values"), lag(lag), rest(rest) {
    REQUIRE(!keys.empty() && keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(),
            " of values; at least one of each, and as many, are needed");
    dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
    dense(runs, {RUNS, 2, shape.rows, shape.kv_heads}, ScalarType::Long, op, "runs");
    dense(refs, {-1}, ScalarType::Int, op, "refs");
    numbers(lengths, shape.rows, op, "lengths");
    blocks = refs.size(0);
    REQUIRE(this->keys.first_block.back() == blocks && this->values.first_block.back() == blocks, op, ": the pool has ",
            this->keys.first_block.back(), " blocks of keys and ", this->values.first_block.back(),
            " of values, refs counts ", blocks);
    REQUIRE(lag >= 0, op, ": lag is ", lag);
    REQUIRE(shape.kv_heads < SHORTFALL_HEADS, op, ": ", shape.kv_heads, " KV heads; at most ", SHORTFALL_HEADS - 1);
    ids = static_cast<int32_t*>(table.mutable_data_ptr());
    width = table.size(2);
    this->lengths = static_cast<int64_t*>(lengths.mutable_data_ptr());
    this->runs = static_cast<int64_t*>(runs.mutable_data_ptr());
    this->refs = static_cast<int32_t*>(refs.mutable_data_ptr());
  }
};

// Puts into a cache what it has of the tokens that gates select: of each segment the tokens' scores, the table of what is kept, and how
// many tokens have left.
inline void put_selected(LayerCache& cache, const Shape& shape, const Tensors& scores, const Tensor& table, const Tensor& left, const char* op) {
  REQUIRE(scores.size() == cache.keys.base.size(), op, ": ", scores.size(), " segments of scores, of ", cache.keys.base.size());
  dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "the table of what gates select");
  dense(left, {shape.rows, shape.kv_heads}, ScalarType::Long, op, "the tokens that have left");
  cache.selected = {static_cast<int32_t*>(table.mutable_data_ptr()), table.size(2), static_cast<int64_t*>(left.mutable_data_ptr()), nullptr};
  cache.shared_values.push_back(PoolViews::of_bytes(scores, SCORE_BYTES * BLOCK, op, "scores"));
  REQUIRE(cache.shared_values.back().first_block.back() == cache.blocks, op, ": scores of ", cache.shared_values.back().first_block.back(),
          " blocks of ", cache.blocks);
  cache.value_sets.push_back(cache.shared_values.back().view());
  for (int64_t head = 0; head < shape.kv_heads; head++)
    cache.shared_value_bytes.push_back(cache.rest.rules.of(head).selects() ? SCORE_BYTES * BLOCK : 0);
}

// Memory that a layer works in; grows to what the largest one wants.
struct Scratch {
  std::optional<Buffer<char>> held;
  size_t bytes = 0;

  char* of(size_t wanted, const char* op) {
    if (!held || wanted > bytes) held.emplace(bytes = wanted);
    REQUIRE(held->get(), op, ": no memory for ", wanted, " bytes");
    return held->get();
  }
};

// How a layer shares attention: with which earlier one; and of each KV head whose weights it takes, and in which value set beside the
// anchor's values its own are.
struct Reuse {
  int64_t anchor;
  std::vector<int64_t> head_map, value_sets;
};

// One token of every row.
struct Token {
  Shape shape;
  const void *query, *key, *value;
  Strides query_at, key_at, value_at;
  const void* hidden = nullptr;  // what it was made of, [rows, inputs], where it was
};

// The gate of a layer: of each KV head a linear probe of what enters the layer.
struct Gate {
  const void *weight, *bias;  // [kv_heads, inputs], [kv_heads]
  int64_t heads, inputs;      // no heads where there is no gate

  // Scores tokens, in 1/256: to int16 [rows, kv_heads], as `runtime.gate` rounds them.
  void score(const void* hidden, DType dtype, int64_t rows, int16_t* to) const {
    const int64_t element = int64_t(element_size(dtype));
    std::vector<float> x(static_cast<size_t>(inputs)), own(static_cast<size_t>(inputs));
    for (int64_t head = 0; head < heads; head++) {
      const char* probe = static_cast<const char*>(weight) + head * inputs * element;
      for (int64_t i = 0; i < inputs; i++) own[size_t(i)] = number_at(probe, i, dtype);
      for (int64_t row = 0; row < rows; row++) {
        const char* from = static_cast<const char*>(hidden) + row * inputs * element;
        for (int64_t i = 0; i < inputs; i++) x[size_t(i)] = number_at(from, i, dtype);
        float parts[8] = {};
        int64_t i = 0;
        for (; i + 8 <= inputs; i += 8)
          for (int64_t part = 0; part < 8; part++) parts[part] += own[size_t(i + part)] * x[size_t(i + part)];
        float sum = number_at(static_cast<const char*>(bias), head, dtype);
        for (; i < inputs; i++) sum += own[size_t(i)] * x[size_t(i)];
        for (const float part : parts) sum += part;
        const float score = std::nearbyint(sum * 256.f);
        constexpr float LIMIT = 32767.f;
        to[row * heads + head] = std::isnan(score) ? int16_t(-LIMIT) : int16_t(std::fmin(std::fmax(score, -LIMIT), LIMIT));
      }
    }
  }

  // A number of a row, in float32.
  static float number_at(const char* row, int64_t i, DType dtype) {
    if (dtype == F32) return reinterpret_cast<const float*>(row)[i];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[i];
    uint32_t wide = bits << 16;
    if (dtype == F16) {
      const uint32_t sign = (bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      if (exponent == 0) {
        const float small = std::ldexp(float(fraction), -24);
        return sign ? -small : small;
      }
      wide = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    }
    float found;
    std::memcpy(&found, &wide, sizeof(found));
    return found;
  }
};

// Takes a token into a cache and attends, to `out`, [rows, heads, value_dim]; weights go to `kept`, if there is one, for layers that
// copy them. Returns 0; or, when nothing is done yet, 1 where the table is too narrow, and 1 + n * ROOM_HEADS + h where the pool lacks
// n blocks of the formats of KV head h.
// Where gates keep tokens, `scores` are those of the token, [rows, kv_heads].
inline int64_t take(const LayerCache& cache, const Token& token, void* out, const char* op, Scratch* kept = nullptr,
                    const int16_t* scores = nullptr) {
  const Shape& shape = token.shape;
  for (int64_t row = 0; row < shape.rows; row++)
    REQUIRE(cache.lengths[row] >= 0 && cache.lengths[row] + 1 < MAX_TOKENS, op, ": row ", row, " has ", cache.lengths[row],
            " tokens");
  enter(APPEND);
  const Rest& rest = cache.rest;
  Missing missing;
  Selected selected = cache.selected;
  selected.scores = scores;
  const Selected* choosing = selected.ids ? &selected : nullptr;
  check_status(advance({shape, rest.rules, cache.lag, token.key, token.value, token.key_at, token.value_at, cache.keys.view(),
                        cache.values.view(), cache.ids, cache.width, cache.lengths, cache.runs, cache.refs, cache.blocks,
                        int64_t(cache.value_sets.size()), cache.value_sets.data(), cache.shared_value_bytes.data(), choosing},
                       isa(), missing),
               op);
  if (missing.blocks == TABLE_TOO_NARROW) return 1;
  if (missing.blocks) return 1 + missing.blocks * SHORTFALL_HEADS + missing.head;
  DecodeCall call = {shape, rest.rules, rest.scores, token.query, token.query_at.row, token.query_at.head, cache.keys.view(),
                     cache.values.view(), {cache.ids, cache.width}, cache.lengths, out, nullptr, nullptr, nullptr, choosing};
  enter(ATTENTION);
  if (kept) call.keep = reinterpret_cast<float*>(kept->of(kept_floats(call) * sizeof(float), op));
  check_status(decode(call, parallel(), isa()), op);
  return 0;
}

// The same of a layer that shares attention, once its anchor has taken the token in; always 0.
inline int64_t take_shared(const LayerCache& anchor, const Reuse& reuse, const Rest& rest, const Token& token, Scratch& kept, void* out,
                           const char* op) {
  enter(APPEND);
  std::vector<Pool> values;
  for (const int64_t value_set : reuse.value_sets) values.push_back(anchor.value_sets[size_t(value_set)]);
  const Table table = {anchor.ids, anchor.width};
  check_status(put_shared_values({token.shape, rest.rules, token.value, token.value_at, reuse.head_map.data(), values.data(), table,
                           anchor.lengths},
                          isa()),
               op);
  enter(ATTENTION);
  const auto* weights = reinterpret_cast<const float*>(kept.of(0, op));
  const Shared shared = {reuse.head_map.data(), values.data(), anchor.rest.rules, weights};
  check_status(decode({token.shape, rest.rules, rest.scores, token.query, token.query_at.row, token.query_at.head, anchor.keys.view(),
                       anchor.values.view(), table, anchor.lengths, out, nullptr, nullptr, &shared},
                      parallel(), isa()),
               op);
  return 0;
}

// Kinds of weights by their codes, `weight_blocks.WEIGHT_TYPES`; PLAIN of all where none are given.
inline std::vector<WeightKind> kinds_of(const Shapes& codes, size_t count, const char* op) {
  REQUIRE(codes.empty() || codes.size() == count, op, ": ", codes.size(), " kinds of ", count, " weights; one of each or none are needed");
  std::vector<WeightKind> found(count, PLAIN);
  for (size_t i = 0; i < codes.size(); i++) {
    REQUIRE(codes[i] >= PLAIN && codes[i] < WEIGHT_KINDS, op, ": weight ", i, " is of the kind ", codes[i], "; known are 0 to ", WEIGHT_KINDS - 1);
    found[i] = WeightKind(codes[i]);
  }
  return found;
}

// Checks a weight in blocks, [outputs, bytes], and returns where it is.
inline const void* blocks_of(const Tensor& weight, int64_t inputs, WeightKind kind, const char* op) {
  const BlockSize size = block_size(kind);
  REQUIRE(inputs % size.numbers == 0, op, ": ", inputs, " inputs are no multiple of the ", size.numbers, " numbers of a block");
  return dense(weight, {-1, weight_row_bytes(kind, inputs, 0)}, ScalarType::Byte, op, "weight");
}

// Checks a linear layer of `inputs` and returns its call; rows, input and output are for the caller to put in.
inline LinearCall linear_call(ScalarType type, DType dtype, int64_t inputs, const Tensor& weight, const Tensor* bias, const char* op,
                              WeightKind kind = PLAIN) {
  const void* from = kind == PLAIN ? dense(weight, {-1, inputs}, type, op, "weight") : blocks_of(weight, inputs, kind, op);
  const int64_t outputs = weight.size(0);
  const void* added = bias ? dense(*bias, {outputs}, type, op, "bias") : nullptr;
  return {dtype, 0, inputs, outputs, nullptr, from, added, nullptr, nullptr, nullptr, kind};
}

inline void run(const LinearCall* calls, int64_t count, const char* op) {
  check_status(linear(calls, count, parallel(), isa()), op);
}

// Bytes of some numbers, on lines of the processor's cache of their own.
inline size_t bytes_of(DType dtype, int64_t count) { return (size_t(count) * element_size(dtype) + 63) / 64 * 64; }

// The input of a step, [rows, 1, inputs], contiguous.
inline Tensor one_token(const Tensor& x, const char* op) {
  check(x, {-1, 1, -1}, x.scalar_type(), op, "the input");
  return contiguous(x);
}

// Rotary position embeddings of one token, for `rows` rows or for all alike.
struct Rotary {
  const void *cos, *sin;
  int64_t cos_row, sin_row;

  Rotary(const Tensor& cos, const Tensor& sin, int64_t rows, int64_t dim, ScalarType type, const char* op)
      : cos(cos.const_data_ptr()), sin(sin.const_data_ptr()) {
    REQUIRE(dim > 0 && dim % 2 == 0, op, ": the rotary embeddings have ", dim, " dimensions, not an even number");
    for (const Tensor* t : {&cos, &sin}) {
      check_rows(*t, {-1, 1, dim}, type, op, t == &cos ? "cos" : "sin");
      REQUIRE(t->size(0) == rows || t->size(0) == 1, op, ": rotary embeddings of ", t->size(0), " rows for ", rows);
    }
    cos_row = cos.size(0) == 1 ? 0 : cos.stride(0);
    sin_row = sin.size(0) == 1 ? 0 : sin.stride(0);
  }
};

// What makes the queries, keys and values of one token: three weights, and three biases or null. Of a layer that shares attention the
// weights of its queries and keys have no rows.
struct Projections {
  LinearCall calls[3];
  Shape shape;  // of the heads; rows are those of a step
  const float* centre = nullptr;  // what rotated keys lie less, [kv_heads, head_dim]; null for nothing

  Projections(const Tensor* weights, const Tensor* biases, int64_t inputs, int64_t kv_heads, int64_t dim, ScalarType type,
              DType dtype, const char* op, const WeightKind* kinds, const Shape* anchor = nullptr) {
    REQUIRE(kv_heads > 0 && dim > 0, op, ": ", kv_heads, " KV heads of ", dim);
    for (size_t i = 0; i < 3; i++) calls[i] = linear_call(type, dtype, inputs, weights[i], biases ? &biases[i] : nullptr, op, kinds[i]);
    if (anchor) {
      shape = *anchor;
      const int64_t values = shape.kv_heads * shape.value_dim;
      REQUIRE(kv_heads == shape.kv_heads && calls[0].outputs == 0 && calls[1].outputs == 0 && calls[2].outputs == values,
              op, ": the weights of a layer that shares attention have ", calls[0].outputs, ", ", calls[1].outputs, " and ",
              calls[2].outputs, " outputs, not 0, 0 and ", values);
      return;
    }
    for (size_t i = 0; i < 3; i++) {
      const int64_t of = i == 2 ? kv_heads : kv_heads * dim;
      REQUIRE(calls[i].outputs > 0 && calls[i].outputs % of == 0 && (i != 1 || calls[i].outputs == of), op, ": weight ", i,
              " has ", calls[i].outputs, " outputs, for ", kv_heads, " KV heads of ", dim);
    }
    shape = {dtype, 0, kv_heads, calls[0].outputs / (kv_heads * dim), dim, calls[2].outputs / kv_heads};
  }

  // Takes a centre, or one of no numbers.
  void take_centre(const Tensor& given, const char* op) {
    if (given.numel() == 0) return;
    centre = static_cast<const float*>(dense(given, {shape.kv_heads, shape.head_dim}, ScalarType::Float, op, "the centre of the keys"));
  }

  size_t bytes(int64_t rows) const {  // that a token takes
    size_t sum = 0;
    for (const LinearCall& call : calls) sum += bytes_of(shape.dtype, rows * call.outputs);
    return sum;
  }

  // Makes the token of `x`, [rows, inputs], in `bytes` of memory.
  Token make(const void* x, int64_t rows, const Rotary& rotary, char* to, const char* op) const {
    enter(PROJECTIONS);
    LinearCall now[3];
    for (size_t i = 0; i < 3; i++) {
      now[i] = calls[i];
      now[i].rows = rows;
      now[i].x = x;
      now[i].out = to;
      to += bytes_of(shape.dtype, rows * now[i].outputs);
    }
    LinearCall made[3];
    int64_t count = 0;
    for (const LinearCall& call : now)
      if (call.outputs) made[count++] = call;
    run(made, count, op);
    enter(ROTARY);
    for (size_t i = 0; i < 2 && now[i].outputs; i++)
      rotate({shape.dtype, rows, now[i].outputs / shape.head_dim, shape.head_dim, now[i].out, rotary.cos, rotary.sin,
              rotary.cos_row, rotary.sin_row, i == 1 ? centre : nullptr},
             isa());
    const auto at = [&](size_t i, int64_t dim) { return Strides{now[i].outputs, dim, now[i].outputs}; };
    Token token = {shape, now[0].out, now[1].out, now[2].out, at(0, shape.head_dim), at(1, shape.head_dim), at(2, shape.value_dim)};
    token.shape.rows = rows;
    token.hidden = x;
    return token;
  }
};

// The weights of a decoder layer, attention and a gated feed-forward, each after a norm and beside the residual stream: seven
// weights, three biases or null, and two norms.
struct DecoderLayer {
  Projections projections;
  LinearCall output, gate, last;
  const void* scales[2];
  float eps;

  DecoderLayer(const Tensor* weights, const Tensor* biases, const Tensor* norms, double eps, int64_t inputs, int64_t kv_heads,
               int64_t dim, ScalarType type, DType dtype, const char* op, const WeightKind* kinds, const Shape* anchor = nullptr)
      : projections(weights, biases, inputs, kv_heads, dim, type, dtype, op, kinds, anchor), eps(float(eps)) {
    REQUIRE(eps >= 0, op, ": eps is ", eps);
    for (size_t i = 0; i < 2; i++) scales[i] = dense(norms[i], {inputs}, type, op, "a norm");
    const Shape& shape = projections.shape;
    output = linear_call(type, dtype, shape.kv_heads * shape.group * shape.value_dim, weights[3], nullptr, op, kinds[3]);
    gate = linear_call(type, dtype, inputs, weights[4], nullptr, op, kinds[4]);
    const LinearCall up = linear_call(type, dtype, inputs, weights[5], nullptr, op, kinds[5]);
    last = linear_call(type, dtype, gate.outputs, weights[6], nullptr, op, kinds[6]);
    REQUIRE(up.outputs == gate.outputs && output.outputs == inputs && last.outputs == inputs, op,
            ": the weights after attention have ", output.outputs, ", ", gate.outputs, ", ", up.outputs, " and ",
            last.outputs, " outputs; the first and last must be ", inputs, ", the others alike");
    gate.up = up.weight;
    gate.up_kind = up.kind;
  }

  // One token of every row: `x` to `out`, [rows, inputs] each. `attend` is given the token and where its attention goes, and returns as
  // `take`; so does this.
  template <class Attend>
  int64_t step(const Attend& attend, const Rotary& rotary, int64_t rows, const void* x, void* out, Scratch& memory, const char* op) const {
    const DType dtype = output.dtype;
    const int64_t inputs = output.outputs;
    const size_t heads = projections.bytes(rows), attended = bytes_of(dtype, rows * output.inputs), wide = bytes_of(dtype, rows * inputs);
    char* const parts = memory.of(heads + attended + 2 * wide + bytes_of(dtype, rows * gate.outputs), op);
    char *mixed = parts + heads, *normed = mixed + attended, *hidden = normed + wide, *gated = hidden + wide;
    const auto normalize = [&](const void* from, const void* scale) { norm({dtype, rows, inputs, from, scale, eps, normed}, isa()); };
    const auto product = [&](LinearCall call, const void* from, void* to, const void* residual) {
      call.rows = rows;
      call.x = from;
      call.out = to;
      call.residual = residual;
      run(&call, 1, op);
    };
    enter(NORMS);
    normalize(x, scales[0]);
    if (const int64_t wanted = attend(projections.make(normed, rows, rotary, parts, op), mixed)) return wanted;
    enter(OUTPUT);
    product(output, mixed, hidden, x);
    enter(NORMS);
    normalize(hidden, scales[1]);
    enter(MLP);
    product(gate, normed, gated, nullptr);
    product(last, gated, out, hidden);
    enter(REST);
    return 0;
  }
};

}  // namespace moacompress
