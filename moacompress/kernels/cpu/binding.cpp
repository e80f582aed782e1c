// The kernels as torch operators, on libtorch's stable ABI: one binary for torch 2.10 and later and for any Python. Those of a decode
// step beyond attention are in binding_step.cpp.
#include "binding.h"

namespace {

using namespace moacompress;

// Refuses rules that select what none does.
void check_selecting(const RuleTable& rules, const char* op) {
  for (int64_t i = 0; i < rules.count; i++) {
    const Rule rule = rules.of(i);
    REQUIRE(rule.select_alpha >= 0 && rule.select_alpha < MAX_TOKENS && rule.select_beta_q >= 0 && rule.select_beta_q <= 1024, op,
            ": rule ", i, " selects ", rule.select_alpha, " tokens and ", rule.select_beta_q, "/1024 of those that have left");
  }
}

// Where the tokens that gates select lie: of each segment their scores, and the table.
struct SelectedTokens {
  const Tensors& scores;
  const Tensor& table;
};

// Attends; then, where there are selected tokens, those that leave windows as the next token comes compete.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensors& keys, const Tensors& values, const Tensor& table,
                                  const Tensor& lengths, const Tensor& rules, double scaling, double softcap,
                                  const std::optional<Tensor>& sink_logits, int64_t value_dim, const SelectedTokens* tokens_kept,
                                  const char* op) {
  REQUIRE(!keys.empty() && keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(),
          " of values; at least one of each, and as many, are needed");
  REQUIRE(table.dim() == 3, op, ": the table has the shape ", text(table), ", not of 3 dimensions");
  for (const Tensor& segment : values)
    if (!value_dim && segment.dim() == 3) value_dim = segment.size(2);
  const Shape shape = shape_of(query, 3, table.size(1), value_dim, op);
  const ScalarType type = query.scalar_type();
  check_rows(query, {shape.rows, -1, shape.head_dim}, type, op, "query");
  const PoolViews key_pool(keys, shape.head_dim, type, op, "keys"), value_pool(values, shape.value_dim, type, op, "values");
  const void* ids = dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  const int64_t* tokens = numbers(lengths, shape.rows, op, "lengths");
  for (int64_t row = 0; row < shape.rows; row++)
    REQUIRE(tokens[row] >= 0 && tokens[row] < MAX_TOKENS, op, ": row ", row, " has ", tokens[row], " tokens");
  const Rest rest = rest_of(rules, scaling, softcap, sink_logits, shape, op);
  Selected selected = {};
  if (tokens_kept) {
    selected.ids = static_cast<int32_t*>(const_cast<void*>(
        dense(tokens_kept->table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "the table of what gates select")));
    selected.width = tokens_kept->table.size(2);
    check_selecting(rest.rules, op);
  }
  const int64_t heads = shape.kv_heads * shape.group;
  Tensor out = new_tensor(query, Shapes{shape.rows, heads, shape.value_dim});
  Tensor lse = new_floats(query, {shape.rows, heads});
  const DecodeCall call = {shape, rest.rules, rest.scores, query.const_data_ptr(), query.stride(0), query.stride(1),
                           key_pool.view(), value_pool.view(), {static_cast<const int32_t*>(ids), table.size(2)}, tokens,
                           out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), nullptr, nullptr,
                           tokens_kept ? &selected : nullptr};
  check_status(decode(call, parallel(), isa()), op);
  if (tokens_kept) {
    const PoolViews scores = PoolViews::of_bytes(tokens_kept->scores, SCORE_BYTES * BLOCK, op, "scores");
    REQUIRE(scores.first_block == key_pool.first_block && scores.first_block == value_pool.first_block, op, ": scores of ",
            scores.first_block.back(), " blocks, and keys of ", key_pool.first_block.back());
    check_status(select_next({shape, rest.rules, key_pool.view(), value_pool.view(), scores.view(), call.table,
                              {selected.ids, selected.width}, tokens}),
                 op);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> decode_op(Tensor query, Tensors keys, Tensors values, Tensor table, Tensor lengths, Tensor rules,
                                     double scaling, double softcap, std::optional<Tensor> sink_logits, int64_t value_dim) {
  return attend(query, keys, values, table, lengths, rules, scaling, softcap, sink_logits, value_dim, nullptr, "decode");
}

Tensor decode_selecting_op(Tensor query, Tensors keys, Tensors values, Tensors scores, Tensor table, Tensor selected, Tensor lengths,
                           Tensor rules, double scaling, double softcap, std::optional<Tensor> sink_logits, int64_t value_dim) {
  const SelectedTokens kept = {scores, selected};
  return std::get<0>(attend(query, keys, values, table, lengths, rules, scaling, softcap, sink_logits, value_dim, &kept, "decode_selecting"));
}

void move_selected_op(Tensors keys, Tensors values, Tensors scores, Tensor heads, Tensor slots, Tensor to, Tensor formats,
                      int64_t head_dim, int64_t value_dim) {
  const char* op = "move_selected";
  ScalarType type = ScalarType::Float;
  DType dtype = F32;
  for (const Tensors* side : {&keys, &values})
    for (const Tensor& segment : *side)
      if (segment.scalar_type() != ScalarType::Byte) {
        type = segment.scalar_type();
        dtype = dtype_of(segment, op, "the cache");
      }
  REQUIRE(head_dim > 0 && value_dim > 0, op, ": head_dim is ", head_dim, ", value_dim ", value_dim);
  const PoolViews key_pool(keys, head_dim, type, op, "keys"), value_pool(values, value_dim, type, op, "values");
  const PoolViews score_pool = PoolViews::of_bytes(scores, SCORE_BYTES * BLOCK, op, "scores");
  REQUIRE(formats.dim() == 2, op, ": formats of the shape ", text(formats), ", not [2, KV heads]");
  const int64_t count = heads.numel(), known = formats.size(1), element = int64_t(element_size(dtype));
  const int64_t* codes = static_cast<const int64_t*>(dense(formats, {2, known}, ScalarType::Long, op, "formats"));
  std::vector<KVParts> kv_parts;
  for (int64_t head = 0; head < known; head++) {
    for (const int64_t format : {codes[head], codes[known + head]})
      REQUIRE(format >= 0 && format < FORMATS, op, ": KV head ", head, " has the format ", format, "; known are 0 to ", FORMATS - 1);
    kv_parts.push_back({kv_part_of(codes[head], head_dim, element, KEYS), kv_part_of(codes[known + head], value_dim, element, VALUES)});
  }
  const int64_t *of = numbers(heads, count, op, "heads"), *from = numbers(slots, count, op, "slots"), *at = numbers(to, count, op, "to");
  for (int64_t i = 0; i < count; i++)
    REQUIRE(of[i] >= 0 && of[i] < known && from[i] >= 0 && at[i] >= 0, op, ": token ", i, " of KV head ", of[i], " of ",
            known, " goes from slot ", from[i], " to ", at[i]);
  check_status(move_selected({kv_parts.data(), key_pool.view(), value_pool.view(), score_pool.view(), count, of, from, at}), op);
}

// Reads where the tokens of each of some pairs begin, of `count` in all.
const int64_t* begins_of(const Tensor& t, int64_t pairs, int64_t count, const char* op) {
  const int64_t* begins = numbers(t, pairs + 1, op, "begins");
  bool ascending = begins[0] == 0 && begins[pairs] == count;
  for (int64_t pair = 0; pair < pairs; pair++) ascending = ascending && begins[pair] <= begins[pair + 1];
  REQUIRE(ascending, op, ": begins do not ascend from 0 to ", count);
  return begins;
}

// Reads begins, slots, admitted and evicted, all int64; slots of the cache are looked up where they are used.
TransientTokens transient_of(const Tensors& transient, const Shape& shape, const int64_t* real, const char* op) {
  REQUIRE(transient.size() == 4, op, ": ", transient.size(), " tensors say which tokens are selected, not 4");
  const int64_t pairs = shape.rows * shape.kv_heads, count = transient[1].numel();
  const int64_t* begins = begins_of(transient[0], pairs, count, op);
  const TransientTokens found = {begins, numbers(transient[1], count, op, "slots"), numbers(transient[2], count, op, "admitted"),
                                 numbers(transient[3], count, op, "evicted")};
  for (int64_t pair = 0; pair < pairs; pair++)
    for (int64_t i = begins[pair]; i < begins[pair + 1]; i++)
      REQUIRE(-1 - found.slots[i] < real[pair / shape.kv_heads], op, ": slot ", found.slots[i], " of a chunk of ",
              real[pair / shape.kv_heads], " real tokens");
  return found;
}

std::tuple<Tensor, Tensor> prefill_op(Tensor query, Tensor key, Tensor value, Tensors keys, Tensors values, Tensor table,
                                      Tensor past, Tensor valid, Tensor rules, double scaling, double softcap,
                                      std::optional<Tensor> sink_logits, Tensors transient) {
  const char* op = "prefill";
  const Shape shape = chunk_shape(query, key, value, op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = query.size(2), heads = shape.kv_heads * shape.group;
  REQUIRE(keys.size() == values.size(), op, ": ", keys.size(), " segments of keys and ", values.size(), " of values");
  const PoolViews key_pool(keys, shape.head_dim, type, op, "keys"), value_pool(values, shape.value_dim, type, op, "values");
  const void* ids = dense(table, {shape.rows, shape.kv_heads, -1}, ScalarType::Int, op, "table");
  const int64_t *before = numbers(past, shape.rows, op, "past"), *real = numbers(valid, shape.rows, op, "valid");
  for (int64_t row = 0; row < shape.rows; row++)
    REQUIRE(before[row] >= 0 && real[row] >= 0 && real[row] <= tokens && before[row] + real[row] < MAX_TOKENS, op,
            ": row ", row, " has ", before[row], " tokens before the chunk and ", real[row], " real ones of ", tokens,
            " in it");
  const Rest rest = rest_of(rules, scaling, softcap, sink_logits, shape, op);
  TransientTokens kept = {};
  if (!transient.empty()) kept = transient_of(transient, shape, real, op);
  Tensor out = new_rows(query, shape.rows, heads, tokens, shape.value_dim);
  Tensor lse = new_floats(query, {shape.rows, heads, tokens});
  const PrefillCall call = {shape, rest.rules, rest.scores, tokens, query.const_data_ptr(), key.const_data_ptr(),
                            value.const_data_ptr(), strides(query), strides(key), strides(value), key_pool.view(),
                            value_pool.view(), {static_cast<const int32_t*>(ids), table.size(2)}, before, real,
                            out.mutable_data_ptr(), strides(out), static_cast<float*>(lse.mutable_data_ptr()),
                            transient.empty() ? nullptr : &kept};
  check_status(prefill(call, parallel(), isa()), op);
  return {out, lse};
}

// Memory of each part is [blocks, 16, dim] of native numbers, or [blocks, bytes] of codes; its blocks may lie apart.
void put_op(Tensors memory, Tensor slots, Tensor vectors, Tensor formats, bool values) {
  const char* op = "put";
  REQUIRE(vectors.dim() == 3 && vectors.size(2) > 0, op, ": vectors of the shape ", text(vectors), ", not [tokens, parts, numbers]");
  const int64_t count = vectors.size(0), parts = vectors.size(1), dim = vectors.size(2);
  const ScalarType type = vectors.scalar_type();
  const DType dtype = dtype_of(vectors, op, "vectors");
  check_rows(vectors, {count, parts, dim}, type, op, "vectors");
  REQUIRE(int64_t(memory.size()) == parts && parts > 0, op, ": ", memory.size(), " memories of ", parts, " parts");
  const int64_t* asked = numbers(formats, parts, op, "formats");
  const int64_t* at = static_cast<const int64_t*>(dense(slots, {count, parts}, ScalarType::Long, op, "slots"));
  std::vector<KVPart> kv_parts;
  std::vector<char*> to;
  std::vector<int64_t> to_block;
  for (int64_t part = 0; part < parts; part++) {
    REQUIRE(asked[part] >= 0 && asked[part] < FORMATS, op, ": part ", part, " has the format ", asked[part], "; known are 0 to ", FORMATS - 1);
    Tensor& here = memory[size_t(part)];
    const int64_t element = int64_t(element_size(dtype));
    kv_parts.push_back(kv_part_of(asked[part], dim, element, values ? VALUES : KEYS));
    if (asked[part] == NATIVE) {
      check_rows(here, {-1, BLOCK, dim}, type, op, "memory");
      REQUIRE(here.numel() == 0 || here.stride(1) == dim, op, ": a block of memory must be contiguous");
    } else {
      check_rows(here, {-1, kv_parts.back().bytes}, ScalarType::Byte, op, "memory");
    }
    to.push_back(static_cast<char*>(here.mutable_data_ptr()));
    to_block.push_back(here.stride(0) * (asked[part] == NATIVE ? element : 1));
    for (int64_t i = part; i < count * parts; i += parts)
      REQUIRE(at[i] >= 0 && at[i] < here.size(0) * BLOCK, op, ": slot ", at[i], " of ", here.size(0), " blocks");
  }
  const PutCall call = {dtype, parts, count, kv_parts.data(), vectors.const_data_ptr(), vectors.stride(0), vectors.stride(1), at,
                        to.data(), to_block.data()};
  check_status(put(call, parallel(), isa()), op);
}

std::tuple<Tensor, Tensor> eviction_schedule_op(Tensor begins, Tensor positions, Tensor admitted, Tensor scores, Tensor rules) {
  const char* op = "eviction_schedule";
  const int64_t pairs = begins.numel() - 1, count = positions.numel();
  const RuleTable table = rules_of(rules, -1, op, "KV head");
  REQUIRE(pairs >= 0 && (pairs == 0 || (table.count && pairs % table.count == 0)), op, ": ", pairs, " KV heads of rows for ", table.count,
          " rules");
  check_selecting(table, op);
  Tensor evicted = new_tensor(positions, Shapes{count}), places = new_tensor(positions, Shapes{count});
  const EvictionSchedule tokens = {begins_of(begins, pairs, count, op), numbers(positions, count, op, "positions"),
                                   numbers(admitted, count, op, "admitted"), static_cast<int64_t*>(evicted.mutable_data_ptr()),
                                   static_cast<int64_t*>(places.mutable_data_ptr())};
  for (int64_t i = 0; i < count; i++)
    REQUIRE(tokens.admitted[i] >= 0 && tokens.admitted[i] < MAX_TOKENS, op, ": token ", i, " is admitted when ", tokens.admitted[i],
            " have left");
  check_status(eviction_schedule(tokens, pairs, table, numbers(scores, count, op, "scores")), op);
  return {evicted, places};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta,
                                               Tensor valid, Tensor rules, double scaling, double softcap) {
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
    REQUIRE(real[row] >= 0 && real[row] <= tokens && tokens < MAX_TOKENS, op, ": row ", row, " has ", real[row],
            " real tokens of ", tokens);
  const Rest rest = rest_of(rules, scaling, softcap, std::nullopt, shape, op);
  check_native(rest.rules, op);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> profile_op(
    Tensor dout, Tensor query, Tensor key, Tensor value, Tensor rules, double scaling, double softcap, std::optional<Tensor> sink_logits,
    bool baselines, std::optional<int64_t> lag, std::optional<Tensor> evicted, std::optional<Tensor> of_rule) {
  const char* op = "profile_backward";
  REQUIRE(query.dim() < 1 || query.size(0) == 1, op, ": the batch has ", query.size(0), " rows; samples come one by one");
  const Shape shape = chunk_shape(query, key, value, op);
  const ScalarType type = query.scalar_type();
  const int64_t tokens = query.size(2), heads = shape.kv_heads * shape.group;
  REQUIRE(tokens < MAX_TOKENS, op, ": ", tokens, " tokens, of at most ", MAX_TOKENS - 1);
  check_rows(dout, {1, heads, tokens, shape.value_dim}, type, op, "dout");
  const RuleTable asked = rules_of(rules, -1, op, "rule");
  REQUIRE(asked.count > 0, op, ": there are no rules to ask for");
  const int64_t native_window = asked.of(0).native_window;
  check_native(asked, op);
  for (int64_t i = 0; i < asked.count; i++)
    REQUIRE(asked.of(i).native_window == native_window, op, ": native windows of ", native_window, " and of ",
            asked.of(i).native_window, " in one layer");
  const Scores scores = scores_of(scaling, softcap, sink_logits, shape, op);
  Tensor dquery = new_rows(query, 1, heads, tokens, shape.head_dim);
  Tensor dkey = new_rows(key, 1, shape.kv_heads, tokens, shape.head_dim);
  Tensor dvalue = new_rows(value, 1, shape.kv_heads, tokens, shape.value_dim);
  Tensor sums = new_tensor(query, Shapes{baselines ? 4 : 2, shape.kv_heads, asked.count}, ScalarType::Double);
  REQUIRE(!lag || *lag >= 0, op, ": lag is ", lag.value_or(0), ", less than 0");
  Tensor of_tokens = new_tensor(query, Shapes{shape.kv_heads, lag ? tokens : 0}, ScalarType::Double);
  int64_t alive = 0;
  REQUIRE(evicted.has_value() == of_rule.has_value(), op, ": evicted and of_rule go together");
  Choices choices = {};
  if (evicted) {
    choices.ways = evicted->dim() == 3 ? evicted->size(1) : 0;
    const Shapes sizes = {shape.kv_heads, choices.ways, tokens};
    choices.evicted = static_cast<const int32_t*>(dense(*evicted, sizes, ScalarType::Int, op, "evicted"));
    choices.of_rule = numbers(*of_rule, asked.count, op, "of_rule");
    for (int64_t i = 0; i < asked.count; i++)
      REQUIRE(choices.of_rule[i] < choices.ways, op, ": rule ", i, " selects in way ", choices.of_rule[i], " of ", choices.ways);
  }
  const ProfileCall call = {shape, asked, scores, tokens, query.const_data_ptr(), key.const_data_ptr(),
                            value.const_data_ptr(), dout.const_data_ptr(), strides(query), strides(key), strides(value),
                            strides(dout), dquery.mutable_data_ptr(), dkey.mutable_data_ptr(), dvalue.mutable_data_ptr(),
                            strides(dquery), strides(dkey), strides(dvalue), baselines,
                            static_cast<double*>(sums.mutable_data_ptr()), lag.value_or(0),
                            lag ? static_cast<double*>(of_tokens.mutable_data_ptr()) : nullptr, &alive, choices};
  check_status(profile(call, parallel(), isa()), op);
  return {dquery, dkey, dvalue, sums, of_tokens, alive};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of the instruction set that the kernels use; null if torch refused the operators.
EXPORT const char* moacompress_isa() { return all_registered() ? isa_name(isa()) : nullptr; }

// Chooses an instruction set by name; false where it is unknown or this processor lacks it.
EXPORT bool moacompress_set_isa(const char* name) {
  for (int i = PORTABLE; i < ISAS; i++)
    if (std::string(isa_name(Isa(i))) == name && isa_works(Isa(i))) {
      chosen_isa.store(i);
      return true;
    }
  return false;
}

// What query n - 1 sees under one rule, and in which blocks: into intervals[4] and blocks[4]. Tests hold it against the plan's own
// definition.
EXPORT void moacompress_visible(int64_t n, const int64_t* numbers, int64_t* intervals, int64_t* blocks) {
  const Rule rule = RuleTable{numbers, 1}.of(0);
  const Visible see = visible(n, rule);
  const int64_t seen[] = {see.first, see.sink_end, see.start, n};
  Interval runs[RUNS];
  block_runs(n, rule, runs);
  for (int64_t i = 0; i < 4; i++) {
    intervals[i] = seen[i];
    blocks[i] = i % 2 ? runs[i / 2].end : runs[i / 2].begin;
  }
}

static const moacompress::Operators operators("moacompress_cpu", {
    {"decode(Tensor query, Tensor[] keys, Tensor[] values, Tensor table, Tensor lengths, Tensor rules, float scaling, "
     "float softcap, Tensor? sink_logits, int value_dim=0) -> (Tensor, Tensor)",
     Boxed<&decode_op>::call},
    {"decode_selecting(Tensor query, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!)[] scores, Tensor table, Tensor selected, "
     "Tensor lengths, Tensor rules, float scaling, float softcap, Tensor? sink_logits, int value_dim=0) -> Tensor",
     Boxed<&decode_selecting_op>::call},
    {"move_selected(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!)[] scores, Tensor heads, Tensor slots, Tensor to, "
     "Tensor formats, int head_dim, int value_dim) -> ()",
     Boxed<&move_selected_op>::call},
    {"prefill(Tensor query, Tensor key, Tensor value, Tensor[] keys, Tensor[] values, Tensor table, Tensor past, Tensor valid, "
     "Tensor rules, float scaling, float softcap, Tensor? sink_logits, Tensor[] transient) -> (Tensor, Tensor)",
     Boxed<&prefill_op>::call},
    {"put(Tensor(a!)[] memory, Tensor slots, Tensor vectors, Tensor formats, bool values) -> ()",
     Boxed<&put_op>::call},
    {"eviction_schedule(Tensor begins, Tensor positions, Tensor admitted, Tensor scores, Tensor rules) -> (Tensor, Tensor)",
     Boxed<&eviction_schedule_op>::call},
    {"prefill_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta, Tensor valid, "
     "Tensor rules, float scaling, float softcap) -> (Tensor, Tensor, Tensor)",
     Boxed<&backward_op>::call},
    {"profile_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor rules, float scaling, "
     "float softcap, Tensor? sink_logits, bool baselines, int? lag=None, Tensor? evicted=None, Tensor? of_rule=None) "
     "-> (Tensor, Tensor, Tensor, Tensor, Tensor, SymInt)",
     Boxed<&profile_op>::call},
});
