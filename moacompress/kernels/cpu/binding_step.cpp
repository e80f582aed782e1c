// Operators of a decode step: products of a few rows, one more token in the cache and attention to it, and a whole layer.
#include "step.h"

namespace {

using namespace moacompress;

// What the operators are given of a layer's cache.
struct State {
  const Tensors &keys, &values;
  const Tensor &table, &lengths, &runs, &refs, &rules;
  int64_t lag;
  double scaling, softcap;
  const std::optional<Tensor>& sink_logits;

  LayerCache of(const Shape& shape, ScalarType type, const char* op, bool scored = false) const {
    const Rest rest = rest_of(rules, scaling, softcap, sink_logits, shape, op);
    REQUIRE(scored || !any_selects(rest.rules), op, ": rules keep tokens by their score, and there are no scores");
    return {keys, values, table, lengths, runs, refs, rest, lag, shape, type, op};
  }
};

std::tuple<Tensor, int64_t> step_op(Tensor query, Tensor key, Tensor value, Tensors keys, Tensors values, Tensor table,
                                    Tensor lengths, Tensor runs, Tensor refs, Tensor rules, int64_t lag, double scaling, double softcap,
                                    std::optional<Tensor> sink_logits, Tensors selected, std::optional<Tensor> scores) {
  const char* op = "step";
  const TracedStep traced(REST);
  const Shape shape = chunk_shape(query, key, value, op, 1);
  const State state = {keys, values, table, lengths, runs, refs, rules, lag, scaling, softcap, sink_logits};
  LayerCache cache = state.of(shape, query.scalar_type(), op, scores.has_value());
  const int16_t* of_token = nullptr;
  if (scores) {  // what gates select: the table, how many have left, and the segments of scores
    REQUIRE(selected.size() > 2, op, ": ", selected.size(), " parts of what gates select; at least 3 are needed");
    put_selected(cache, shape, Tensors(selected.begin() + 2, selected.end()), selected[0], selected[1], op);
    of_token = static_cast<const int16_t*>(dense(*scores, {shape.rows, shape.kv_heads}, ScalarType::Short, op, "scores"));
  }
  Tensor out = new_tensor(query, Shapes{shape.rows, 1, shape.kv_heads * shape.group, shape.value_dim});
  const Token token = {shape, query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(), strides(query), strides(key),
                       strides(value)};
  return {out, take(cache, token, out.mutable_data_ptr(), op, nullptr, of_token)};
}

// The product with a weight of plain numbers, or in blocks.
Tensor product_of(Tensor x, const Tensor& weight, const std::optional<Tensor>& bias, WeightKind kind, const char* op) {
  const TracedStep traced(LINEAR);
  REQUIRE(x.is_cpu() && x.dim() > 0, op, ": the input has the shape ", text(x), "; it must be on the CPU and have a dimension");
  Shapes sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) {
    sizes.push_back(x.size(i));
    rows *= x.size(i);
  }
  x = contiguous(x);
  LinearCall call = linear_call(x.scalar_type(), dtype_of(x, op), x.size(x.dim() - 1), weight, bias ? &*bias : nullptr, op, kind);
  sizes.push_back(call.outputs);
  Tensor out = new_tensor(x, sizes);
  call.rows = rows;
  call.x = x.const_data_ptr();
  call.out = out.mutable_data_ptr();
  run(&call, 1, op);
  return out;
}

Tensor linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias) { return product_of(x, weight, bias, PLAIN, "linear"); }

WeightKind blocks_kind(int64_t code, const char* op) {
  const WeightKind kind = kinds_of({code}, 1, op)[0];
  REQUIRE(kind != PLAIN, op, ": the kind is ", code, ", which is none of blocks");
  return kind;
}

Tensor linear_blocks_op(Tensor x, Tensor blocks, int64_t kind, std::optional<Tensor> bias) {
  const char* op = "linear_blocks";
  return product_of(x, blocks, bias, blocks_kind(kind, op), op);
}

void expand_blocks_op(Tensor blocks, int64_t kind, Tensor out) {
  const char* op = "expand_blocks";
  REQUIRE(out.dim() == 2, op, ": the result has the shape ", text(out), ", not [outputs, inputs]");
  const DType dtype = dtype_of(out, op, "the result");
  dense(out, {-1, -1}, out.scalar_type(), op, "the result");
  LinearCall call = linear_call(out.scalar_type(), dtype, out.size(1), blocks, nullptr, op, blocks_kind(kind, op));
  REQUIRE(call.outputs == out.size(0), op, ": ", call.outputs, " rows of blocks for ", out.size(0), " outputs");
  call.out = out.mutable_data_ptr();
  check_status(expand(call, parallel(), isa()), op);
}

std::tuple<Tensor, int64_t> step_layer_op(Tensor x, Tensors weights, Tensors biases, Shapes kinds, std::optional<Tensor> centre, Tensors norms, double eps, Tensor cos,
                                          Tensor sin, Tensors keys, Tensors values, Tensor table, Tensor lengths, Tensor runs,
                                          Tensor refs, Tensor rules, int64_t lag, double scaling, double softcap,
                                          std::optional<Tensor> sink_logits) {
  const char* op = "step_layer";
  const TracedStep traced(REST);
  REQUIRE(weights.size() == 7 && norms.size() == 2 && (biases.empty() || biases.size() == 3), op, ": ", weights.size(),
          " weights, ", biases.size(), " biases and ", norms.size(), " norms; 7, 3 or none, and 2 are needed");
  x = one_token(x, op);
  REQUIRE(cos.dim() == 3 && table.dim() == 3, op, ": cos has the shape ", text(cos), " and the table ", text(table),
          "; both must have 3 dimensions");
  const int64_t rows = x.size(0), inputs = x.size(2);
  const ScalarType type = x.scalar_type();
  const Rotary rotary(cos, sin, rows, cos.size(2), type, op);
  DecoderLayer layer(weights.data(), biases.empty() ? nullptr : biases.data(), norms.data(), eps, inputs, table.size(1), cos.size(2), type,
                     dtype_of(x, op), op, kinds_of(kinds, 7, op).data());
  if (centre) layer.projections.take_centre(*centre, op);
  Shape shape = layer.projections.shape;
  shape.rows = rows;
  const State state = {keys, values, table, lengths, runs, refs, rules, lag, scaling, softcap, sink_logits};
  const LayerCache cache = state.of(shape, type, op);
  Scratch memory;
  Tensor out = new_tensor(x, Shapes{rows, 1, inputs});
  const auto attend = [&](const Token& token, void* to) { return take(cache, token, to, op); };
  return {out, layer.step(attend, rotary, rows, x.const_data_ptr(), out.mutable_data_ptr(), memory, op)};
}

// Writes what was traced so far, [2, phases]: nanoseconds on the threads that made steps, and of all threads at work. Sets it to zero,
// and has steps traced from now on, or not.
void trace_op(Tensor to, bool on) {
  check(to, {2, PHASES}, ScalarType::Long, "trace", "what was traced");
  REQUIRE(to.is_contiguous(), "trace: what was traced must be contiguous");
  trace_sums.on = false;
  auto* out = static_cast<int64_t*>(to.mutable_data_ptr());
  for (auto* sums : {trace_sums.wall, trace_sums.busy})
    for (int phase = 0; phase < PHASES; phase++) *out++ = sums[phase].exchange(0);
  trace_sums.on = on;
}

}  // namespace

#define CACHE                                                                                                            \
  "Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) table, Tensor(d!) lengths, Tensor(e!) runs, Tensor(f!) refs, "     \
  "Tensor rules, int lag, float scaling, float softcap, Tensor? sink_logits"
#define DONE ") -> (Tensor, SymInt)"

static const moacompress::Operators operators("moacompress_cpu", {
    {"trace(Tensor(a!) to, bool on) -> ()",
     Boxed<&trace_op>::call},
    {"linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
     Boxed<&linear_op>::call},
    {"linear_blocks(Tensor x, Tensor blocks, int kind, Tensor? bias) -> Tensor",
     Boxed<&linear_blocks_op>::call},
    {"expand_blocks(Tensor blocks, int kind, Tensor(a!) out) -> ()",
     Boxed<&expand_blocks_op>::call},
    {"step(Tensor query, Tensor key, Tensor value, " CACHE ", Tensor(g!)[] selected, Tensor? scores" DONE,
     Boxed<&step_op>::call},
    {"step_layer(Tensor x, Tensor[] weights, Tensor[] biases, int[] kinds, Tensor? centre, Tensor[] norms, float eps, Tensor cos, Tensor sin, " CACHE DONE,
     Boxed<&step_layer_op>::call},
});
