// Where the time of a step goes. The thread that makes a step says where one phase ends and the next begins, so every moment of
// it counts for one phase; what threads do in the tasks of a phase is counted beside. Off, it costs a look at a flag.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace moacompress {

// In the order of `PHASES` in moacompress/kernels/cpu/step_trace.py. REST is what a step checks and takes memory for; LINEAR is of
// products outside decoder layers, the head's mostly; OUTSIDE is no phase, and is not counted.
enum Phase : int { NORMS, PROJECTIONS, ROTARY, GATES, APPEND, ATTENTION, OUTPUT, MLP, LINEAR, REST, OUTSIDE };
constexpr int PHASES = OUTSIDE;

// Nanoseconds of each phase: on the thread that makes the step, and in which any thread has worked.
struct TraceSums {
  std::atomic<bool> on{false};
  std::atomic<int64_t> wall[PHASES]{}, busy[PHASES]{};
};
inline TraceSums trace_sums;

// The phase that a thread is in, since when, and how long of that it has been sharing out tasks.
struct Lap {
  Phase phase = OUTSIDE;
  int64_t since = 0, in_tasks = 0;
};
inline thread_local Lap lap;

inline bool tracing() { return trace_sums.on.load(std::memory_order_relaxed); }

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Begins a phase of this thread, and ends the one before.
inline void enter(Phase phase) {
  if (!tracing()) return;
  const int64_t now = nanoseconds();
  if (lap.phase != OUTSIDE) {
    trace_sums.wall[lap.phase] += now - lap.since;
    trace_sums.busy[lap.phase] += now - lap.since - lap.in_tasks;
  }
  lap = {phase, now, 0};
}

// A step, from one phase to the end of whatever is the last.
struct TracedStep {
  explicit TracedStep(Phase first) { enter(first); }
  ~TracedStep() {
    enter(OUTSIDE);
    lap.phase = OUTSIDE;  // also where tracing ended meanwhile
  }
  TracedStep(const TracedStep&) = delete;
  TracedStep& operator=(const TracedStep&) = delete;
};

// The work of one thread in the tasks of a phase.
struct TracedTasks {
  const Phase phase;
  const int64_t begin;
  explicit TracedTasks(Phase phase) : phase(phase), begin(phase == OUTSIDE ? 0 : nanoseconds()) {}
  ~TracedTasks() {
    if (phase != OUTSIDE) trace_sums.busy[phase] += nanoseconds() - begin;
  }
  TracedTasks(const TracedTasks&) = delete;
  TracedTasks& operator=(const TracedTasks&) = delete;
};

// The time in which this thread shares out tasks: what it does of them itself is counted with the others'.
struct TracedRegion {
  const Phase phase = tracing() ? lap.phase : OUTSIDE;
  const int64_t begin = phase == OUTSIDE ? 0 : nanoseconds();
  ~TracedRegion() {
    if (phase != OUTSIDE) lap.in_tasks += nanoseconds() - begin;
  }
};

}  // namespace moacompress
