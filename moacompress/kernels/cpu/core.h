// Attention over block tables on the CPU, without torch: plain pointers, strides in elements, storage in float32, bfloat16 or
// float16, accumulation in float32.
//
// `attention.cpp`, `backward.cpp` and `profile.cpp` cut the work into tasks of a fixed size that depend on one (row, KV head) only
// and hand them to kernels written once (kernels.inl, profile.inl) and compiled once per instruction set. So every result is
// bit-equal for any number of threads and whatever else is in the batch. This header is read by the files of the instruction sets:
// no std templates here, or the linker may keep the copy that was compiled for a processor that is not there.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "formats.h"
#include "visible.h"
#include "weight_blocks.h"

namespace moacompress {

enum DType : int { F32 = 0, BF16 = 1, F16 = 2 };
enum Isa : int { PORTABLE, AVX2, AVX512, AVX512_BF16, AVX512_AMX, NEON, NEON_BF16, ISAS };  // of one processor the plainest first
enum Status : int { OK = 0, NO_MEMORY = 1, MISSING_BLOCK = 2 };

constexpr int64_t CHUNK_BLOCKS = 16;  // cache blocks of one decode task
constexpr int64_t AHEAD = 2;          // blocks that decode reads ahead
constexpr int64_t TILE = 64;          // keys of one step of prefill and backward
constexpr int64_t KEPT = CHUNK_BLOCKS * BLOCK + 16;  // floats that a decode task keeps of a query head: peak, total, and weights from 16 on

static MOACOMPRESS_INLINE size_t element_size(DType dtype) { return dtype == F32 ? 4 : 2; }

// Runs `body(arg)` on up to `threads` threads at once; the bodies share out the tasks themselves.
struct Parallel {
  int threads;
  void (*run)(void* pool, int threads, void (*body)(void*), void* arg);
  void* pool;
};

struct Strides {
  int64_t row, head, token;
};

// A growing list of segments of blocks, of their keys or of their values. Segment s holds the block ids [first_block[s],
// first_block[s + 1]), each `half_bytes[s]` of memory, `block_stride[s]` bytes apart; see `KVPart`.
struct Pool {
  int64_t segments;
  const void* const* base;
  const int64_t *block_stride, *part_bytes;
  const int64_t* first_block;
};

struct Shape {
  DType dtype;
  int64_t rows, kv_heads, group, head_dim, value_dim;
};

// The K and the V part of a KV head's blocks.
struct KVParts {
  KVPart key, value;
};

static MOACOMPRESS_INLINE KVParts kv_parts_of(const Rule& rule, const Shape& shape) {
  const int64_t element = int64_t(element_size(shape.dtype));
  return {kv_part_of(rule.key_format, shape.head_dim, element, KEYS), kv_part_of(rule.value_format, shape.value_dim, element, VALUES)};
}

struct Scores {
  float scaling, softcap;    // softcap: 0 = none
  const float* sink_logits;  // [kv_heads * group] or null
};

struct Table {
  const int32_t* ids;  // [rows, kv_heads, width]
  int64_t width;
};

// What a layer that shares attention has of its anchor, whose keys and table the call is given.
struct Shared {
  const int64_t* head_map;  // [kv_heads] the anchor's KV head whose weights each of its own takes
  const Pool* values;       // [kv_heads] where the values of each lie, beside the anchor's own
  RuleTable rules;          // of the anchor's KV heads
  const float* kept;        // weights that the anchor's call kept: queries and keys are not looked at
};

// The tokens that gates select of every row and KV head, in blocks of the pool: the one in place p is in ids[p / 16]. Beside the keys
// and values of its tokens a block of such a KV head has their scores, int16.
struct Selected {
  int32_t* ids;  // [rows, kv_heads, width]
  int64_t width;
  int64_t* left;          // [rows, kv_heads] tokens that have left the window, and were kept or not
  const int16_t* scores;  // [rows, kv_heads] of the token that comes; of decode none
};
constexpr int64_t SCORE_BYTES = 2;

struct DecodeCall {
  Shape shape;
  RuleTable rules;  // of the KV heads
  Scores scores;
  const void* query;  // [rows, heads, head_dim]
  int64_t query_row, query_head;
  Pool keys, values;
  Table table;
  const int64_t* lengths;  // [rows]
  void* out;               // [rows, heads, value_dim], dense
  float* lse;              // [rows, heads], dense; or null
  float* keep;             // `kept_floats` for layers that share, or null
  const Shared* shared;    // or null
  const Selected* selected = nullptr;  // or null: then of the tokens that gates select none is seen
};

// The selected tokens that queries of a chunk may attend to, those of a (row, KV head) from begins[pair] up to begins[pair + 1]. One
// is seen by the queries that so many tokens have left the window for: at least `admitted`, and less than `evicted`.
struct TransientTokens {
  const int64_t* begins;  // [rows * kv_heads + 1]
  const int64_t* slots;   // block id * 16 + place in it; -1 - t of token t of the chunk
  const int64_t *admitted, *evicted;
  // Of a pair alone, its tokens from the first on.
  MOACOMPRESS_INLINE TransientTokens of(int64_t pair) const {
    const int64_t begin = begins[pair];
    return {begins + pair, slots + begin, admitted + begin, evicted + begin};
  }
  MOACOMPRESS_INLINE int64_t count() const { return begins ? begins[1] - begins[0] : 0; }
};

struct PrefillCall {
  Shape shape;
  RuleTable rules;  // of the KV heads
  Scores scores;
  int64_t tokens;
  const void *query, *key, *value;
  Strides query_at, key_at, value_at;
  Pool keys, values;  // no segments: nothing is in the cache
  Table table;
  const int64_t *past, *valid;  // [rows]
  void* out;
  Strides out_at;
  float* lse;  // [rows, heads, tokens], dense
  const TransientTokens* transient = nullptr;  // or null; besides what the rules show
};

// One token more in every row. `runs` holds the first block and the end of every run; `lag` tokens are kept longer (0: none); `refs`
// counts how many table entries name each block.
struct AdvanceCall {
  Shape shape;  // the group is not looked at
  RuleTable rules;  // of the KV heads
  int64_t lag;
  const void *key, *value;
  Strides key_at, value_at;  // one token each: the stride from token to token is not looked at
  Pool keys, values;         // written to
  int32_t* ids;              // [rows, kv_heads, width]
  int64_t width;
  int64_t *lengths, *runs;  // [rows], [RUNS, 2, rows, kv_heads]
  int32_t* refs;            // [blocks]
  int64_t blocks;
  // values of layers that share the keys, beside a block's own: so many planes at most, and of each KV head the bytes of their parts
  int64_t value_sets;
  const Pool* shared_values;           // [value sets]
  const int64_t* shared_value_bytes;  // [kv_heads, value sets]; 0 for none
  const Selected* selected = nullptr;  // or null; else the one set is that of scores
};
// The values of one token of every row, put beside those of the anchor's blocks, whose token is in them already.
struct SharedValuesCall {
  Shape shape;  // the group is not looked at
  RuleTable rules;  // of the KV heads
  const void* value;
  Strides value_at;
  const int64_t* head_map;  // as of `Shared`
  const Pool* values;       // likewise; written to
  Table table;              // the anchor's
  const int64_t* lengths;   // [rows] with the token
};
// The tokens that compete to be selected, those of a (row, KV head) from begins[pair] up to begins[pair + 1]; its fields are those of
// moacompress/rules/selection.py.
struct EvictionSchedule {
  const int64_t *begins, *positions, *admitted;  // [pairs + 1], [tokens], [tokens]
  int64_t *evicted, *places;                     // [tokens]
};
constexpr int64_t NEVER = int64_t(1) << 40;

// Tokens written to slots, block * 16 + place in it, of parts of blocks: one part of a KV head each, of one size.
struct PutCall {
  DType dtype;
  int64_t parts, count;  // tokens
  const KVPart* kv_parts;
  const void* from;         // [tokens, parts, dim]
  int64_t token, part;      // numbers from token to token, and from part to part
  const int64_t* slots;     // [tokens, parts]
  char* const* to;          // of each part its memory
  const int64_t* to_block;  // bytes from block to block of it
};

// The tokens that leave windows as the next one of every row comes: those that win are copied to the places where they are kept.
struct SelectNextCall {
  Shape shape;  // the group is not looked at
  RuleTable rules;  // of the KV heads
  Pool keys, values, scores;  // written to
  Table table, selected;      // of sinks and window, and of selected tokens by their places
  const int64_t* lengths;     // [rows]
};

// Tokens copied to places where they are kept, slots as of PutCall.
struct MoveSelectedCall {
  const KVParts* kv_parts;    // of the KV heads
  Pool keys, values, scores;  // written to
  int64_t count;
  const int64_t *heads, *slots, *to;  // [count] KV head of each token, where it is, and where it goes to
};

// What a call of a step lacks: so many blocks of the formats of a KV head, -1 where the table is too narrow; 0 when it is done.
struct Missing {
  int64_t blocks, head;
};
constexpr int64_t TABLE_TOO_NARROW = -1;

// Gradients of a prefill without cache. `delta` is rowsum(dout * out) - dlse, FlashAttention's delta.
struct BackwardCall {
  Shape shape;
  RuleTable rules;  // of the KV heads
  Scores scores;
  int64_t tokens;
  const void *query, *key, *value, *dout;
  Strides query_at, key_at, value_at, dout_at;
  const int64_t* valid;
  const float *lse, *delta;  // [rows, heads, tokens], dense
  void *dquery, *dkey, *dvalue;
  Strides dquery_at, dkey_at, dvalue_at;
};

constexpr int64_t TILE_LANES = 192, MIN_ROWS = 8;
// Query rows of a tile: about TILE_LANES lanes, whatever the group.
static MOACOMPRESS_INLINE int64_t tile_rows(int64_t group) { return larger(TILE_LANES / group, MIN_ROWS); }

// When rules that select evict each token of a sample; see moacompress/kernels/arguments.py.
struct Choices {
  int64_t ways;            // to select
  const int32_t* evicted;  // [kv_heads, ways, tokens]
  const int64_t* of_rule;  // [rules] the way of each, -1 of one that does not select; null where none does
};

// What an attention layer's backward gives and what every rule would move, of one sample; see `calibration/influence.py`, whose
// definitions and names these are.
struct ProfileCall {
  Shape shape;  // one row
  RuleTable rules;  // every KV head is asked what each of them would do; all have the same native window
  Scores scores;
  int64_t tokens;
  const void *query, *key, *value, *dout;
  Strides query_at, key_at, value_at, dout_at;
  void *dquery, *dkey, *dvalue;
  Strides dquery_at, dkey_at, dvalue_at;
  bool baselines;
  double* sums;    // [2, or 4 with baselines, kv_heads, rules]: squares and total of d, then MoA's |E| and the masked probability
  int64_t lag;     // tokens from a key on before which queries do not count in `of_tokens`
  double* of_tokens;  // [kv_heads, tokens] sum of the squares of what each key alone would move, or null
  int64_t* alive;     // rows that took part
  Choices choices;
};

constexpr int64_t PROFILE_LANES = 128;  // lanes of a tile, unless one row alone has more
constexpr int64_t MOST_LANES = 256;     // of a panel, on any instruction set
constexpr int64_t PROFILE_PAD = 16;     // rows of the gradients in float32 have a multiple of it

// A linear layer of a few rows; all dense.
struct LinearCall {
  DType dtype;
  int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;  // [rows, inputs], [outputs, inputs], [outputs] or null
  void* out;                      // [rows, outputs]
  const void* up;                 // or null; [outputs, inputs]: then it is silu(out) times the products with these
  const void* residual;           // or null; [rows, outputs]: added to what came out
  WeightKind kind = PLAIN, up_kind = PLAIN;  // of `weight` and `up`, which may be rows of blocks
};

// Root mean square norm; all dense.
struct NormCall {
  DType dtype;
  int64_t rows, size;
  const void *x, *weight;  // [rows, size], [size]
  float eps;
  void* out;               // [rows, size]
};

// Rotary position embeddings, in place: the two halves of a head are the two coordinates that are rotated.
struct RotateCall {
  DType dtype;
  int64_t rows, heads, dim;  // an even dim
  void* x;                   // [rows, heads, dim], dense
  const void *cos, *sin;     // [rows, dim] with strides of a row; 0 where all rows have the same
  int64_t cos_row, sin_row;
  const float* less;         // what is subtracted of what is rotated, [heads, dim]; null for nothing
};

Isa best_isa();            // the best that this processor and this build have
bool isa_works(Isa isa);
const char* isa_name(Isa isa);
Status decode(const DecodeCall& call, const Parallel& parallel, Isa isa);
size_t kept_floats(const DecodeCall& call);  // that a call can keep of its weights
Status prefill(const PrefillCall& call, const Parallel& parallel, Isa isa);
// The call can be made again once there is room: no token is written and no length is changed before. NO_MEMORY is for what it
// works in.
Status advance(const AdvanceCall& call, Isa isa, Missing& missing);
// MISSING_BLOCK where a block that is needed is not in a table.
Status select_next(const SelectNextCall& call);
Status move_selected(const MoveSelectedCall& call);
Status put_shared_values(const SharedValuesCall& call, Isa isa);
// Lets tokens compete, `scores` [tokens]: says when each is evicted, and its place. The rules are those of the KV heads.
Status eviction_schedule(const EvictionSchedule& tokens, int64_t pairs, const RuleTable& rules, const int64_t* scores);
Status put(const PutCall& call, const Parallel& parallel, Isa isa);
Status backward(const BackwardCall& call, const Parallel& parallel, Isa isa);
Status profile(const ProfileCall& call, const Parallel& parallel, Isa isa);
Status linear(const LinearCall* calls, int64_t count, const Parallel& parallel, Isa isa);  // all at once
// What blocks stand for, rounded to the call's dtype: [outputs, inputs] at `out`, from `weight` of a `kind`; nothing else is read.
Status expand(const LinearCall& call, const Parallel& parallel, Isa isa);
void rotate(const RotateCall& call, Isa isa);
void norm(const NormCall& call, Isa isa);

// ---- what the files of the instruction sets implement ----

// One decode task: some blocks of one (row, KV head), read once for all query heads of the group.
struct DecodeChunk {
  int64_t group, head_dim, value_dim, blocks;
  KVPart key, value;
  const void* query;
  int64_t query_head;
  const void* keys[CHUNK_BLOCKS];  // each block's part
  const void* values[CHUNK_BLOCKS];
  const void* coming[AHEAD];  // first K and V parts of blocks that this thread probably reads next, or null
  int64_t coming_bytes;
  int begin[CHUNK_BLOCKS], end[CHUNK_BLOCKS];  // tokens [begin, end) of each block are visible
  float scaling, softcap;
  float *peak, *total;  // [group] largest score, and sum of exp(score - peak)
  float* mixed;         // [group, value_dim] sum of exp(score - peak) * value, of codes in their rotated basis
  float* scratch;       // `decode_scratch` floats
  float* keep;          // [group, KEPT] where peak, total and weights are kept, or null
  const float* kept;    // what was kept so, or null; then there are no keys
  bool kept_in_blocks;  // whether it was kept of whole blocks, or of the tokens that are seen alone
};

// Finds the keys and values of columns [column, column + count) of a task: of native ones the row, of codes the part of the block,
// and its `places` in it.
struct RowSource {
  Columns columns;
  int64_t past;
  const int32_t* ids;  // the (row, KV head)'s part of the table
  int64_t width;
  KVPart key, value;
  const Pool *keys, *values;
  // the chunk of the (row, KV head): its rows, or its K and V parts of blocks from its first token on
  const char *key_chunk, *value_chunk;
  int64_t key_bytes, value_bytes;  // from token to token, or from block to block
};
bool find_rows(const RowSource& source, int64_t column, int64_t count, const void** keys, const void** values, int* places);
// The same of tokens by their slots, see `TransientTokens`.
bool find_slots(const RowSource& source, const int64_t* slots, int64_t count, const void** keys, const void** values, int* places);

// One task of prefill: query rows [0, rows) of the `group` heads of one (row, KV head). A lane is (head, row), head * rows + row.
struct PrefillTile {
  int64_t group, rows, head_dim, value_dim;
  const char* query;  // of the tile's first row and the group's first head
  int64_t query_head_bytes, query_row_bytes;
  RowSource source;
  Rule rule;
  int64_t low;  // tokens so far at the first row, itself included
  TransientTokens transient;  // of the (row, KV head); or no `begins`
  float scaling, softcap;
  const float* sink_logits;  // [group] or null
  char* out;
  int64_t out_head_bytes, out_row_bytes;
  float* lse;
  int64_t lse_head;
  // backward only: gradient of the query goes to `out`; `lse` is read
  const char* dout;
  int64_t dout_head_bytes, dout_row_bytes;
  const float* delta;
};

// One task of the backward of keys and values: keys [first, first + count) of one (row, KV head).
struct KeyTile {
  int64_t group, tokens, first, count, head_dim, value_dim;
  Rule rule;
  const char *query, *key, *value, *dout;  // of the (row, KV head), first token
  int64_t query_head_bytes, query_row_bytes, key_bytes, value_bytes, dout_head_bytes, dout_row_bytes;
  const float *lse, *delta;
  int64_t lse_head;
  float scaling, softcap;
  char *dkey, *dvalue;
  int64_t dkey_bytes, dvalue_bytes;
};

// Where the sums over the keys of a tile are read: once `key` is in, for one row and the cell (row, rule).
struct ProfileEvent {
  int32_t key, row, cell;
};

// Of one lane, its weights being relative to its largest logit: exp of the learned logit, D, the sum of the weights of the dense
// model, and MoA's sum of |E| over all keys.
struct LaneSums {
  double escape, delta, mass, effect;
};

// A rule that selects, on the rows of a task: key j is selected while `now` is at least j - sink + 1, and less than evicted[j].
struct ProfileChoice {
  int64_t rule, sink;
  const int32_t* evicted;  // [tokens]
  const int32_t* ever;     // keys that are ever selected, ascending
  int64_t count;
  const int32_t* now;      // [rows] how many tokens have left the window, ascending
};

// One task of the profile: some query rows of the `group` heads of one KV head. A lane is head * rows + row.
struct ProfileTile {
  int64_t group, rows, head_dim, value_dim;
  const int64_t* positions;  // [rows], ascending
  int64_t low, high;         // keys that any of the rows sees; low is a multiple of TILE
  int64_t native_window;
  float scaling, softcap;
  const float* sink_logits;  // [group] or null
  const char *query, *key, *value, *dout;  // of the KV head, first token
  int64_t query_head_bytes, query_row_bytes, key_bytes, value_bytes, dout_head_bytes, dout_row_bytes;
  char* dquery;
  int64_t dquery_head_bytes, dquery_row_bytes;
  float *dkey, *dvalue;  // [tokens up to a multiple of TILE, padded dim] of the KV head; added to
  int64_t lag;           // see ProfileCall
  double* of_tokens;     // [tokens] of the KV head, or null; added to
  int streams;           // 2, or 3 with MoA's |E|
  int64_t cells;         // rows * rules
  double* seen;          // [streams, cells, group] sums over what each rule sees; zero before
  LaneSums* lane_sums;   // [lanes]
  const ProfileEvent* windows;  // newest key first
  int64_t window_events;
  const ProfileEvent* sinks;  // oldest key first
  int64_t sink_events;
  const ProfileChoice* selected;
  int64_t choices, rules;
  float* selected_sums;  // [streams, lanes up to a multiple of LANES]
  void* order;  // whose turn it is to add to the keys of a block
  void (*wait)(void* order, int64_t block);
  void (*done)(void* order, int64_t block);
};

// One task of a linear layer: some of its outputs, for all rows. Or, without an input, what is to be made of rows of blocks: then the
// inputs of an output go to a row of `out`.
struct LinearTile {
  int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;
  void* out;
  int64_t out_row;
  WeightKind kind;
  float* scratch;      // `block_scratch` floats, where the weight is in blocks
  const float* panel;  // the input laid out for products of tiles, or null
};

struct Kernels {
  size_t (*decode_scratch)(int64_t group, int64_t head_dim);  // in floats
  size_t (*tile_scratch)(int64_t lanes, int64_t head_dim, int64_t value_dim);  // of all tile kernels, in floats
  void (*decode[3])(const DecodeChunk&);
  bool (*prefill[3])(const PrefillTile&, float* scratch);
  bool (*prefill_codes[3])(const PrefillTile&, float* scratch);  // where keys or values have codes
  void (*encode[3])(const void* from, const KVPart& kv_part, int64_t place, void* to, float* buffer);  // buffer: [dim rounded up to 16]
  void (*hadamard)(float* x, int64_t dim);                       // docs/formats.md, in place
  bool (*backward_query[3])(const PrefillTile&, float* scratch);
  void (*backward_key[3])(const KeyTile&, float* scratch);
  size_t (*profile_scratch)(int64_t lanes, int64_t head_dim, int64_t value_dim, int64_t keys);  // floats; keys: a multiple of TILE
  void (*profile[3])(const ProfileTile&, float* scratch);
  void (*narrow[3])(const float* from, int64_t count, void* to);
  void (*linear[3])(const LinearTile&);
  size_t (*panel_floats)(int64_t rows, int64_t inputs);  // of an input laid out for `linear_tiles`; 0 where that is not for it
  void (*lay_out)(const void* x, int64_t rows, int64_t inputs, float* panel);
  void (*linear_tiles)(const LinearTile&);  // of bfloat16, with a panel
  size_t (*block_scratch)(int64_t inputs, int64_t rows);  // in floats; no rows: of what is to be made of blocks
  void (*linear_blocks[3])(const LinearTile&);  // of a weight in blocks
  void (*expand_blocks[3])(const LinearTile&);
  void (*rotate[3])(void* x, const void* cos, const void* sin, const float* less, int64_t dim);  // one head
  void (*gate[3])(void* x, const void* up, int64_t count);                    // x = silu(x) * up
  void (*add[3])(void* x, const void* other, int64_t count);                  // x += other
  void (*norm[3])(const void* x, const void* weight, float eps, int64_t count, void* out);  // one row
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, avx512_amx_kernels;
extern const bool built_with_tiles;  // whether the last one has products of tiles
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_bf16_kernels;
extern const bool built_with_dots;  // whether the last one has products of pairs of bfloat16, and of four bytes
#endif

}  // namespace moacompress
