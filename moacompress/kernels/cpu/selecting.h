// One (row, KV head) whose gate selects, as one token after the other leaves its window: who is admitted, and where it is kept.
#pragma once
#include <cstring>
#include <initializer_list>

#include "tasks.h"

namespace moacompress {

// Copies a token from its place in the K or V part of a block to a place in another, as it is kept.
inline void copy_token(const KVPart& kv_part, const char* from, int64_t place, char* to, int64_t at) {
  if (kv_part.format == NATIVE) {
    std::memcpy(to + at * kv_part.token_bytes, from + place * kv_part.token_bytes, size_t(kv_part.token_bytes));
    return;
  }
  for (int64_t i = 0; i < kv_part.token_bytes; i += 4)
    for (int64_t byte = 0; byte < 4; byte++) to[kv_part.at(at, i) + byte * kv_part.step()] = from[kv_part.at(place, i) + byte * kv_part.step()];
  for (const int64_t numbers : {kv_part.scales, kv_part.zeros}) std::memcpy(to + numbers + 2 * at, from + numbers + 2 * place, 2);
}

inline char* at_block(const Pool& pool, int64_t id, int64_t bytes) { return const_cast<char*>(block_of(pool, id, bytes)); }

// The token that leaves the window as the next one comes, and the place where it will be kept; -1 where none leaves, or nowhere.
struct Admission {
  int64_t position, place;
};

struct Selecting {
  Rule rule;
  KVParts kv_parts;
  const Pool *keys, *values, *scores;
  const int32_t* ids;  // blocks of sinks and window, `width` of them
  int64_t width;
  const int32_t* selected;  // blocks of selected tokens by their places, likewise
  int64_t selected_width;

  int16_t* scores_of(int32_t id) const { return reinterpret_cast<int16_t*>(at_block(*scores, id, SCORE_BYTES * BLOCK)); }
  int32_t selected_id(int64_t place) const { return place / BLOCK < selected_width ? selected[place / BLOCK] : -1; }

  // Finds what happens as a token comes to `tokens`, of which `left` have left; false where the cache lacks what it needs for that.
  bool next(int64_t tokens, int64_t left, Admission& found) const {
    found = {-1, -1};
    const int64_t leaving = tokens_left(tokens + 1, rule) - left, position = rule.sink + left;
    if (leaving <= 0) return true;
    const int32_t from = position / BLOCK < width ? ids[position / BLOCK] : -1;
    if (leaving > 1 || position >= tokens || !scores_of(from)) return false;
    const int64_t kept = selected_count(left, rule);
    found = {position, kept};
    if (selected_count(left + 1, rule) > kept) return true;
    int64_t least = -1, lowest = scores_of(from)[position % BLOCK];
    for (int64_t first = 0; first < kept; first += BLOCK) {
      const int16_t* there = scores_of(selected_id(first));
      if (!there) return false;
      for (int64_t i = 0; i < smaller(kept - first, BLOCK); i++)
        if (there[i] < lowest) lowest = there[i], least = first + i;
    }
    found.place = least;
    return true;
  }

  // Copies the token to its place; false where the cache has no such block.
  bool keep(const Admission& found) const {
    if (found.place < 0) return true;
    const int32_t from = ids[found.position / BLOCK], to = selected_id(found.place);
    const int64_t place = found.position % BLOCK, at = found.place % BLOCK;
    if (!at_block(*keys, to, kv_parts.key.bytes) || !at_block(*values, to, kv_parts.value.bytes) || !scores_of(to)) return false;
    const auto copy = [&](const Pool& pool, const KVPart& kv_part) {
      copy_token(kv_part, at_block(pool, from, kv_part.bytes), place, at_block(pool, to, kv_part.bytes), at);
    };
    copy(*keys, kv_parts.key);
    copy(*values, kv_parts.value);
    scores_of(to)[at] = scores_of(from)[place];
    return true;
  }
};

}  // namespace moacompress
