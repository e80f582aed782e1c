// Who stays and who goes as tokens leave a window: a heap of those that are kept, the one to go next at its top.
#include <algorithm>

#include "tasks.h"

namespace moacompress {
namespace {

struct Kept {
  int64_t score, place, token;
};
// Whether a goes later than b; of equals the one in the first place goes first.
bool goes_later(const Kept& a, const Kept& b) { return a.score != b.score ? a.score > b.score : a.place > b.place; }

}  // namespace

Status turnover(const TurnoverCall& call) {
  const Buffer<Kept> heap(size_t(call.before + call.leaving));
  if (!heap.get()) return NO_MEMORY;
  Kept* first = heap.get();
  int64_t count = call.before;
  for (int64_t i = 0; i < count; i++) {
    first[i] = {call.kept[i], i, i};
    call.gone[i] = NEVER;
    call.places[i] = i;
  }
  std::make_heap(first, first + count, goes_later);
  for (int64_t i = 0; i < call.leaving; i++) {
    const int64_t now = call.left + i + 1, token = call.before + i;
    call.gone[token] = NEVER;
    if (count < selected(now, call.rule)) {
      call.places[token] = count;
      first[count] = {call.scores[i], count, token};
      std::push_heap(first, first + ++count, goes_later);
    } else if (count && call.scores[i] > first->score) {
      std::pop_heap(first, first + count, goes_later);
      Kept& last = first[count - 1];
      call.gone[last.token] = now;
      call.places[token] = last.place;
      last = {call.scores[i], last.place, token};
      std::push_heap(first, first + count, goes_later);
    } else {
      call.places[token] = -1;
      call.gone[token] = now;
    }
  }
  return OK;
}

}  // namespace moacompress
