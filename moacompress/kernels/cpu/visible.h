// Which keys a query sees and in which cache blocks they lie, as moacompress/rules/windows.py defines it (`visible_intervals`,
// `block_runs`): integers only, tests hold the two equal.
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

// One column of a rule table (moacompress/rules/rule_table.py), in the order of its numbers.
struct Rule {
  int64_t sink, alpha, beta_q, min_window, native_window;  // native_window: 0 = none
  int64_t key_format, value_format;                        // see formats.h
  int64_t select_alpha = 0, select_beta_q = 0;             // how many tokens a gate keeps
  MOACOMPRESS_INLINE bool selects() const { return native_window == 0 && (select_alpha > 0 || select_beta_q > 0); }
  MOACOMPRESS_INLINE bool native() const { return key_format == 0 && value_format == 0; }
};

// Rules as columns of numbers, [RULE_NUMBERS, count], contiguous. What gates keep lies in blocks of its own: a step takes it in and
// attends to it, and a prefill is told which tokens they are.
struct RuleTable {
  const int64_t* columns;
  int64_t count;
  MOACOMPRESS_INLINE int64_t at(int64_t number, int64_t i) const { return columns[number * count + i]; }
  MOACOMPRESS_INLINE Rule of(int64_t i) const {
    return {at(0, i), at(1, i), at(2, i), at(3, i), at(4, i), at(5, i), at(6, i), at(7, i), at(8, i)};
  }
};
constexpr int64_t RULE_NUMBERS = 9;
static MOACOMPRESS_INLINE bool any_selects(const RuleTable& rules) {
  for (int64_t i = 0; i < rules.count; i++)
    if (rules.of(i).selects()) return true;
  return false;
}

static MOACOMPRESS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static MOACOMPRESS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static MOACOMPRESS_INLINE Visible visible(int64_t n, const Rule& rule) {
  const int64_t window = smaller(n, larger(rule.min_window, rule.alpha + ((rule.beta_q * n) >> 10)));
  const int64_t first = rule.native_window ? larger(n - rule.native_window, 0) : 0;
  const int64_t start = larger(n - window, first);
  return {first, smaller(larger(rule.sink, first), start), start};
}

// How many tokens have left the window, sinks not counted, when query n - 1 attends; none of a window of the layer's own.
static MOACOMPRESS_INLINE int64_t tokens_left(int64_t n, const Rule& rule) {
  if (rule.native_window) return 0;
  const Visible see = visible(n, rule);
  return see.start - see.sink_end;
}
// How many of so many tokens that have left the window a gate keeps.
static MOACOMPRESS_INLINE int64_t selected_count(int64_t left, const Rule& rule) {
  return smaller(left, rule.select_alpha + ((rule.select_beta_q * left) >> 10));
}

// Numbers [begin, end).
struct Interval {
  int64_t begin, end;
  MOACOMPRESS_INLINE int64_t count() const { return larger(end - begin, 0); }
};

// What a KV head holds is a list of runs of blocks: the sinks', then the window's.
constexpr int64_t RUNS = 2;

// The blocks that query n - 1 reads; one that sinks and window both touch belongs to the window's run.
static MOACOMPRESS_INLINE void block_runs(int64_t n, const Rule& rule, Interval (&runs)[RUNS]) {
  const Visible see = visible(n, rule);
  const int64_t a = see.first / BLOCK, c = see.start / BLOCK, b = smaller((see.sink_end + BLOCK - 1) / BLOCK, c);
  runs[0] = {a, see.sink_end > see.first ? larger(a, b) : a};
  runs[1] = {c, (n + BLOCK - 1) / BLOCK};
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
