// Formats of keys and values and where the parts of a block lie, as docs/formats.md defines them: numbers and sizes only. The
// arithmetic is in codes.inl.
#pragma once
#include <stdint.h>

#include "visible.h"

namespace moacompress {

// Codes of the formats in a rule table (moacompress/rules/formats.py).
enum Format : int64_t { NATIVE = 0, INT8 = 1, INT4 = 2, INT6 = 3 };
constexpr int64_t FORMATS = 4;

constexpr int bits_of(int64_t format) { return format == INT8 ? 8 : format == INT6 ? 6 : 4; }  // of a code
constexpr int rows_of(int bits) { return bits == 6 ? 3 : 1; }          // of bytes that a token's codes lie in
constexpr int parts_of(int bits) { return 8 * rows_of(bits) / bits; }  // of a token's codes that share a column of all rows

enum Side : int64_t { KEYS = 0, VALUES = 1 };

// The K or V part of a block: the keys, or the values, of its 16 tokens. Native numbers one token after the other; or the codes, the scales
// of all tokens, and their zero points. Codes lie as processors multiply four bytes at once: of keys four bytes of a token side by
// side, then the same four of the next token; of values a byte of four tokens side by side, then their next byte.
struct KVPart {
  int64_t format, dim, side;
  int64_t token_bytes;  // of a token's numbers, or of its codes, a multiple of 4
  int64_t row_bytes;    // of each of its rows
  int64_t part;         // codes of each of its parts, of the last one fewer
  int64_t scales, zeros, bytes;

  // Where a token's byte `i` of codes is, for an `i` that is a multiple of 4, and how far its next byte and its next four are.
  MOACOMPRESS_INLINE int64_t at(int64_t place, int64_t i) const {
    return side == KEYS ? (i * BLOCK + place * 4) : (place / 4 * 4 * token_bytes + i * 4 + place % 4);
  }
  MOACOMPRESS_INLINE int64_t step() const { return side == KEYS ? 1 : 4; }
};

static MOACOMPRESS_INLINE KVPart kv_part_of(int64_t format, int64_t dim, int64_t element, int64_t side) {
  if (format == NATIVE) return {format, dim, side, dim * element, 0, 0, 0, 0, BLOCK * dim * element};
  const int bits = bits_of(format);
  const int64_t part = (dim + parts_of(bits) - 1) / parts_of(bits), row = (part + 3) / 4 * 4, token = rows_of(bits) * row;
  const int64_t scales = BLOCK * token;
  return {format, dim, side, token, row, format == INT6 ? row : part, scales, scales + 2 * BLOCK, scales + 4 * BLOCK};
}

}  // namespace moacompress
