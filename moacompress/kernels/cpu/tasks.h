// What the files beside those of the instruction sets share: memory, tasks of which every thread takes the next one that nobody
// has, and the blocks of a pool.
#pragma once
#include <atomic>
#include <cstdlib>

#include "core.h"
#include "trace.h"

namespace moacompress {

// Memory that is not initialised; null if there is none.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, (count * sizeof(T) + 64) / 64 * 64) == 0) at_ = static_cast<T*>(p);
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return at_; }
  T& operator[](size_t i) const { return at_[i]; }

 private:
  T* at_ = nullptr;
};

// Calls `task(index, scratch)` for every index in [0, count), with `floats` of scratch memory per thread; `task` returns a Status,
// and the worst one is returned.
template <class Task> Status run_tasks(const Parallel& parallel, int64_t count, size_t floats, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int> status{OK};
    int64_t count;
    size_t floats;
    const Task* task;
    Phase phase;
  } state;
  const TracedRegion region;
  state.count = count;
  state.floats = floats;
  state.task = &task;
  state.phase = region.phase;
  const auto body = [](void* arg) {
    State& state = *static_cast<State*>(arg);
    const TracedTasks traced(state.phase);
    Buffer<float> scratch(state.floats);
    int status = scratch.get() ? OK : NO_MEMORY;
    for (int64_t i; status == OK && (i = state.next.fetch_add(1)) < state.count;) status = (*state.task)(i, scratch.get());
    for (int seen = state.status.load(); status > seen && !state.status.compare_exchange_weak(seen, status);) {
    }
  };
  const int threads = int(smaller(parallel.threads, count));
  if (threads <= 1) body(&state);
  else parallel.run(parallel.pool, threads, body, &state);
  return Status(state.status.load());
}

const Kernels& kernels_of(Isa isa);

// Returns where the K or V part of a block lies; null if the pool has none of that id and so many bytes.
const char* block_of(const Pool& pool, int64_t id, int64_t bytes);

// Puts a token into its place of the K or V part of a block; see `Kernels::encode` for the buffer.
void put_token(const Kernels& kernels, DType dtype, const KVPart& kv_part, const void* from, int64_t place, char* to, float* buffer);

// Returns the bytes of the K or V part of a block, -1 where the pool has none of that id.
int64_t part_bytes_of(const Pool& pool, int64_t id);

}  // namespace moacompress
