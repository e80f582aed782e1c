// Operators of a decode step: products of a few rows, one more token in the cache and attention to it, and a whole layer.
#include "binding.h"
#include "tasks.h"

namespace {

using namespace moacompress;

// A layer's cache and what it attends by, as the operators are given it.
struct State {
  Tensors keys, values;
  Tensor table, lengths, runs, refs, sink, alpha, beta_q;
  int64_t min_window, native_window, lag;
  double scaling, softcap;
  std::optional<Tensor> sink_logits;
};

// One token of every row.
struct Token {
  Shape shape;
  const void *query, *key, *value;
  Strides query_at, key_at, value_at;
};

// Checks the cache, takes a token into it and attends, to `out`, [rows, heads, value_dim]. Returns 0; or, when nothing is done yet, 1
// where the table is too narrow, and 1 + n where the pool lacks n blocks.
int64_t take(const State& state, const Token& token, ScalarType type, void* out, const char* op) {
  const Shape& shape = token.shape;
  STD_TORCH_CHECK(!state.keys.empty() && state.keys.size() == state.values.size(), op, ": ", state.keys.size(),
                  " segments of keys and ", state.values.size(), " of values; at least one of each, and as many, are needed");
  const PoolViews keys(state.keys, shape.head_dim, type, op, "keys"), values(state.values, shape.value_dim, type, op, "values");
  dense(state.table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  dense(state.runs, {4, shape.rows, shape.kv_heads}, ScalarType::Long, op, "runs");
  dense(state.refs, {-1}, ScalarType::Int, op, "refs");
  const int64_t blocks = state.refs.size(0), width = state.table.size(2);
  STD_TORCH_CHECK(keys.first_block.back() == blocks && values.first_block.back() == blocks, op, ": the pool has ",
                  keys.first_block.back(), " blocks of keys and ", values.first_block.back(), " of values, refs counts ", blocks);
  const int64_t* tokens = numbers(state.lengths, shape.rows, op, "lengths");
  for (int64_t row = 0; row < shape.rows; row++)
    STD_TORCH_CHECK(tokens[row] >= 0 && tokens[row] + 1 < MAX_TOKENS, op, ": row ", row, " has ", tokens[row], " tokens");
  STD_TORCH_CHECK(state.lag >= 0, op, ": lag is ", state.lag);
  const Rest rest = rest_of(state.sink, state.alpha, state.beta_q, state.min_window, state.native_window, state.scaling,
                            state.softcap, state.sink_logits, shape, op);
  int32_t* ids = static_cast<int32_t*>(state.table.mutable_data_ptr());
  const int64_t missing =
      advance({shape, rest.rules, state.lag, token.key, token.value, token.key_at, token.value_at, keys.view(), values.view(), ids,
               width, static_cast<int64_t*>(state.lengths.mutable_data_ptr()),
               static_cast<int64_t*>(state.runs.mutable_data_ptr()), static_cast<int32_t*>(state.refs.mutable_data_ptr()), blocks});
  if (missing) return missing == TABLE_TOO_NARROW ? 1 : 1 + missing;
  check_status(decode({shape, rest.rules, rest.scores, token.query, token.query_at.row, token.query_at.head, keys.view(),
                       values.view(), {ids, width}, tokens, out, nullptr},
                      parallel(), isa()),
               op);
  return 0;
}

std::tuple<Tensor, int64_t> step_op(Tensor query, Tensor key, Tensor value, Tensors keys, Tensors values, Tensor table,
                                    Tensor lengths, Tensor runs, Tensor refs, Tensor sink, Tensor alpha, Tensor beta_q,
                                    int64_t min_window, int64_t native_window, int64_t lag, double scaling, double softcap,
                                    std::optional<Tensor> sink_logits) {
  const Shape shape = chunk_shape(query, key, value, "step", 1);
  Tensor out = torch::stable::new_empty(query, Shapes{shape.rows, 1, shape.kv_heads * shape.group, shape.value_dim});
  const Token token = {shape, query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(), strides(query), strides(key),
                       strides(value)};
  const State state = {keys, values, table, lengths, runs, refs, sink, alpha, beta_q, min_window, native_window, lag, scaling,
                       softcap, sink_logits};
  return {out, take(state, token, query.scalar_type(), out.mutable_data_ptr(), "step")};
}

// Checks a linear layer of `inputs` and returns its call; input and output are for the caller to put in.
LinearCall linear_call(const Tensor& like, int64_t rows, int64_t inputs, const Tensor& weight, const Tensor* bias, const char* op) {
  const void* from = dense(weight, {-1, inputs}, like.scalar_type(), op, "weight");
  const int64_t outputs = weight.size(0);
  const void* added = bias ? dense(*bias, {outputs}, like.scalar_type(), op, "bias") : nullptr;
  return {dtype_of(like, op), rows, inputs, outputs, nullptr, from, added, nullptr, nullptr, nullptr};
}

void run(const LinearCall* calls, int64_t count, const char* op) { check_status(linear(calls, count, parallel(), isa()), op); }

Tensor linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear";
  STD_TORCH_CHECK(x.is_cpu() && x.dim() > 0, op, ": the input has the shape ", text(x), "; it must be on the CPU and have a dimension");
  Shapes sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) {
    sizes.push_back(x.size(i));
    rows *= x.size(i);
  }
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  LinearCall call = linear_call(x, rows, x.size(x.dim() - 1), weight, bias ? &*bias : nullptr, op);
  sizes.push_back(call.outputs);
  Tensor out = torch::stable::new_empty(x, sizes);
  call.x = x.const_data_ptr();
  call.out = out.mutable_data_ptr();
  run(&call, 1, op);
  return out;
}

// The input of a step, [rows, 1, inputs], contiguous.
Tensor one_token(Tensor x, const char* op) {
  check(x, {-1, 1, -1}, x.scalar_type(), op, "the input");
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// The queries, keys and values of one token a row, with rotary position embeddings.
struct Heads {
  LinearCall calls[3];
  RotateCall rotary;  // of any of them
  Shape shape;
  size_t bytes = 0;  // that they take

  Heads(const Tensor& x, const Tensors& weights, const Tensors& biases, const Tensor& cos, const Tensor& sin, const Tensor& table,
        const char* op) {
    STD_TORCH_CHECK(weights.size() == 3 && (biases.empty() || biases.size() == 3), op, ": ", weights.size(), " weights and ",
                    biases.size(), " biases; 3 weights are needed, and 3 biases or none");
    STD_TORCH_CHECK(cos.dim() == 3 && table.dim() == 3 && table.size(1) > 0, op, ": cos has the shape ", text(cos),
                    " and the table ", text(table), "; both must have 3 dimensions");
    const int64_t rows = x.size(0), kv_heads = table.size(1), dim = cos.size(2);
    STD_TORCH_CHECK(dim > 0 && dim % 2 == 0, op, ": the rotary embeddings have ", dim, " dimensions, not an even number");
    for (const Tensor* t : {&cos, &sin}) {
      check_rows(*t, {-1, 1, dim}, x.scalar_type(), op, t == &cos ? "cos" : "sin");
      STD_TORCH_CHECK(t->size(0) == rows || t->size(0) == 1, op, ": rotary embeddings of ", t->size(0), " rows for ", rows);
    }
    for (size_t i = 0; i < 3; i++) {
      calls[i] = linear_call(x, rows, x.size(2), weights[i], biases.empty() ? nullptr : &biases[i], op);
      const int64_t of = i == 2 ? kv_heads : kv_heads * dim;
      STD_TORCH_CHECK(calls[i].outputs > 0 && calls[i].outputs % of == 0 && (i != 1 || calls[i].outputs == of), op, ": weight ", i,
                      " has ", calls[i].outputs, " outputs, for ", kv_heads, " KV heads of ", dim);
      bytes += size(calls[i]);
    }
    shape = {calls[0].dtype, rows, kv_heads, calls[0].outputs / (kv_heads * dim), dim, calls[2].outputs / kv_heads};
    rotary = {shape.dtype, rows, 0, dim, nullptr, cos.const_data_ptr(), sin.const_data_ptr(),
              cos.size(0) == 1 ? 0 : cos.stride(0), sin.size(0) == 1 ? 0 : sin.stride(0)};
  }

  static size_t size(const LinearCall& call) {  // on lines of the cache of their own
    return (size_t(call.rows * call.outputs) * element_size(call.dtype) + 63) / 64 * 64;
  }

  // Makes them of `x`, in `bytes` of memory.
  Token make(const void* x, char* to, const char* op) {
    for (LinearCall& call : calls) {
      call.x = x;
      call.out = to;
      to += size(call);
    }
    run(calls, 3, op);
    for (size_t i = 0; i < 2; i++) {
      rotary.x = calls[i].out;
      rotary.heads = calls[i].outputs / rotary.dim;
      rotate(rotary, isa());
    }
    const auto at = [&](size_t i, int64_t dim) { return Strides{calls[i].outputs, dim, calls[i].outputs}; };
    return {shape, calls[0].out, calls[1].out, calls[2].out, at(0, shape.head_dim), at(1, shape.head_dim), at(2, shape.value_dim)};
  }
};

std::tuple<Tensor, int64_t> step_hidden_op(Tensor x, Tensors weights, Tensors biases, Tensor cos, Tensor sin, Tensors keys,
                                           Tensors values, Tensor table, Tensor lengths, Tensor runs, Tensor refs, Tensor sink,
                                           Tensor alpha, Tensor beta_q, int64_t min_window, int64_t native_window, int64_t lag,
                                           double scaling, double softcap, std::optional<Tensor> sink_logits) {
  const char* op = "step_hidden";
  x = one_token(x, op);
  Heads heads(x, weights, biases, cos, sin, table, op);
  const Shape& shape = heads.shape;
  const Buffer<char> scratch(heads.bytes);
  STD_TORCH_CHECK(scratch.get(), op, ": no memory for ", heads.bytes, " bytes");
  Tensor out = torch::stable::new_empty(x, Shapes{shape.rows, 1, shape.kv_heads * shape.group, shape.value_dim});
  const State state = {keys, values, table, lengths, runs, refs, sink, alpha, beta_q, min_window, native_window, lag, scaling,
                       softcap, sink_logits};
  return {out, take(state, heads.make(x.const_data_ptr(), scratch.get(), op), x.scalar_type(), out.mutable_data_ptr(), op)};
}

// A whole decoder layer: attention and a gated feed-forward, each after a norm and beside the residual stream.
std::tuple<Tensor, int64_t> step_layer_op(Tensor x, Tensors weights, Tensors biases, Tensors norms, double eps, Tensor cos,
                                          Tensor sin, Tensors keys, Tensors values, Tensor table, Tensor lengths, Tensor runs,
                                          Tensor refs, Tensor sink, Tensor alpha, Tensor beta_q, int64_t min_window,
                                          int64_t native_window, int64_t lag, double scaling, double softcap,
                                          std::optional<Tensor> sink_logits) {
  const char* op = "step_layer";
  STD_TORCH_CHECK(weights.size() == 7 && norms.size() == 2, op, ": ", weights.size(), " weights and ", norms.size(),
                  " norms; 7 and 2 are needed");
  STD_TORCH_CHECK(eps >= 0, op, ": eps is ", eps);
  x = one_token(x, op);
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), inputs = x.size(2);
  const void* scales[2];
  for (size_t i = 0; i < 2; i++) scales[i] = dense(norms[i], {inputs}, type, op, "a norm");
  Heads heads(x, Tensors(weights.begin(), weights.begin() + 3), biases, cos, sin, table, op);
  const Shape& shape = heads.shape;
  LinearCall output = linear_call(x, rows, shape.kv_heads * shape.group * shape.value_dim, weights[3], nullptr, op);
  LinearCall gate = linear_call(x, rows, inputs, weights[4], nullptr, op), up = linear_call(x, rows, inputs, weights[5], nullptr, op);
  LinearCall last = linear_call(x, rows, gate.outputs, weights[6], nullptr, op);
  STD_TORCH_CHECK(up.outputs == gate.outputs && output.outputs == inputs && last.outputs == inputs, op,
                  ": the weights after attention have ", output.outputs, ", ", gate.outputs, ", ", up.outputs, " and ", last.outputs,
                  " outputs; the first and last must be ", inputs, ", the others alike");

  LinearCall attended = output;  // for its size
  attended.outputs = output.inputs;
  const size_t wide = Heads::size(output), bytes = heads.bytes + Heads::size(attended) + 2 * wide + Heads::size(gate);
  const Buffer<char> scratch(bytes);
  STD_TORCH_CHECK(scratch.get(), op, ": no memory for ", bytes, " bytes");
  char *mixed = scratch.get() + heads.bytes, *normed = mixed + Heads::size(attended), *hidden = normed + wide, *gated = hidden + wide;
  Tensor out = torch::stable::new_empty(x, Shapes{rows, 1, inputs});
  const State state = {keys, values, table, lengths, runs, refs, sink, alpha, beta_q, min_window, native_window, lag, scaling,
                       softcap, sink_logits};
  const auto normalize = [&](const void* from, const void* scale) {
    norm({shape.dtype, rows, inputs, from, scale, float(eps), normed}, isa());
  };
  const auto product = [&](LinearCall& call, const void* from, void* to) {
    call.x = from;
    call.out = to;
    run(&call, 1, op);
  };
  normalize(x.const_data_ptr(), scales[0]);
  if (const int64_t wanted = take(state, heads.make(normed, scratch.get(), op), type, mixed, op)) return {out, wanted};
  output.residual = x.const_data_ptr();
  product(output, mixed, hidden);
  normalize(hidden, scales[1]);
  gate.up = up.weight;
  product(gate, normed, gated);
  last.residual = hidden;
  product(last, gated, out.mutable_data_ptr());
  return {out, 0};
}

}  // namespace

#define CACHE                                                                                                            \
  "Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) table, Tensor(d!) lengths, Tensor(e!) runs, Tensor(f!) refs, "     \
  "Tensor sink, Tensor alpha, Tensor beta_q, int min_window, int native_window, int lag, float scaling, float softcap, " \
  "Tensor? sink_logits) -> (Tensor, SymInt)"

STABLE_TORCH_LIBRARY_FRAGMENT(moacompress_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("step(Tensor query, Tensor key, Tensor value, " CACHE);
  m.def("step_hidden(Tensor x, Tensor[] weights, Tensor[] biases, Tensor cos, Tensor sin, " CACHE);
  m.def("step_layer(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norms, float eps, Tensor cos, Tensor sin, " CACHE);
}

STABLE_TORCH_LIBRARY_IMPL(moacompress_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("step", TORCH_BOX(&step_op));
  m.impl("step_hidden", TORCH_BOX(&step_hidden_op));
  m.impl("step_layer", TORCH_BOX(&step_layer_op));
}
