// Which tokens are admitted and evicted as tokens leave a window: a heap of the selected ones, the next to be evicted at its top.
#include <algorithm>

#include "selecting.h"

namespace moacompress {
namespace {

struct Competitor {
  int64_t score, place, token;
};
// Whether a is evicted after b; of equals the one in the first place goes first.
bool evicted_later(const Competitor& a, const Competitor& b) { return a.score != b.score ? a.score > b.score : a.place > b.place; }

}  // namespace

Status eviction_schedule(const EvictionSchedule& tokens, int64_t pairs, const RuleTable& rules, const int64_t* scores) {
  int64_t most = 0;
  for (int64_t pair = 0; pair < pairs; pair++) most = larger(most, tokens.begins[pair + 1] - tokens.begins[pair]);
  const Buffer<Competitor> heap(static_cast<size_t>(most));
  if (!heap.get()) return NO_MEMORY;
  Competitor* const first = heap.get();
  for (int64_t pair = 0; pair < pairs; pair++) {
    const Rule rule = rules.of(pair % rules.count);
    int64_t count = 0;
    for (int64_t token = tokens.begins[pair]; token < tokens.begins[pair + 1]; token++) {
      const int64_t now = tokens.admitted[token];
      tokens.evicted[token] = NEVER;
      if (tokens.positions[token] < 0 || count < selected_count(now, rule)) {
        tokens.places[token] = count;
        first[count] = {scores[token], count, token};
        std::push_heap(first, first + ++count, evicted_later);
      } else if (count && scores[token] > first->score) {
        std::pop_heap(first, first + count, evicted_later);
        Competitor& last = first[count - 1];
        tokens.evicted[last.token] = now;
        tokens.places[token] = last.place;
        last = {scores[token], last.place, token};
        std::push_heap(first, first + count, evicted_later);
      } else {
        tokens.places[token] = -1;
        tokens.evicted[token] = now;
      }
    }
  }
  return OK;
}

Status select_next(const SelectNextCall& call) {
  for (int64_t pair = 0; pair < call.shape.rows * call.shape.kv_heads; pair++) {
    const Rule rule = call.rules.of(pair % call.shape.kv_heads);
    if (!rule.selects()) continue;
    const int64_t tokens = call.lengths[pair / call.shape.kv_heads];
    const Selecting selecting = {rule, kv_parts_of(rule, call.shape), {&call.keys, &call.values, &call.scores},
                                 call.table.ids + pair * call.table.width, call.table.width,
                                 call.selected.ids + pair * call.selected.width, call.selected.width};
    Admission found;
    if (!selecting.next(tokens, tokens_left(tokens, rule), found) || !selecting.keep(found)) return MISSING_BLOCK;
  }
  return OK;
}

Status move_selected(const MoveSelectedCall& call) {
  const TokenPools pools = {&call.keys, &call.values, &call.scores};
  for (int64_t i = 0; i < call.count; i++) {
    const int64_t from = call.slots[i], to = call.to[i];
    if (!pools.copy(call.kv_parts[call.heads[i]], from / BLOCK, from % BLOCK, to / BLOCK, to % BLOCK)) return MISSING_BLOCK;
  }
  return OK;
}

}  // namespace moacompress
