// Products of some rows with a weight as it lies in memory by the processor's tiles of 16 x 16 cells; included after linear.inl, where
// there are tiles. A cell is a pair of bfloat16. Rows of the weight are rows of a tile, so nothing of it is packed; rows of the input are
// its columns, for which they are laid out once for all tasks.

namespace moacompress {
namespace {

constexpr int64_t SIDE = 2 * CELLS;   // outputs that are worked on at once
constexpr int64_t AHEAD_STREAMS = 4;  // that memory is read ahead in: the processor itself reads on in each, up to the end of a page

// Floats of an input that is laid out; 0 where tiles are not for such sizes: fewer rows are as fast by dot products, which read
// memory no slower, and some inputs are no multiple of a tile's.
inline size_t panel_floats(int64_t rows, int64_t inputs) {
  constexpr int64_t FEWEST = 5;
  return rows >= FEWEST && rows <= LANES && inputs > 0 && inputs % SIDE == 0 ? size_t(inputs / 2 * LANES) : 0;
}

// panel[cell][row] of rows [rows, inputs] of bfloat16, up to a multiple of CELLS rows, of which the last are zero.
void lay_out(const void* x, int64_t rows, int64_t inputs, float* panel) {
  const int64_t cells = inputs / 2;
  for (int64_t r = 0; r < rows; r += CELLS) {
    const int64_t count = smaller(CELLS, rows - r);
    const char* from = static_cast<const char*>(x) + r * inputs * 2;
    for (int64_t k = 0; k < cells; k += CELLS) {
      alignas(64) float some[CELLS * CELLS] = {};
      for (int64_t i = 0; i < count; i++) memcpy(some + i * CELLS, from + (i * cells + k) * 4, CELLS * 4);
      transpose(some, CELLS, panel + k * LANES + r, LANES);
    }
  }
}

// sums[output][row] of `outputs` (16 or 32) rows of a weight; reads ahead what lies behind them, as many outputs again.
inline void tile_sums(const char* weight, int64_t outputs, int64_t inputs, const float* panel, int vectors, float* sums) {
  const size_t side = size_t(inputs) * 2, lanes = LANES * 4;
  const bool two = outputs > CELLS;
  asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
  for (int v = 0; v < vectors; v += 2) {
    const bool wide = v + 1 < vectors;
    const char* ahead = weight + outputs * inputs * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs / 2; k += CELLS) {
      if (v == 0)
        for (int64_t line = 0; line < outputs / AHEAD_STREAMS; line++, ahead += 64)
          for (int64_t stream = 0; stream < AHEAD_STREAMS; stream++) _mm_prefetch(ahead + stream * outputs * inputs * 2 / AHEAD_STREAMS, _MM_HINT_T1);
      _tile_loadd(4, weight + k * 4, side);
      if (two) _tile_loadd(5, weight + CELLS * side + k * 4, side);
      _tile_loadd(6, panel + k * LANES + v * W, lanes);
      if (wide) _tile_loadd(7, panel + k * LANES + (v + 1) * W, lanes);
      _tile_dpbf16ps(0, 4, 6);
      if (wide) _tile_dpbf16ps(1, 4, 7);
      if (two) _tile_dpbf16ps(2, 5, 6);
      if (two && wide) _tile_dpbf16ps(3, 5, 7);
    }
    float *const at = sums + v * W, *const below = at + CELLS * LANES;
    _tile_stored(0, at, lanes);
    if (wide) _tile_stored(1, at + W, lanes);
    if (two) _tile_stored(2, below, lanes);
    if (two && wide) _tile_stored(3, below + W, lanes);
  }
  asm volatile("" ::: "memory");
}

// As linear_tile; the input is laid out too, at t.panel.
void linear_tiles(const LinearTile& t) {
  const int64_t whole = t.outputs / CELLS * CELLS;
  const char* weight = static_cast<const char*>(t.weight);
  const bf16* bias = static_cast<const bf16*>(t.bias);
  if (whole) {
    const TileConfig config;
    alignas(64) float sums[SIDE * LANES], turned[CELLS * CELLS];
    for (int64_t first = 0; first < whole; first += SIDE) {
      const int64_t count = smaller(SIDE, whole - first);
      tile_sums(weight + first * t.inputs * 2, count, t.inputs, t.panel, int((t.rows + CELLS - 1) / CELLS), sums);
      for (int64_t o = 0; o < count; o += CELLS) {
        const V added = bias ? load(bias + first + o) : zero();
        for (int64_t r = 0; r < t.rows; r += CELLS) {
          transpose(sums + o * LANES + r, LANES, turned, CELLS);
          for (int64_t i = 0; i < smaller(CELLS, t.rows - r); i++)
            store(static_cast<bf16*>(t.out) + (r + i) * t.out_row + first + o, load(turned + i * CELLS) + added);
        }
      }
    }
  }
  if (whole == t.outputs) return;
  LinearTile rest = t;
  rest.outputs -= whole;
  rest.weight = weight + whole * t.inputs * 2;
  rest.bias = bias ? bias + whole : nullptr;
  rest.out = static_cast<bf16*>(t.out) + whole;
  linear_tile<bf16>(rest);
}

}  // namespace
}  // namespace moacompress
