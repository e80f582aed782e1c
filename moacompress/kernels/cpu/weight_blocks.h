// Weights in blocks of integer codes with scales, as GGML lays them out; moacompress/kernels/weight_blocks.py says what they stand for.
#pragma once
#include <stdint.h>

#include "formats.h"

namespace moacompress {

enum WeightKind : int { PLAIN = 0, Q8_0, Q5_0, Q4_1, Q4_0, Q4_K, Q6_K, Q5_K, WEIGHT_KINDS };  // PLAIN: numbers of the input's dtype

constexpr int64_t STRIP = 32;  // numbers that are worked on at once: a block, or an eighth of one

struct BlockSize {
  int64_t numbers, bytes;
};

static MOACOMPRESS_INLINE BlockSize block_size(WeightKind kind) {
  switch (kind) {
    case Q8_0: return {32, 34};
    case Q5_0: return {32, 22};
    case Q4_1: return {32, 20};
    case Q4_0: return {32, 18};
    case Q4_K: return {256, 144};
    case Q6_K: return {256, 210};
    case Q5_K: return {256, 176};
    default: return {1, 0};
  }
}

// Bytes of an output's weights, of which `element` says the size where they are plain.
static MOACOMPRESS_INLINE int64_t weight_row_bytes(WeightKind kind, int64_t inputs, int64_t element) {
  const BlockSize size = block_size(kind);
  return kind == PLAIN ? inputs * element : inputs / size.numbers * size.bytes;
}

}  // namespace moacompress
