// The kernels as torch operators, on libtorch's stable ABI: one binary for torch 2.10 and later and for any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core.h"

namespace {

using namespace moacompress;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shapes = std::vector<int64_t>;

constexpr int64_t MAX_TOKENS = int64_t(1) << 24;  // positions are compared as float32

std::atomic<int> chosen_isa{-1};

Isa isa() {
  int found = chosen_isa.load();
  if (found < 0) chosen_isa.store(found = best_isa());
  return Isa(found);
}

void run_on_pool(void*, int threads, void (*body)(void*), void* arg) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(arg);
  });
}

Parallel parallel() { return {int(torch::stable::get_num_threads()), run_on_pool, nullptr}; }

void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != NO_MEMORY, op, ": no memory for scratch space");
  STD_TORCH_CHECK(status != MISSING_BLOCK, op, ": a block that a query sees has no id of the pool in the table");
}

std::string text(const Tensor& t) {
  std::string shape = "[";
  for (int64_t i = 0; i < t.dim(); i++) shape += (i ? ", " : "") + std::to_string(t.size(i));
  return shape + "]";
}

DType dtype_of(const Tensor& t, const char* op) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": the query must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? F32 : type == ScalarType::BFloat16 ? BF16 : F16;
}

// Refuses a tensor that is not of this shape and dtype on the CPU; -1 is any size.
void check(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has another dtype than it must have");
  bool fits = t.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = shape[i] < 0 || t.size(int64_t(i)) == shape[i];
  if (fits) return;
  std::string wanted;
  for (size_t i = 0; i < shape.size(); i++)
    wanted += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  STD_TORCH_CHECK(fits, op, ": ", name, " has the shape ", text(t), ", not [", wanted, "]");
}

void check_rows(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  check(t, shape, type, op, name);
  STD_TORCH_CHECK(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, op, ": the last dimension of ", name,
                  " must be contiguous");
}

const void* dense(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  check(t, shape, type, op, name);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return t.const_data_ptr();
}

const int64_t* numbers(const Tensor& t, int64_t count, const char* op, const char* name) {
  return static_cast<const int64_t*>(dense(t, {count}, ScalarType::Long, op, name));
}

Strides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Refuses numbers that no rule has; `name` is what each of the `count` rules belongs to.
void check_rules(const Rules& rules, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(rules.min_window >= 1, op, ": min_window is ", rules.min_window, ", less than 1");
  STD_TORCH_CHECK(rules.native_window >= 0, op, ": native_window is ", rules.native_window, "; 0 means none");
  for (int64_t i = 0; i < count; i++) {
    const Rule rule = rules.of(i);
    STD_TORCH_CHECK(rule.sink >= 0 && rule.alpha >= 0 && rule.beta_q >= 0 && rule.beta_q <= 1024, op, ": ", name, " ", i,
                    " has sink ", rule.sink, ", alpha ", rule.alpha, ", beta_q ", rule.beta_q,
                    "; they must be at least 0, beta_q at most 1024");
  }
}

Rules rules_of(const Tensor& sink, const Tensor& alpha, const Tensor& beta_q, int64_t min_window, int64_t native_window,
               const Shape& shape, const char* op) {
  const Rules rules = {numbers(sink, shape.kv_heads, op, "sink"), numbers(alpha, shape.kv_heads, op, "alpha"),
                       numbers(beta_q, shape.kv_heads, op, "beta_q"), min_window, native_window};
  check_rules(rules, shape.kv_heads, op, "KV head");
  return rules;
}

struct Rest {
  Rules rules;
  Scores scores;
};

Scores scores_of(double scaling, double softcap, const std::optional<Tensor>& sink_logits, const Shape& shape, const char* op) {
  STD_TORCH_CHECK(scaling > 0, op, ": scaling is ", scaling, ", not positive");
  STD_TORCH_CHECK(softcap >= 0, op, ": softcap is ", softcap, "; 0 means none");
  Scores scores = {float(scaling), float(softcap), nullptr};
  if (sink_logits)
    scores.sink_logits = static_cast<const float*>(
        dense(*sink_logits, {shape.kv_heads * shape.group}, ScalarType::Float, op, "sink_logits"));
  return scores;
}

Rest rest_of(const Tensor& sink, const Tensor& alpha, const Tensor& beta_q, int64_t min_window, int64_t native_window,
             double scaling, double softcap, const std::optional<Tensor>& sink_logits, const Shape& shape, const char* op) {
  const Rules rules = rules_of(sink, alpha, beta_q, min_window, native_window, shape, op);
  return {rules, scores_of(scaling, softcap, sink_logits, shape, op)};
}

// Views of a pool's segments; must outlive the call.
struct PoolViews {
  std::vector<const void*> base;
  std::vector<int64_t> block_stride, first_block{0};

  PoolViews(const Tensors& segments, int64_t dim, ScalarType type, const char* op, const char* name) {
    for (const Tensor& t : segments) {
      check_rows(t, {-1, BLOCK, dim}, type, op, name);
      STD_TORCH_CHECK(t.stride(1) == dim || t.size(0) == 0, op, ": a block of ", name, " must be contiguous");
      base.push_back(t.const_data_ptr());
      block_stride.push_back(t.stride(0));
      first_block.push_back(first_block.back() + t.size(0));
    }
  }
  Pool view() const { return {int64_t(base.size()), base.data(), block_stride.data(), first_block.data()}; }
};

Shape shape_of(const Tensor& query, int64_t dims, int64_t kv_heads, int64_t value_dim, const char* op) {
  STD_TORCH_CHECK(query.dim() == dims, op, ": the query has the shape ", text(query), ", not of ", dims, " dimensions");
  const int64_t heads = query.size(1);
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": ", heads, " query heads are no multiple of ",
                  kv_heads, " KV heads");
  const Shape shape = {dtype_of(query, op), query.size(0), kv_heads, heads / kv_heads, query.size(dims - 1), value_dim};
  STD_TORCH_CHECK(shape.head_dim > 0 && value_dim > 0, op, ": head_dim is ", shape.head_dim, ", value_dim ", value_dim);
  return shape;
}

// Checks query, key and value of a chunk; all have as many tokens as the query, or the number that is given.
Shape chunk_shape(const Tensor& query, const Tensor& key, const Tensor& value, const char* op, int64_t given = -1) {
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, op, ": the key has the shape ", text(key), " and the value ",
                  text(value), "; both must have 4 dimensions");
  const Shape shape = shape_of(query, 4, key.size(1), value.size(3), op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = given < 0 ? query.size(2) : given;
  check_rows(query, {shape.rows, shape.kv_heads * shape.group, tokens, shape.head_dim}, type, op, "query");
  check_rows(key, {shape.rows, shape.kv_heads, tokens, shape.head_dim}, type, op, "key");
  check_rows(value, {shape.rows, shape.kv_heads, tokens, shape.value_dim}, type, op, "value");
  return shape;
}

// Of the shape [rows, heads, tokens, dim] with tokens before heads in memory, as a layer goes on with it.
Tensor new_rows(const Tensor& like, int64_t rows, int64_t heads, int64_t tokens, int64_t dim) {
  const Shapes sizes = {rows, tokens, heads, dim};
  return torch::stable::transpose(torch::stable::new_empty(like, sizes), 1, 2);
}

Tensor new_floats(const Tensor& like, const Shapes& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor> decode_op(Tensor query, Tensors keys, Tensors values, Tensor table, Tensor lengths, Tensor sink,
                                     Tensor alpha, Tensor beta_q, int64_t min_window, int64_t native_window, double scaling,
                                     double softcap, std::optional<Tensor> sink_logits) {
  const char* op = "decode";
  STD_TORCH_CHECK(!keys.empty() && keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(),
                  " of values; at least one of each, and as many, are needed");
  STD_TORCH_CHECK(table.dim() == 3 && values[0].dim() == 3, op, ": the table has the shape ", text(table),
                  " and the first segment of values ", text(values[0]), "; both must have 3 dimensions");
  const Shape shape = shape_of(query, 3, table.size(1), values[0].size(2), op);
  const ScalarType type = query.scalar_type();
  check_rows(query, {shape.rows, -1, shape.head_dim}, type, op, "query");
  const PoolViews key_pool(keys, shape.head_dim, type, op, "keys"), value_pool(values, shape.value_dim, type, op, "values");
  const void* ids = dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  const int64_t* tokens = numbers(lengths, shape.rows, op, "lengths");
  for (int64_t row = 0; row < shape.rows; row++)
    STD_TORCH_CHECK(tokens[row] >= 0 && tokens[row] < MAX_TOKENS, op, ": row ", row, " has ", tokens[row], " tokens");
  const Rest rest =
      rest_of(sink, alpha, beta_q, min_window, native_window, scaling, softcap, sink_logits, shape, op);
  const int64_t heads = shape.kv_heads * shape.group;
  Tensor out = torch::stable::new_empty(query, Shapes{shape.rows, heads, shape.value_dim});
  Tensor lse = new_floats(query, {shape.rows, heads});
  const DecodeCall call = {shape, rest.rules, rest.scores, query.const_data_ptr(), query.stride(0), query.stride(1),
                           key_pool.view(), value_pool.view(), {static_cast<const int32_t*>(ids), table.size(2)}, tokens,
                           out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())};
  check_status(decode(call, parallel(), isa()), op);
  return {out, lse};
}

std::tuple<Tensor, int64_t> step_op(Tensor query, Tensor key, Tensor value, Tensors keys, Tensors values, Tensor table,
                                    Tensor lengths, Tensor runs, Tensor refs, Tensor sink, Tensor alpha, Tensor beta_q,
                                    int64_t min_window, int64_t native_window, int64_t lag, double scaling, double softcap,
                                    std::optional<Tensor> sink_logits) {
  const char* op = "step";
  STD_TORCH_CHECK(!keys.empty() && keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(),
                  " of values; at least one of each, and as many, are needed");
  const Shape shape = chunk_shape(query, key, value, op, 1);
  const int64_t heads = shape.kv_heads * shape.group;
  const ScalarType type = query.scalar_type();
  const PoolViews key_pool(keys, shape.head_dim, type, op, "keys"), value_pool(values, shape.value_dim, type, op, "values");
  dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  dense(runs, {4, shape.rows, shape.kv_heads}, ScalarType::Long, op, "runs");
  dense(refs, {-1}, ScalarType::Int, op, "refs");
  const int64_t blocks = refs.size(0);
  STD_TORCH_CHECK(key_pool.first_block.back() == blocks && value_pool.first_block.back() == blocks, op, ": the pool has ",
                  key_pool.first_block.back(), " blocks of keys and ", value_pool.first_block.back(), " of values, refs counts ",
                  blocks);
  const int64_t* tokens = numbers(lengths, shape.rows, op, "lengths");
  for (int64_t row = 0; row < shape.rows; row++)
    STD_TORCH_CHECK(tokens[row] >= 0 && tokens[row] + 1 < MAX_TOKENS, op, ": row ", row, " has ", tokens[row], " tokens");
  STD_TORCH_CHECK(lag >= 0, op, ": lag is ", lag);
  const Rest rest = rest_of(sink, alpha, beta_q, min_window, native_window, scaling, softcap, sink_logits, shape, op);
  int32_t* ids = static_cast<int32_t*>(table.mutable_data_ptr());
  const AdvanceCall taken = {shape, rest.rules, lag, key.const_data_ptr(), value.const_data_ptr(), strides(key), strides(value),
                             key_pool.view(), value_pool.view(), ids, table.size(2),
                             static_cast<int64_t*>(lengths.mutable_data_ptr()), static_cast<int64_t*>(runs.mutable_data_ptr()),
                             static_cast<int32_t*>(refs.mutable_data_ptr()), blocks};
  Tensor out = torch::stable::new_empty(query, Shapes{shape.rows, 1, heads, shape.value_dim});
  const int64_t missing = advance(taken);
  if (missing) return {out, missing};
  const DecodeCall call = {shape, rest.rules, rest.scores, query.const_data_ptr(), query.stride(0), query.stride(1),
                           key_pool.view(), value_pool.view(), {ids, table.size(2)}, tokens, out.mutable_data_ptr(), nullptr};
  check_status(decode(call, parallel(), isa()), op);
  return {out, 0};
}

std::tuple<Tensor, Tensor> prefill_op(Tensor query, Tensor key, Tensor value, Tensors keys, Tensors values, Tensor table,
                                      Tensor past, Tensor valid, Tensor sink, Tensor alpha, Tensor beta_q, int64_t min_window,
                                      int64_t native_window, double scaling, double softcap,
                                      std::optional<Tensor> sink_logits) {
  const char* op = "prefill";
  const Shape shape = chunk_shape(query, key, value, op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = query.size(2), heads = shape.kv_heads * shape.group;
  STD_TORCH_CHECK(keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(), " of values");
  const PoolViews key_pool(keys, shape.head_dim, type, op, "keys"), value_pool(values, shape.value_dim, type, op, "values");
  const void* ids = dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  const int64_t *before = numbers(past, shape.rows, op, "past"), *real = numbers(valid, shape.rows, op, "valid");
  for (int64_t row = 0; row < shape.rows; row++)
    STD_TORCH_CHECK(before[row] >= 0 && real[row] >= 0 && real[row] <= tokens && before[row] + real[row] < MAX_TOKENS, op,
                    ": row ", row, " has ", before[row], " tokens before the chunk and ", real[row], " real ones of ", tokens,
                    " in it");
  const Rest rest =
      rest_of(sink, alpha, beta_q, min_window, native_window, scaling, softcap, sink_logits, shape, op);
  Tensor out = new_rows(query, shape.rows, heads, tokens, shape.value_dim);
  Tensor lse = new_floats(query, {shape.rows, heads, tokens});
  const PrefillCall call = {shape, rest.rules, rest.scores, tokens, query.const_data_ptr(), key.const_data_ptr(),
                            value.const_data_ptr(), strides(query), strides(key), strides(value), key_pool.view(),
                            value_pool.view(), {static_cast<const int32_t*>(ids), table.size(2)}, before, real,
                            out.mutable_data_ptr(), strides(out), static_cast<float*>(lse.mutable_data_ptr())};
  check_status(prefill(call, parallel(), isa()), op);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta,
                                               Tensor valid, Tensor sink, Tensor alpha, Tensor beta_q, int64_t min_window,
                                               int64_t native_window, double scaling, double softcap) {
  const char* op = "prefill_backward";
  const Shape shape = chunk_shape(query, key, value, op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = query.size(2), heads = shape.kv_heads * shape.group;
  check_rows(dout, {shape.rows, heads, tokens, shape.value_dim}, type, op, "dout");
  const Shapes lanes = {shape.rows, heads, tokens};
  const void* lse_at = dense(lse, lanes, ScalarType::Float, op, "lse");
  const void* delta_at = dense(delta, lanes, ScalarType::Float, op, "delta");
  const int64_t* real = numbers(valid, shape.rows, op, "valid");
  for (int64_t row = 0; row < shape.rows; row++)
    STD_TORCH_CHECK(real[row] >= 0 && real[row] <= tokens && tokens < MAX_TOKENS, op, ": row ", row, " has ", real[row],
                    " real tokens of ", tokens);
  const Rest rest =
      rest_of(sink, alpha, beta_q, min_window, native_window, scaling, softcap, std::nullopt, shape, op);
  Tensor dquery = new_rows(query, shape.rows, heads, tokens, shape.head_dim);
  Tensor dkey = new_rows(key, shape.rows, shape.kv_heads, tokens, shape.head_dim);
  Tensor dvalue = new_rows(value, shape.rows, shape.kv_heads, tokens, shape.value_dim);
  const BackwardCall call = {shape, rest.rules, rest.scores, tokens, query.const_data_ptr(), key.const_data_ptr(),
                             value.const_data_ptr(), dout.const_data_ptr(), strides(query), strides(key), strides(value),
                             strides(dout), real, static_cast<const float*>(lse_at), static_cast<const float*>(delta_at),
                             dquery.mutable_data_ptr(), dkey.mutable_data_ptr(), dvalue.mutable_data_ptr(), strides(dquery),
                             strides(dkey), strides(dvalue)};
  check_status(backward(call, parallel(), isa()), op);
  return {dquery, dkey, dvalue};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> profile_op(
    Tensor dout, Tensor query, Tensor key, Tensor value, Tensor rules, int64_t min_window, std::optional<Tensor> plan,
    int64_t plan_min_window, int64_t native_window, double scaling, double softcap, std::optional<Tensor> sink_logits,
    bool baselines) {
  const char* op = "profile_backward";
  STD_TORCH_CHECK(query.dim() < 1 || query.size(0) == 1, op, ": the batch has ", query.size(0), " rows; samples come one by one");
  const Shape shape = chunk_shape(query, key, value, op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = query.size(2), heads = shape.kv_heads * shape.group;
  STD_TORCH_CHECK(tokens < MAX_TOKENS, op, ": ", tokens, " tokens, of at most ", MAX_TOKENS - 1);
  check_rows(dout, {1, heads, tokens, shape.value_dim}, type, op, "dout");
  const auto columns = [&](const Tensor& table, int64_t count, const char* name) {
    return static_cast<const int64_t*>(dense(table, {3, count}, ScalarType::Long, op, name));
  };
  const int64_t* table = columns(rules, -1, "rules");
  const int64_t count = rules.size(1);
  check_rules({table, table + count, table + 2 * count, min_window, native_window}, count, op, "rule");
  Rules own = {};
  if (plan) {
    const int64_t* at = columns(*plan, shape.kv_heads, "plan");
    own = {at, at + shape.kv_heads, at + 2 * shape.kv_heads, plan_min_window, native_window};
    check_rules(own, shape.kv_heads, op, "the plan's KV head");
  }
  const Scores scores = scores_of(scaling, softcap, sink_logits, shape, op);
  Tensor dquery = new_rows(query, 1, heads, tokens, shape.head_dim);
  Tensor dkey = new_rows(key, 1, shape.kv_heads, tokens, shape.head_dim);
  Tensor dvalue = new_rows(value, 1, shape.kv_heads, tokens, shape.value_dim);
  Tensor sums = torch::stable::new_empty(query, Shapes{baselines ? 4 : 2, shape.kv_heads, count}, ScalarType::Double);
  int64_t alive = 0;
  const ProfileCall call = {shape, count, table, table + count, table + 2 * count, min_window, native_window,
                            plan ? &own : nullptr, scores, tokens, query.const_data_ptr(), key.const_data_ptr(),
                            value.const_data_ptr(), dout.const_data_ptr(), strides(query), strides(key), strides(value),
                            strides(dout), dquery.mutable_data_ptr(), dkey.mutable_data_ptr(), dvalue.mutable_data_ptr(),
                            strides(dquery), strides(dkey), strides(dvalue), baselines,
                            static_cast<double*>(sums.mutable_data_ptr()), &alive};
  check_status(profile(call, parallel(), isa()), op);
  return {dquery, dkey, dvalue, sums, alive};
}

// Checks a linear layer of `inputs` and returns its call; the output is for the caller to make.
LinearCall linear_call(const Tensor& x, int64_t rows, const Tensor& weight, const Tensor* bias, const char* op) {
  const ScalarType type = x.scalar_type();
  const int64_t inputs = x.size(x.dim() - 1);
  const void* from = dense(weight, {-1, inputs}, type, op, "weight");
  const int64_t outputs = weight.size(0);
  const void* added = bias ? dense(*bias, {outputs}, type, op, "bias") : nullptr;
  return {dtype_of(x, op), rows, inputs, outputs, x.const_data_ptr(), from, added, nullptr};
}

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
  LinearCall call = linear_call(x, rows, weight, bias ? &*bias : nullptr, op);
  sizes.push_back(call.outputs);
  Tensor out = torch::stable::new_empty(x, sizes);
  call.out = out.mutable_data_ptr();
  check_status(linear(&call, 1, parallel(), isa()), op);
  return out;
}

// What comes before a step: the queries, keys and values of one token a row, with rotary position embeddings.
std::tuple<Tensor, int64_t> step_hidden_op(Tensor x, Tensors weights, Tensors biases, Tensor cos, Tensor sin, Tensors keys,
                                           Tensors values, Tensor table, Tensor lengths, Tensor runs, Tensor refs, Tensor sink,
                                           Tensor alpha, Tensor beta_q, int64_t min_window, int64_t native_window, int64_t lag,
                                           double scaling, double softcap, std::optional<Tensor> sink_logits) {
  const char* op = "step_hidden";
  STD_TORCH_CHECK(weights.size() == 3 && (biases.empty() || biases.size() == 3), op, ": ", weights.size(), " weights and ",
                  biases.size(), " biases; 3 weights are needed, and 3 biases or none");
  STD_TORCH_CHECK(cos.dim() == 3 && table.dim() == 3, op, ": cos has the shape ", text(cos), " and the table ", text(table),
                  "; both must have 3 dimensions");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  check(x, {-1, 1, -1}, x.scalar_type(), op, "the input");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), kv_heads = table.size(1), dim = cos.size(2);
  STD_TORCH_CHECK(dim > 0 && dim % 2 == 0, op, ": the rotary embeddings have ", dim, " dimensions, not an even number");
  for (const Tensor* t : {&cos, &sin}) {
    check_rows(*t, {-1, 1, dim}, type, op, t == &cos ? "cos" : "sin");
    STD_TORCH_CHECK(t->size(0) == rows || t->size(0) == 1, op, ": rotary embeddings of ", t->size(0), " rows for ", rows);
  }
  LinearCall calls[3];
  Tensors parts;
  for (size_t i = 0; i < 3; i++) {
    calls[i] = linear_call(x, rows, weights[i], biases.empty() ? nullptr : &biases[i], op);
    const int64_t of = i == 0 ? dim : kv_heads * (i == 1 ? dim : 1);
    STD_TORCH_CHECK(calls[i].outputs > 0 && calls[i].outputs % of == 0 && (i != 1 || calls[i].outputs == of), op, ": weight ", i,
                    " has ", calls[i].outputs, " outputs, for ", kv_heads, " KV heads of ", dim);
    const int64_t heads = i == 0 ? calls[i].outputs / dim : kv_heads;
    parts.push_back(torch::stable::new_empty(x, Shapes{rows, 1, heads, calls[i].outputs / heads}));
    calls[i].out = parts[i].mutable_data_ptr();
  }
  check_status(linear(calls, 3, parallel(), isa()), op);
  for (size_t i = 0; i < 2; i++)
    rotate({calls[i].dtype, rows, calls[i].outputs / dim, dim, calls[i].out, cos.const_data_ptr(), sin.const_data_ptr(),
            cos.size(0) == 1 ? 0 : cos.stride(0), sin.size(0) == 1 ? 0 : sin.stride(0)},
           isa());
  for (Tensor& part : parts) part = torch::stable::transpose(part, 1, 2);
  return step_op(parts[0], parts[1], parts[2], keys, values, table, lengths, runs, refs, sink, alpha, beta_q, min_window,
                 native_window, lag, scaling, softcap, sink_logits);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of the instruction set that the kernels use.
EXPORT const char* moacompress_isa() { return isa_name(isa()); }

// Chooses an instruction set by name; false where it is unknown or this processor lacks it.
EXPORT bool moacompress_set_isa(const char* name) {
  for (int i = PORTABLE; i <= AVX512_BF16; i++)
    if (std::string(isa_name(Isa(i))) == name && isa_works(Isa(i))) {
      chosen_isa.store(i);
      return true;
    }
  return false;
}

// What a query sees, into out[3]: tests hold it against the plan's own definition.
EXPORT void moacompress_visible(int64_t n, int64_t sink, int64_t alpha, int64_t beta_q, int64_t min_window,
                                int64_t native_window, int64_t* out) {
  const Visible see = visible(n, {sink, alpha, beta_q, min_window, native_window});
  out[0] = see.first;
  out[1] = see.sink_end;
  out[2] = see.start;
}

STABLE_TORCH_LIBRARY(moacompress_cpu, m) {
  m.def(
      "decode(Tensor query, Tensor[] keys, Tensor[] values, Tensor table, Tensor lengths, Tensor sink, Tensor alpha, "
      "Tensor beta_q, int min_window, int native_window, float scaling, float softcap, Tensor? sink_logits) -> (Tensor, Tensor)");
  m.def(
      "step(Tensor query, Tensor key, Tensor value, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) table, "
      "Tensor(d!) lengths, Tensor(e!) runs, Tensor(f!) refs, Tensor sink, Tensor alpha, Tensor beta_q, int min_window, "
      "int native_window, int lag, float scaling, float softcap, Tensor? sink_logits) -> (Tensor, int)");
  m.def(
      "prefill(Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] values, Tensor table, Tensor past, Tensor valid, "
      "Tensor sink, Tensor alpha, Tensor beta_q, int min_window, int native_window, float scaling, float softcap, "
      "Tensor? sink_logits) -> (Tensor, Tensor)");
  m.def(
      "prefill_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta, Tensor valid, "
      "Tensor sink, Tensor alpha, Tensor beta_q, int min_window, int native_window, float scaling, float softcap) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "profile_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor rules, int min_window, Tensor? plan, "
      "int plan_min_window, int native_window, float scaling, float softcap, Tensor? sink_logits, bool baselines) "
      "-> (Tensor, Tensor, Tensor, Tensor, int)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "step_hidden(Tensor x, Tensor[] weights, Tensor[] biases, Tensor cos, Tensor sin, Tensor(a!)[] keys, "
      "Tensor(b!)[] values, Tensor(c!) table, Tensor(d!) lengths, Tensor(e!) runs, Tensor(f!) refs, Tensor sink, Tensor alpha, "
      "Tensor beta_q, int min_window, int native_window, int lag, float scaling, float softcap, Tensor? sink_logits) "
      "-> (Tensor, int)");
}

STABLE_TORCH_LIBRARY_IMPL(moacompress_cpu, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode_op));
  m.impl("step", TORCH_BOX(&step_op));
  m.impl("prefill", TORCH_BOX(&prefill_op));
  m.impl("prefill_backward", TORCH_BOX(&backward_op));
  m.impl("profile_backward", TORCH_BOX(&profile_op));
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("step_hidden", TORCH_BOX(&step_hidden_op));
}
