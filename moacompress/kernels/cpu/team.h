// Threads that stay at hand for a whole step. Forking and joining them for each of its products costs some microseconds every time,
// and a thread that the system has put aside holds up all others: here a thread that does not come in time is not waited for.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moacompress {

// Waits for something that another thread does: for some microseconds at hand, then leaves the processor to others in between.
struct Spin {
  int turns = 0;

  void wait() {
    constexpr int AT_HAND = 4096;
    if (turns >= AT_HAND) return std::this_thread::yield();
    turns++;
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

// One thread leads: it runs bodies, which share out tasks themselves, and whoever of the others is at hand takes part.
class Team {
 public:
  explicit Team(int threads) : threads(threads) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  const int threads;

  // Runs a body on this thread and up to `wanted - 1` others. Returns once none of them is in it.
  void run(int wanted, void (*body)(void*), void* arg) {
    body_ = body;
    arg_ = arg;
    const uint64_t round = (state_.load(std::memory_order_relaxed) & ~PLACES) + ROUND;
    state_.store(round | uint64_t(wanted > 1 ? wanted - 1 : 0) << TO_PLACES, std::memory_order_release);
    body(arg);
    // closes the round: who has not begun yet does not
    uint64_t now = state_.fetch_and(~FREE, std::memory_order_acq_rel);
    for (Spin spin; now & INSIDE; now = state_.load(std::memory_order_acquire)) spin.wait();
  }

  // What the other threads do until the leader is done.
  void help() {
    Spin spin;
    for (uint64_t last = 0;;) {
      uint64_t now = state_.load(std::memory_order_acquire);
      if (now & OVER) return;
      if ((now & FREE) == 0 || (now & ~PLACES) == last) {
        spin.wait();
        continue;
      }
      if (!state_.compare_exchange_weak(now, now - (uint64_t(1) << TO_PLACES) + 1, std::memory_order_acq_rel)) continue;
      last = now & ~PLACES;
      body_(arg_);
      state_.fetch_sub(1, std::memory_order_acq_rel);
      spin = {};
    }
  }

  // Lets the others go. No round is open.
  void end() { state_.fetch_or(OVER, std::memory_order_release); }

  static void run_on(void* team, int threads, void (*body)(void*), void* arg) { static_cast<Team*>(team)->run(threads, body, arg); }

 private:
  // From the lowest bit on: threads that are in the body, places that are still free, whether all is over, the number of the round.
  static constexpr int TO_PLACES = 16;
  static constexpr uint64_t INSIDE = 0xffff, FREE = INSIDE << TO_PLACES, PLACES = INSIDE | FREE, OVER = uint64_t(1) << 32,
                            ROUND = OVER << 1;
  alignas(64) std::atomic<uint64_t> state_{0};
  void (*body_)(void*) = nullptr;
  void* arg_ = nullptr;
};

}  // namespace moacompress
