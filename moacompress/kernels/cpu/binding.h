// What the operators share: checks of tensors, and views of them as the kernels take them.
#pragma once
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core.h"
#include "torch_abi.h"

namespace moacompress {

using Tensors = std::vector<Tensor>;
using Shapes = std::vector<int64_t>;

constexpr int64_t MAX_TOKENS = int64_t(1) << 24;  // positions are compared as float32

inline std::atomic<int> chosen_isa{-1};

inline Isa isa() {
  int found = chosen_isa.load();
  if (found < 0) chosen_isa.store(found = best_isa());
  return Isa(found);
}

inline void run_on_pool(void*, int threads, void (*body)(void*), void* arg) {
  struct Work {
    void (*body)(void*);
    void* arg;
  } work = {body, arg};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t i = begin; i < end; i++) work.body(work.arg);
  };
  parallel_for(threads, run, &work);
}

inline Parallel parallel() { return {num_threads(), run_on_pool, nullptr}; }

inline void check_status(Status status, const char* op) {
  REQUIRE(status != NO_MEMORY, op, ": no memory for scratch space");
  REQUIRE(status != MISSING_BLOCK, op, ": a block that a query sees has no id of the pool in the table");
}

inline std::string text(const Tensor& t) {
  std::string shape = "[";
  for (int64_t i = 0; i < t.dim(); i++) shape += (i ? ", " : "") + std::to_string(t.size(i));
  return shape + "]";
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name = "the query") {
  const ScalarType type = t.scalar_type();
  REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
          ": ", name, " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? F32 : type == ScalarType::BFloat16 ? BF16 : F16;
}

// Refuses a tensor that is not of this shape and dtype on the CPU; -1 is any size.
inline void check(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  REQUIRE(t.is_cpu(), op, ": ", name, " must be on the CPU");
  REQUIRE(t.scalar_type() == type, op, ": ", name, " has another dtype than it must have");
  bool fits = t.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = shape[i] < 0 || t.size(int64_t(i)) == shape[i];
  if (fits) return;
  std::string wanted;
  for (size_t i = 0; i < shape.size(); i++)
    wanted += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  REQUIRE(fits, op, ": ", name, " has the shape ", text(t), ", not [", wanted, "]");
}

inline void check_rows(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  check(t, shape, type, op, name);
  REQUIRE(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, op, ": the last dimension of ", name,
          " must be contiguous");
}

inline const void* dense(const Tensor& t, const Shapes& shape, ScalarType type, const char* op, const char* name) {
  check(t, shape, type, op, name);
  REQUIRE(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return t.const_data_ptr();
}

inline const int64_t* numbers(const Tensor& t, int64_t count, const char* op, const char* name) {
  return static_cast<const int64_t*>(dense(t, {count}, ScalarType::Long, op, name));
}

inline Strides strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Refuses numbers that no rule has; `name` and `i` say what it belongs to.
inline void check_rule(const Rule& rule, int64_t i, const char* op, const char* name) {
  REQUIRE(rule.sink >= 0 && rule.alpha >= 0 && rule.beta_q >= 0 && rule.beta_q <= 1024, op, ": ", name, " ", i,
          " has sink ", rule.sink, ", alpha ", rule.alpha, ", beta_q ", rule.beta_q,
          "; they must be at least 0, beta_q at most 1024");
  REQUIRE(rule.min_window >= 1, op, ": min_window is ", rule.min_window, ", less than 1, at ", name, " ", i);
  REQUIRE(rule.native_window >= 0, op, ": native_window is ", rule.native_window, " at ", name, " ", i, "; 0 means none");
  for (const int64_t format : {rule.key_format, rule.value_format})
    REQUIRE(format >= 0 && format < FORMATS, op, ": ", name, " ", i, " has the format ", format, "; known are 0 to ",
            FORMATS - 1);
}

// A table of `count` rules, -1 for any number; `name` is what each belongs to. Must be outlived by the tensor.
inline RuleTable rules_of(const Tensor& rules, int64_t count, const char* op, const char* name) {
  const void* columns = dense(rules, {RULE_NUMBERS, count}, ScalarType::Long, op, "the table of rules");
  const RuleTable table = {static_cast<const int64_t*>(columns), rules.size(1)};
  for (int64_t i = 0; i < table.count; i++) check_rule(table.of(i), i, op, name);
  return table;
}

// Refuses rules with codes: gradients are of native numbers, rounded before.
inline void check_native(const RuleTable& rules, const char* op) {
  for (int64_t i = 0; i < rules.count; i++)
    REQUIRE(rules.of(i).native(), op, ": rule ", i, " has the formats ", rules.of(i).key_format, " and ",
            rules.of(i).value_format, "; this is done with native ones alone");
}

struct Rest {
  RuleTable rules;
  Scores scores;
};

inline Scores scores_of(double scaling, double softcap, const std::optional<Tensor>& sink_logits, const Shape& shape, const char* op) {
  REQUIRE(scaling > 0, op, ": scaling is ", scaling, ", not positive");
  REQUIRE(softcap >= 0, op, ": softcap is ", softcap, "; 0 means none");
  Scores scores = {float(scaling), float(softcap), nullptr};
  if (sink_logits)
    scores.sink_logits = static_cast<const float*>(
        dense(*sink_logits, {shape.kv_heads * shape.group}, ScalarType::Float, op, "sink_logits"));
  return scores;
}

inline Rest rest_of(const Tensor& rules, double scaling, double softcap, const std::optional<Tensor>& sink_logits, const Shape& shape,
                    const char* op) {
  return {rules_of(rules, shape.kv_heads, op, "KV head"), scores_of(scaling, softcap, sink_logits, shape, op)};
}

// Views of a pool's segments; must outlive the call. A segment of native numbers has the shape [blocks, 16, dim], one of codes is
// of bytes, [blocks, bytes of a part].
struct PoolViews {
  std::vector<const void*> base;
  std::vector<int64_t> block_stride, part_bytes, first_block{0};

  PoolViews(const Tensors& segments, int64_t dim, ScalarType type, const char* op, const char* name, bool may_lack = false) {
    for (const Tensor& t : segments) {
      const bool coded = t.scalar_type() == ScalarType::Byte;
      if (may_lack && coded && t.dim() == 2 && t.size(1) == 0) {  // this segment has none
        base.push_back(nullptr);
        block_stride.push_back(0);
        part_bytes.push_back(0);
        first_block.push_back(first_block.back() + t.size(0));
        continue;
      }
      const int64_t element = coded ? 1 : type == ScalarType::Float ? 4 : 2;
      if (coded) {
        check_rows(t, {-1, -1}, ScalarType::Byte, op, name);
        const int64_t bytes = t.size(1);
        const int64_t eight = kv_part_of(INT8, dim, 1, KEYS).bytes, six = kv_part_of(INT6, dim, 1, KEYS).bytes,
                      four = kv_part_of(INT4, dim, 1, KEYS).bytes;
        REQUIRE(bytes == eight || bytes == six || bytes == four, op, ": codes of ", bytes, " bytes a block of ", name, ", not ", eight,
                ", ", six, " or ", four);
        part_bytes.push_back(bytes);
      } else {
        check_rows(t, {-1, BLOCK, dim}, type, op, name);
        REQUIRE(t.stride(1) == dim || t.size(0) == 0, op, ": a block of ", name, " must be contiguous");
        part_bytes.push_back(kv_part_of(NATIVE, dim, element, KEYS).bytes);
      }
      base.push_back(t.const_data_ptr());
      block_stride.push_back(t.stride(0) * element);
      first_block.push_back(first_block.back() + t.size(0));
    }
  }
  // Of bytes, [blocks, bytes] each, or [blocks, 0] of a segment without.
  static PoolViews of_bytes(const Tensors& segments, int64_t bytes, const char* op, const char* name) {
    PoolViews found;
    for (const Tensor& t : segments) {
      const bool there = t.dim() == 2 && t.size(1) != 0;
      check_rows(t, {-1, there ? bytes : 0}, ScalarType::Byte, op, name);
      found.base.push_back(there ? t.const_data_ptr() : nullptr);
      found.block_stride.push_back(there ? t.stride(0) : 0);
      found.part_bytes.push_back(there ? bytes : 0);
      found.first_block.push_back(found.first_block.back() + t.size(0));
    }
    return found;
  }
  PoolViews() = default;
  Pool view() const { return {int64_t(base.size()), base.data(), block_stride.data(), part_bytes.data(), first_block.data()}; }
};

inline Shape shape_of(const Tensor& query, int64_t dims, int64_t kv_heads, int64_t value_dim, const char* op) {
  REQUIRE(query.dim() == dims, op, ": the query has the shape ", text(query), ", not of ", dims, " dimensions");
  const int64_t heads = query.size(1);
  REQUIRE(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": ", heads, " query heads are no multiple of ",
          kv_heads, " KV heads");
  const Shape shape = {dtype_of(query, op), query.size(0), kv_heads, heads / kv_heads, query.size(dims - 1), value_dim};
  REQUIRE(shape.head_dim > 0 && value_dim > 0, op, ": head_dim is ", shape.head_dim, ", value_dim ", value_dim);
  return shape;
}

// Checks query, key and value of a chunk; all have as many tokens as the query, or the number that is given.
inline Shape chunk_shape(const Tensor& query, const Tensor& key, const Tensor& value, const char* op, int64_t given = -1) {
  REQUIRE(key.dim() == 4 && value.dim() == 4, op, ": the key has the shape ", text(key), " and the value ",
          text(value), "; both must have 4 dimensions");
  const Shape shape = shape_of(query, 4, key.size(1), value.size(3), op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = given < 0 ? query.size(2) : given;
  check_rows(query, {shape.rows, shape.kv_heads * shape.group, tokens, shape.head_dim}, type, op, "query");
  check_rows(key, {shape.rows, shape.kv_heads, tokens, shape.head_dim}, type, op, "key");
  check_rows(value, {shape.rows, shape.kv_heads, tokens, shape.value_dim}, type, op, "value");
  return shape;
}

// A tensor of some shape on the CPU, not initialised; of the dtype of another one, or the one given.
inline Tensor new_tensor(const Tensor& like, const Shapes& sizes, std::optional<ScalarType> type = std::nullopt) {
  return new_contiguous(type ? dtype_numbers()[int(*type)] : like.dtype_number(), sizes);
}

// Of the shape [rows, heads, tokens, dim] with tokens before heads in memory, as a layer goes on with it.
inline Tensor new_rows(const Tensor& like, int64_t rows, int64_t heads, int64_t tokens, int64_t dim) {
  const auto some = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t token = some(heads) * some(dim);
  return new_strided(like.dtype_number(), {rows, heads, tokens, dim}, {some(tokens) * token, some(dim), token, 1});
}

inline Tensor new_floats(const Tensor& like, const Shapes& sizes) {
  return new_tensor(like, sizes, ScalarType::Float);
}

}  // namespace moacompress
