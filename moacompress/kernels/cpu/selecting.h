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

// Where the keys, values and scores of a KV head's tokens lie, one of each of a block.
struct TokenPools {
  const Pool *keys, *values, *scores;

  int16_t* scores_of(int64_t id) const { return reinterpret_cast<int16_t*>(at_block(*scores, id, SCORE_BYTES * BLOCK)); }

  // Copies a token from a place in a block to one in another; false where a block is not there.
  bool copy(const KVParts& kv_parts, int64_t from, int64_t place, int64_t to, int64_t at) const {
    const auto both = [&](const Pool& pool, const KVPart& kv_part, char*& source, char*& target) {
      source = at_block(pool, from, kv_part.bytes);
      target = at_block(pool, to, kv_part.bytes);
      return source && target;
    };
    char *key, *new_key, *value, *new_value;
    if (!both(*keys, kv_parts.key, key, new_key) || !both(*values, kv_parts.value, value, new_value)) return false;
    int16_t *score = scores_of(from), *new_score = scores_of(to);
    if (!score || !new_score) return false;
    copy_token(kv_parts.key, key, place, new_key, at);
    copy_token(kv_parts.value, value, place, new_value, at);
    new_score[at] = score[place];
    return true;
  }
};

// The token that leaves the window as the next one comes, and the place where it will be kept; -1 where none leaves, or nowhere.
struct Admission {
  int64_t position, place;
};

struct Selecting {
  Rule rule;
  KVParts kv_parts;
  TokenPools pools;
  const int32_t* ids;  // blocks of sinks and window, `width` of them
  int64_t width;
  const int32_t* selected;  // blocks of selected tokens by their places, likewise
  int64_t selected_width;

  int32_t selected_id(int64_t place) const { return place / BLOCK < selected_width ? selected[place / BLOCK] : -1; }

  // Finds what happens as a token comes to `tokens`, of which `left` have left; false where the cache lacks what it needs for that.
  bool next(int64_t tokens, int64_t left, Admission& found) const {
    found = {-1, -1};
    const int64_t leaving = tokens_left(tokens + 1, rule) - left, position = rule.sink + left;
    if (leaving <= 0) return true;
    const int32_t from = position / BLOCK < width ? ids[position / BLOCK] : -1;
    if (leaving > 1 || position >= tokens || !pools.scores_of(from)) return false;
    const int64_t kept = selected_count(left, rule);
    found = {position, kept};
    if (selected_count(left + 1, rule) > kept) return true;
    int64_t least = -1, lowest = pools.scores_of(from)[position % BLOCK];
    for (int64_t first = 0; first < kept; first += BLOCK) {
      const int16_t* there = pools.scores_of(selected_id(first));
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
    return pools.copy(kv_parts, ids[found.position / BLOCK], found.position % BLOCK, selected_id(found.place), found.place % BLOCK);
  }
};

}  // namespace moacompress
