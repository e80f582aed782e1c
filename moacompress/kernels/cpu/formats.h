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

// One half of a block: the keys, or the values, of its 16 tokens. Native numbers one token after the other; or the codes, the scales
// of all tokens, and their zero points.
struct Half {
  int64_t format, dim, token_bytes, scales, zeros, bytes;
};

static MOACOMPRESS_INLINE Half half_of(int64_t format, int64_t dim, int64_t element) {
  if (format == NATIVE) return {format, dim, dim * element, 0, 0, BLOCK * dim * element};
  const int64_t token = (dim * bits_of(format) + 7) / 8, scales = BLOCK * token;
  return {format, dim, token, scales, scales + 2 * BLOCK, scales + 4 * BLOCK};
}

}  // namespace moacompress
