// Products of many rows of bfloat16 with weights in blocks by the processor's products of tiles (amx.inl): some inputs of 32 outputs at
// a time are expanded to bfloat16, into the nearest cache, and multiplied with all rows. Included by blocks.inl.

namespace moacompress {
namespace {

constexpr int64_t TILE_ROWS = 256;       // rows of the input that meet what was expanded
constexpr int64_t TILE_OUTPUTS = 512;    // outputs whose sums are kept beside them
constexpr int64_t TILE_INPUTS = 512;     // that are expanded at a time; a multiple of all blocks
constexpr int64_t TILE_NUMBERS = CELLS * CELLS;

inline int64_t whole_tiles(int64_t rows) { return (rows + CELLS - 1) / CELLS; }

// Where a task has the rows of the input, [strip, 16 rows] of [pair, row]; what is expanded, [strip, output]; and sums, [16 outputs,
// 16 rows] of [output, row].
struct TileScratch {
  int64_t groups, floats;  // groups of 16 rows
  float *x, *weight, *sums;

  TileScratch(float* at, int64_t inputs, int64_t rows) : groups(whole_tiles(smaller(rows, TILE_ROWS))), floats(0) {
    const int64_t sizes[] = {inputs / STRIP * groups * TILE_NUMBERS, 2 * CELLS * TILE_INPUTS / 2, TILE_OUTPUTS * groups * CELLS};
    float** const places[] = {&x, &weight, &sums};
    for (int i = 0; i < 3; i++) {
      *places[i] = at + floats;
      floats += sizes[i];
    }
  }
};

// Puts rows side by side in cells of two numbers; those beyond `rows` are zero.
inline void put_rows(const bf16* x, int64_t rows, int64_t inputs, const TileScratch& s) {
  for (int64_t group = 0; group < s.groups; group++)
    for (int64_t strip = 0; strip < inputs / STRIP; strip++) {
      float* const to = s.x + (strip * s.groups + group) * TILE_NUMBERS;
      const bf16* const from = x + group * CELLS * inputs + strip * STRIP;
      const int64_t count = smaller(rows - group * CELLS, CELLS);
      if (count == CELLS) {
        transpose((const float*)from, inputs / 2, to, CELLS);
        continue;
      }
      float some[TILE_NUMBERS] = {};
      for (int64_t r = 0; r < count; r++) memcpy(some + r * CELLS, from + r * inputs, 64);
      transpose(some, CELLS, to, CELLS);
    }
}

// sums[16 outputs, 16 rows] of two tiles of outputs and one or two of rows, from the first strip on or in addition.
inline void strip_sums(const float* weight, const float* x, int64_t strips, int64_t groups, bool two, bool first, float* upper, float* lower) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, upper, 64);
    _tile_loadd(2, lower, 64);
    if (two) _tile_loadd(1, upper + TILE_NUMBERS, 64);
    if (two) _tile_loadd(3, lower + TILE_NUMBERS, 64);
  }
  for (int64_t strip = 0; strip < strips; strip++, weight += 2 * TILE_NUMBERS, x += groups * TILE_NUMBERS) {
    _tile_loadd(4, weight, 64);
    _tile_loadd(5, weight + TILE_NUMBERS, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (!two) continue;
    _tile_loadd(7, x + TILE_NUMBERS, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, upper, 64);
  _tile_stored(2, lower, 64);
  if (two) _tile_stored(1, upper + TILE_NUMBERS, 64);
  if (two) _tile_stored(3, lower + TILE_NUMBERS, 64);
}

// Writes the sums of 16 outputs and of some rows, with what is added to each output.
inline void write_tile(const float* sums, const bf16* bias, int64_t rows, int64_t outputs, bf16* out, int64_t out_row) {
  float turned[TILE_NUMBERS];
  transpose(sums, CELLS, turned, CELLS);
  const V added = bias ? load_part(bias, int(outputs)) : zero();
  for (int64_t r = 0; r < rows; r++) store_part(out + r * out_row, load(turned + r * CELLS) + added, int(outputs));
}

template <class T, int KIND> void block_tiles(const LinearTile& t) {
  const TileScratch s(t.scratch + BlockScratch(nullptr, t.inputs).floats, t.inputs, t.rows);
  const BlockScratch scales(t.scratch, t.inputs);
  const int64_t bytes = weight_row_bytes(t.kind, t.inputs, 0);
  const TileConfig config;
  for (int64_t row = 0; row < t.rows; row += TILE_ROWS) {
    const int64_t rows = smaller(t.rows - row, TILE_ROWS), groups = whole_tiles(rows);
    TileScratch here = s;
    here.groups = groups;
    put_rows(static_cast<const bf16*>(t.x) + row * t.inputs, rows, t.inputs, here);
    for (int64_t first = 0; first < t.outputs; first += TILE_OUTPUTS) {
      const int64_t outputs = smaller(t.outputs - first, TILE_OUTPUTS);
      for (int64_t input = 0; input < t.inputs; input += TILE_INPUTS) {
        const int64_t inputs = smaller(t.inputs - input, TILE_INPUTS);
        for (int64_t o = 0; o < outputs; o += 2 * CELLS) {
          for (int64_t i = 0; i < 2 * CELLS; i++) {  // the last one as often as it takes
            const int64_t output = first + smaller(o + i, outputs - 1);
            const uint8_t* from = static_cast<const uint8_t*>(t.weight) + output * bytes + weight_row_bytes(t.kind, input, 0);
            for (int64_t line = 0; line < weight_row_bytes(t.kind, inputs, 0); line += 64) prefetch(from + 2 * CELLS * bytes + line);
            bf16* const to = (bf16*)s.weight + i * STRIP;
            expand_row<KIND>(from, inputs, scales, [&](int64_t strip, V a, V b) { store_two(to + strip * 2 * CELLS * STRIP, a, b); });
          }
          asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
          for (int64_t group = 0; group < groups; group += 2) {
            float* const upper = s.sums + (o / CELLS * groups + group) * TILE_NUMBERS;
            strip_sums(s.weight, here.x + (input / STRIP * groups + group) * TILE_NUMBERS, inputs / STRIP, groups, group + 1 < groups,
                      input == 0, upper, upper + groups * TILE_NUMBERS);
          }
          asm volatile("" ::: "memory");
        }
      }
      for (int64_t o = 0; o < outputs; o += CELLS)
        for (int64_t group = 0; group < groups; group++)
          write_tile(s.sums + (o / CELLS * groups + group) * TILE_NUMBERS, t.bias ? static_cast<const bf16*>(t.bias) + first + o : nullptr,
                     smaller(rows - group * CELLS, CELLS), smaller(outputs - o, CELLS),
                     static_cast<bf16*>(t.out) + (row + group * CELLS) * t.out_row + first + o, t.out_row);
    }
  }
}

}  // namespace
}  // namespace moacompress
