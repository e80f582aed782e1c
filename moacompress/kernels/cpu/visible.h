// Which keys a query sees, as moacompress/plan.py defines it (`segments`, `block_runs`): integers only, tests hold the two equal.
#pragma once
#include <stdint.h>

// The files of the instruction sets include this: a copy that is not inlined would be shared with processors that lack the set.
#define MOACOMPRESS_INLINE inline __attribute__((always_inline))

namespace moacompress {

constexpr int64_t BLOCK = 16;  // tokens in a cache block

// Query n - 1 sees the keys [first, sink_end) and [start, n); first <= sink_end <= start.
struct Visible {
  int64_t first, sink_end, start;
};

struct Rule {
  int64_t sink, alpha, beta_q, min_window, native_window;  // native_window: 0 = none
};

static MOACOMPRESS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static MOACOMPRESS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static MOACOMPRESS_INLINE Visible visible(int64_t n, const Rule& rule) {
  const int64_t window = smaller(n, larger(rule.min_window, rule.alpha + ((rule.beta_q * n) >> 10)));
  const int64_t first = rule.native_window ? larger(n - rule.native_window, 0) : 0;
  const int64_t start = larger(n - window, first);
  return {first, smaller(larger(rule.sink, first), start), start};
}

// What a run of queries sees together: keys [first, first + head) and [start, end). All bounds grow with n, so the union over the
// queries low..high (as numbers of tokens) begins with what the first one sees. Sinks from `start` on belong to the second part.
//
// A column is an index into that union; `column` maps a position to the first column that holds it or a later one.
struct Columns {
  int64_t first, head, start, end;
  MOACOMPRESS_INLINE int64_t count() const { return head + end - start; }
  MOACOMPRESS_INLINE int64_t position(int64_t column) const { return column < head ? first + column : start + column - head; }
  MOACOMPRESS_INLINE int64_t column(int64_t position) const {
    return position < first + head ? larger(position - first, 0) : head + larger(position - start, 0);
  }
};

static MOACOMPRESS_INLINE Columns columns_of(int64_t low, int64_t high, const Rule& rule) {
  const Visible see = visible(low, rule);
  return {see.first, larger(smaller(rule.sink, see.start) - see.first, 0), see.start, high};
}

}  // namespace moacompress
