// Linear layers of a few rows: their outputs are cut into tasks. Every number is summed up alone, so how they are cut shows nowhere.
#include <vector>

#include "tasks.h"

namespace moacompress {

namespace {
// Bytes of the weight that a task reads: memory is read best in long runs, and threads end together if the runs are short.
// With blocks every task prepares the input again, so that it has more of them to read, and all it can where the input is long.
constexpr int64_t LEAST = 1 << 15, MOST = 1 << 18, MOST_OF_BLOCKS = 1 << 20, TASKS_A_THREAD = 4, FEW_ROWS = 4;
constexpr int64_t AT_ONCE = 4, AT_ONCE_TILED = 32;  // outputs that a kernel works on together

// The inputs of calls as products of tiles want them, in memory of this thread that is kept; nothing where there are no such products.
struct Panels {
  std::vector<const float*> of;

  Panels(const LinearCall* calls, int64_t count, const Kernels& kernels) : of(size_t(count), nullptr) {
    static thread_local std::vector<float> memory;
    const auto floats = [&](int64_t i) -> size_t {
      const bool plain = calls[i].kind == PLAIN || (calls[i].up && calls[i].up_kind == PLAIN);
      return plain && calls[i].dtype == BF16 ? kernels.panel_floats(calls[i].rows, calls[i].inputs) : 0;
    };
    const auto repeats = [&](int64_t i) { return i && floats(i - 1) && calls[i].x == calls[i - 1].x && calls[i].inputs == calls[i - 1].inputs; };
    size_t wanted = 0, at = 0;
    for (int64_t i = 0; i < count; i++) wanted += repeats(i) ? 0 : floats(i);
    if (memory.size() < wanted) memory.resize(wanted);
    for (int64_t i = 0; i < count; i++) {
      const size_t own = floats(i);
      if (!own) continue;
      if (repeats(i)) {
        of[size_t(i)] = of[size_t(i) - 1];
        continue;
      }
      kernels.lay_out(calls[i].x, calls[i].rows, calls[i].inputs, &memory[at]);
      of[size_t(i)] = &memory[at];
      at += own;
    }
  }
};
}  // namespace

Status linear(const LinearCall* calls, int64_t count, const Parallel& parallel, Isa isa) {
  const Kernels& kernels = kernels_of(isa);
  const Panels panels(calls, count, kernels);
  const auto bytes_of = [](const LinearCall& call) {  // that one output reads of the weights
    const auto row = [&](WeightKind kind) { return weight_row_bytes(kind, call.inputs, int64_t(element_size(call.dtype))); };
    return row(call.kind) + (call.up ? row(call.up_kind) : 0);
  };
  int64_t bytes = 0, tasks = 0, scratch = 0, blocks = 0;
  for (int64_t i = 0; i < count; i++) bytes += calls[i].outputs * bytes_of(calls[i]);
  const int64_t wanted = larger(bytes / (larger(parallel.threads, 1) * TASKS_A_THREAD), LEAST);
  const auto outputs_of = [&](const LinearCall& call) {
    const bool in_blocks = call.kind != PLAIN || (call.up && call.up_kind != PLAIN);
    const int64_t most = !in_blocks ? MOST : call.rows <= FEW_ROWS ? MOST_OF_BLOCKS : wanted;
    const int64_t together = panels.of[size_t(&call - calls)] ? AT_ONCE_TILED : AT_ONCE;
    return larger(smaller(wanted, most) / larger(bytes_of(call), 1) / together * together, together);
  };
  const auto tasks_of = [&](const LinearCall& call) { return (call.outputs + outputs_of(call) - 1) / outputs_of(call); };
  for (int64_t i = 0; i < count; i++) {
    tasks += tasks_of(calls[i]);
    if (calls[i].up) scratch = larger(scratch, calls[i].rows * smaller(outputs_of(calls[i]), calls[i].outputs));
    if (calls[i].kind != PLAIN || calls[i].up_kind != PLAIN) blocks = larger(blocks, int64_t(kernels.block_scratch(calls[i].inputs, calls[i].rows)));
  }
  scratch = (scratch + 15) / 16 * 16;
  return run_tasks(parallel, tasks, size_t(scratch + blocks), [&](int64_t index, float* shared_values) {
    const LinearCall* call = calls;
    for (; index >= tasks_of(*call); call++) index -= tasks_of(*call);
    const int64_t element = int64_t(element_size(call->dtype)), first = index * outputs_of(*call);
    const auto multiply = [&](LinearTile tile, const void* weight, WeightKind kind) {
      tile.weight = static_cast<const char*>(weight) + first * weight_row_bytes(kind, call->inputs, element);
      tile.kind = kind;
      if (kind == PLAIN && tile.panel) kernels.linear_tiles(tile);
      else (kind == PLAIN ? kernels.linear : kernels.linear_blocks)[call->dtype](tile);
    };
    LinearTile tile = {};
    tile.rows = call->rows;
    tile.inputs = call->inputs;
    tile.outputs = smaller(outputs_of(*call), call->outputs - first);
    tile.x = call->x;
    if (call->bias) tile.bias = static_cast<const char*>(call->bias) + first * element;
    tile.out = static_cast<char*>(call->out) + first * element;
    tile.out_row = call->outputs;
    tile.scratch = shared_values + scratch;
    tile.panel = panels.of[size_t(call - calls)];
    multiply(tile, call->weight, call->kind);
    LinearTile other = tile;
    if (call->up) {
      other.bias = nullptr;
      other.out = shared_values;
      other.out_row = tile.outputs;
      multiply(other, call->up, call->up_kind);
    }
    for (int64_t r = 0; r < tile.rows && (call->up || call->residual); r++) {
      char* out = static_cast<char*>(tile.out) + r * tile.out_row * element;
      if (call->up) kernels.gate[call->dtype](out, static_cast<char*>(other.out) + r * tile.outputs * element, tile.outputs);
      if (call->residual)
        kernels.add[call->dtype](out, static_cast<const char*>(call->residual) + (r * call->outputs + first) * element, tile.outputs);
    }
    return OK;
  });
}

Status expand(const LinearCall& call, const Parallel& parallel, Isa isa) {
  constexpr int64_t OUTPUTS = 8;  // of a task
  const Kernels& kernels = kernels_of(isa);
  const int64_t element = int64_t(element_size(call.dtype));
  return run_tasks(parallel, (call.outputs + OUTPUTS - 1) / OUTPUTS, kernels.block_scratch(call.inputs, 0), [&](int64_t index, float* scratch) {
    const int64_t first = index * OUTPUTS;
    LinearTile tile = {};
    tile.inputs = tile.out_row = call.inputs;
    tile.outputs = smaller(OUTPUTS, call.outputs - first);
    tile.weight = static_cast<const char*>(call.weight) + first * weight_row_bytes(call.kind, call.inputs, element);
    tile.out = static_cast<char*>(call.out) + first * call.inputs * element;
    tile.kind = call.kind;
    tile.scratch = scratch;
    kernels.expand_blocks[call.dtype](tile);
    return OK;
  });
}

void rotate(const RotateCall& call, Isa isa) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t element = int64_t(element_size(call.dtype));
  for (int64_t row = 0; row < call.rows; row++) {
    const char *cos = static_cast<const char*>(call.cos) + row * call.cos_row * element,
               *sin = static_cast<const char*>(call.sin) + row * call.sin_row * element;
    for (int64_t head = 0; head < call.heads; head++)
      kernels.rotate[call.dtype](static_cast<char*>(call.x) + (row * call.heads + head) * call.dim * element, cos, sin,
                                 call.less ? call.less + head * call.dim : nullptr, call.dim);
  }
}

void norm(const NormCall& call, Isa isa) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t bytes = call.size * int64_t(element_size(call.dtype));
  for (int64_t row = 0; row < call.rows; row++)
    kernels.norm[call.dtype](static_cast<const char*>(call.x) + row * bytes, call.weight, call.eps, call.size,
                             static_cast<char*>(call.out) + row * bytes);
}

}  // namespace moacompress
