// Formats of keys and values and where the parts of a block lie, as docs/formats.md defines them: numbers and sizes only. The
// arithmetic is in codes.inl.
#pragma once
#include <stdint.h>

#include "visible.h"

namespace moacompress {

// Codes of the formats in a rule table (moacompress/rules/formats.py).
enum Format : int64_t { NATIVE = 0, INT8 = 1, INT4 = 2 };
constexpr int64_t FORMATS = 3;

static MOACOMPRESS_INLINE int64_t bits_of(int64_t format) { return format == INT8 ? 8 : 4; }  // of a code

enum Side : int64_t { KEYS = 0, VALUES = 1 };

// The K or V part of a block: the keys, or the values, of its 16 tokens. Native numbers one token after the other; or the codes, the scales
// of all tokens, and their zero points. Codes lie as processors multiply four bytes at once: of keys four bytes of a token side by
// side, then the same four of the next token; of values a byte of four tokens side by side, then their next byte.
struct KVPart {
  int64_t format, dim, side;
  int64_t token_bytes;  // of a token's numbers, or of its codes, a multiple of 4
  int64_t low;          // codes in the low nibbles of int4: so many come first
  int64_t scales, zeros, bytes;

  // Where a token's byte `i` of codes is, for an `i` that is a multiple of 4, and how far its next byte and its next four are.
  MOACOMPRESS_INLINE int64_t at(int64_t place, int64_t i) const {
    return side == KEYS ? (i * BLOCK + place * 4) : (place / 4 * 4 * token_bytes + i * 4 + place % 4);
  }
  MOACOMPRESS_INLINE int64_t step() const { return side == KEYS ? 1 : 4; }
};

static MOACOMPRESS_INLINE KVPart kv_part_of(int64_t format, int64_t dim, int64_t element, int64_t side) {
  if (format == NATIVE) return {format, dim, side, dim * element, 0, 0, 0, BLOCK * dim * element};
  const int64_t used = (dim * bits_of(format) + 7) / 8, token = (used + 3) / 4 * 4, scales = BLOCK * token;
  return {format, dim, side, token, used, scales, scales + 2 * BLOCK, scales + 4 * BLOCK};
}

}  // namespace moacompress
