// Linear layers of a few rows: the outputs are cut into tasks. Every number is summed up alone, so how they are cut shows nowhere.
#include "tasks.h"

namespace moacompress {

namespace {
// Bytes of the weight that a task reads: memory is read best in long runs, and threads end together if the runs are short.
constexpr int64_t LEAST = 1 << 15, MOST = 1 << 18, TASKS_A_THREAD = 4;
}  // namespace

Status linear(const LinearCall& call, const Parallel& parallel, Isa isa) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t element = int64_t(element_size(call.dtype)), row = larger(call.inputs * element, 1);
  const int64_t wanted = call.outputs * row / (larger(parallel.threads, 1) * TASKS_A_THREAD);
  const int64_t outputs = larger(smaller(larger(wanted, LEAST), MOST) / row / 4 * 4, 4);
  const int64_t tasks = (call.outputs + outputs - 1) / outputs;
  return run_tasks(parallel, tasks, 0, [&](int64_t i, float*) {
    const int64_t first = i * outputs;
    LinearTile tile = {};
    tile.rows = call.rows;
    tile.inputs = call.inputs;
    tile.outputs = smaller(outputs, call.outputs - first);
    tile.x = call.x;
    tile.weight = static_cast<const char*>(call.weight) + first * row;
    if (call.bias) tile.bias = static_cast<const char*>(call.bias) + first * element;
    tile.out = static_cast<char*>(call.out) + first * element;
    tile.out_row = call.outputs;
    kernels.linear[call.dtype](tile);
    return OK;
  });
}

}  // namespace moacompress
