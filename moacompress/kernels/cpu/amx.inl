// Prefill of bfloat16 models by the processor's products of tiles of 16 x 16 cells; included by kernels.inl. A cell is a pair of
// bfloat16, or four bytes.
//
// Codes are not expanded to what they stand for. Scores are of their bytes and of queries in whole numbers of 16 bits, as in decode;
// weights are rounded to bfloat16 with their token's scale in them, in which a code of 8 bits is exact. Zero points are added to the
// sums, of the very numbers that were multiplied: codes are never negative, and an error would not cancel against them.

namespace moacompress {
namespace {

constexpr int64_t CELLS = 16;        // of a row of a tile
constexpr int64_t PAIRS = TILE / 2;  // of the keys of a step
inline int64_t whole_cells(int64_t cells) { return (cells + CELLS - 1) / CELLS * CELLS; }

// All eight tiles have 16 rows of 64 bytes while one of these is there.
struct TileConfig {
  TileConfig() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    asm volatile("" ::"r"(config) : "memory");  // some compilers take it for eight bytes
    _tile_loadconfig(config);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

// One product of tiles, by numbers that the instructions have in them.
#define MOACOMPRESS_TILE_STEP(to, a, b)   \
  do {                                    \
    if (BYTES) _tile_dpbusd(to, a, b);    \
    else _tile_dpbf16ps(to, a, b);        \
  } while (0)

// to[r][lane] = sum over cells k of a[r][k] * panel[k][lane], or that much more; of bytes those of `a` have no sign. Whole tiles of
// rows are read and written, and `cells` is a multiple of CELLS.
template <bool BYTES, bool MORE>
inline void tile_product(const float* a, int64_t row, int64_t rows, int64_t cells, const float* panel, int vectors, float* to) {
  const size_t side = size_t(row) * 4, lanes = LANES * 4;
  asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
  for (int64_t r = 0; r < rows; r += 2 * CELLS) {
    const bool two = r + CELLS < rows;
    for (int v = 0; v < vectors; v += 2) {
      const bool wide = v + 1 < vectors;
      float *const at = to + r * LANES + v * W, *const below = at + CELLS * LANES;
      if (MORE) {
        _tile_loadd(0, at, lanes);
        if (wide) _tile_loadd(1, at + W, lanes);
        if (two) _tile_loadd(2, below, lanes);
        if (two && wide) _tile_loadd(3, below + W, lanes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < cells; k += CELLS) {
        _tile_loadd(4, a + r * row + k, side);
        if (two) _tile_loadd(5, a + (r + CELLS) * row + k, side);
        _tile_loadd(6, panel + k * LANES + v * W, lanes);
        if (wide) _tile_loadd(7, panel + k * LANES + (v + 1) * W, lanes);
        MOACOMPRESS_TILE_STEP(0, 4, 6);
        if (wide) MOACOMPRESS_TILE_STEP(1, 4, 7);
        if (two) MOACOMPRESS_TILE_STEP(2, 5, 6);
        if (two && wide) MOACOMPRESS_TILE_STEP(3, 5, 7);
      }
      _tile_stored(0, at, lanes);
      if (wide) _tile_stored(1, at + W, lanes);
      if (two) _tile_stored(2, below, lanes);
      if (two && wide) _tile_stored(3, below + W, lanes);
    }
  }
  asm volatile("" ::: "memory");
}

// Transposes 16 x 16 numbers.
inline void transpose(const float* from, int64_t row, float* to, int64_t column) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * row);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto pairs = [](__m512 x, __m512 y, bool high) {
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
  };
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = pairs(b[i + j], b[i + 2 + j], false);
      a[i + 2 * j + 1] = pairs(b[i + j], b[i + 2 + j], true);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0x88);
      b[i + 4 + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
    a[8 + j] = _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * column, a[i]);
}

struct AmxTile {
  typedef bf16 Row;
  const PrefillTile& t;
  const KVPart &key, &value;
  float *units, *sums, *zeros;  // of each lane: what 1 of its query's whole numbers stands for; their sum; what zero points add up to
  float *lower, *key_rows = nullptr, *columns = nullptr;
  int64_t lanes, width;  // lanes of all panels; cells of a key
  const int* places = nullptr;
  float key_scale[TILE], key_zero[TILE], factors[TILE], offsets[TILE];
  const TileConfig config;

  AmxTile(const PrefillTile& t, int64_t lanes, float* extra, float* more)
      : t(t), key(t.source.key), value(t.source.value), units(extra), sums(extra + lanes), zeros(extra + 2 * lanes), lower(more),
        lanes(lanes), width(cells_of(t)) {
    memset(extra, 0, size_t(3 * lanes) * sizeof(float));
  }
  // Whether it is for such sizes.
  static inline bool fits(const PrefillTile& t) { return t.head_dim >= 16 && t.head_dim % 2 == 0 && t.value_dim % CELLS == 0; }
  static inline int64_t cells_of(const PrefillTile& t) {
    return whole_cells(t.source.key.format == NATIVE ? t.head_dim / 2 : (t.head_dim + 3) / 4);
  }
  static inline int64_t depth(const PrefillTile& t) { return cells_of(t) * (t.source.key.format == NATIVE ? 1 : 2); }
  static inline float scale_of(const void* from, int place, const KVPart& kv_part) { return number((const f16*)((const char*)from + kv_part.scales) + place); }
  static inline float zero_of(const void* from, int place, const KVPart& kv_part) { return number((const f16*)((const char*)from + kv_part.zeros) + place); }

  // Of a query that has codes to meet: upper and then lower bytes.
  inline void lane(const bf16* row, const KVPart&, int64_t lane, float* buffer, float* panels) {
    float* to = panels + lane / LANES * depth(t) * LANES + lane % LANES;
    if (key.format == NATIVE) {
      for (int64_t d = 0; d < key.dim / 2; d++) memcpy(to + d * LANES, row + 2 * d, 4);
      return;
    }
    widen_row(row, key.dim, buffer);
    hadamard(buffer, key.dim);
    for (int64_t i = key.dim; i % W; i++) buffer[i] = 0.f;
    V tops = zero(), plain = zero(), wholes = zero();  // the second is not finite where some number is not
    for (int64_t i = 0; i < key.dim; i += W) {
      const V x = load(buffer + i);
      tops = max(max(x, zero() - x), tops);
      plain = fma(x, zero(), plain);
    }
    const float top = largest(tops), all = sum(plain);
    units[lane] = ByteCodes::unit(top, all);
    const V inverse = ByteCodes::inverse(all == 0 ? top : 0.f);
    for (int64_t i = 0; i < key.dim; i += W) {
      int8_t high[W], low[W];
      wholes = wholes + store_halves((all == 0 ? load(buffer + i) : zero()) * inverse, high, low);
      for (int64_t k = 0; k < W && i + k < key.dim; k += 4) {
        memcpy(to + (i + k) / 4 * LANES, high + k, 4);
        memcpy(to + (width + (i + k) / 4) * LANES, low + k, 4);
      }
    }
    sums[lane] = sum(wholes) * units[lane];
  }

  // Whether the next keys are those of a block, in its order.
  static inline bool is_block(const void* const* from, const int* at) {
    for (int i = 0; i < int(BLOCK); i++)
      if (from[i] != from[0] || at[i] != i) return false;
    return true;
  }
  // Puts the codes of all keys of a block side by side: their bytes lie as the cells of a tile that is turned.
  inline void block_keys(const void* from, float* to) const {
    const int64_t quads = key.token_bytes / 4;
    for (int64_t quad = 0; quad < quads; quad += CELLS) {
      const float* cells = (const float*)from + quad * BLOCK;
      if (quad + CELLS <= quads) {
        transpose(cells, BLOCK, to + quad, width);
        continue;
      }
      float some[CELLS * CELLS] = {};
      memcpy(some, cells, size_t((quads - quad) * BLOCK) * sizeof(float));
      transpose(some, BLOCK, to + quad, width);
    }
  }
  inline void keys(const void* const* from, const int* at, int64_t count, const KVPart&, float* store, const char**) {
    key_rows = store;
    int64_t done = 0;  // keys that lie side by side
    for (int64_t i = 0; i < count; i++) {
      float* const row = store + i * width;
      if (key.format == NATIVE) {
        memcpy(row, from[i], size_t(key.dim) * 2);
        memset((char*)row + key.dim * 2, 0, size_t(width * 4 - key.dim * 2));
        continue;
      }
      const char* codes = (const char*)from[i];
      uint8_t* const to = (uint8_t*)row;
      if (i >= done && i + BLOCK <= count && is_block(from + i, at + i)) {
        block_keys(codes, row);
        done = i + BLOCK;
      }
      for (int64_t b = 0; i >= done && b < key.token_bytes; b += 4) memcpy(to + b, codes + key.at(at[i], b), 4);
      for (int64_t b = 0; key.format == INT6 && b < key.row_bytes; b += 64) {
        const __mmask64 some = ~uint64_t(0) >> (64 - smaller(key.row_bytes - b, 64));
        __m512i x[3];
        for (int r = 0; r < 3; r++) x[r] = _mm512_maskz_loadu_epi8(some, to + r * key.row_bytes + b);
        _mm512_mask_storeu_epi8(to + 3 * key.row_bytes + b, some, fourth_six(x[0], x[1], x[2]));
        for (int r = 0; r < 3; r++) _mm512_mask_storeu_epi8(to + r * key.row_bytes + b, some, low_six(x[r]));
      }
      for (int64_t b = 0; key.format == INT4 && b < key.part; b += 64) {
        const __mmask64 some = ~uint64_t(0) >> (64 - smaller(key.part - b, 64));
        const __m512i both = _mm512_maskz_loadu_epi8(some, to + b), low = _mm512_set1_epi8(15);
        _mm512_mask_storeu_epi8(to + key.part + b, some, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        _mm512_mask_storeu_epi8(to + b, some, _mm512_and_si512(both, low));
      }
      memset(to + key.dim, 0, size_t(width * 4 - key.dim));
      key_scale[i] = scale_of(from[i], at[i], key);
      key_zero[i] = zero_of(from[i], at[i], key);
    }
  }

  template <int VECS> inline void scores(const char* const*, int64_t count, int64_t, const float* panel, int64_t lane, float* to) {
    if (key.format == NATIVE) {
      tile_product<false, false>(key_rows, width, count, width, panel, VECS, to);
      return;
    }
    tile_product<true, false>(key_rows, width, count, width, panel, VECS, to);
    tile_product<true, false>(key_rows, width, count, width, panel + width * LANES, VECS, lower);
    for (int v = 0; v < VECS; v++) {
      const V unit = load(units + lane + v * W), sum = load(sums + lane + v * W);
      for (int64_t i = 0; i < count; i++) {
        const int64_t cell = i * LANES + v * W;
        const V found = ByteCodes::joined(_mm512_loadu_si512(to + cell), _mm512_loadu_si512(lower + cell), unit);
        store(to + cell, fma(found, set1(key_scale[i]), sum * set1(key_zero[i])));
      }
    }
  }

  inline void find_values(const void**, const int* at, int64_t, const KVPart&, float*) { places = at; }

  // The codes of a token's part in 16 columns as bfloat16, in the upper half of each cell; zeros of no token.
  inline __m512i codes_of(const void* from, int place, int64_t column, int part) const {
    if (!from) return _mm512_setzero_si512();
    const char* quads = (const char*)from + place / 4 * 4 * value.token_bytes + column * 4;
    const auto row = [&](int r) {
      const __m512i four = _mm512_maskz_loadu_epi32(first_lanes(int(smaller(value.row_bytes - column, W))), quads + r * value.row_bytes * 4);
      return _mm512_srl_epi32(four, _mm_cvtsi32_si128(8 * (place % 4)));
    };
    __m512i code;
    if (value.format == INT8) code = _mm512_and_si512(row(0), _mm512_set1_epi32(255));
    else if (value.format == INT4) code = _mm512_and_si512(_mm512_srli_epi32(row(0), unsigned(4 * part)), _mm512_set1_epi32(15));
    else code = _mm512_and_si512(part < 3 ? row(part) : fourth_six(row(0), row(1), row(2)), _mm512_set1_epi32(63));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(code));
  }
  // Puts the codes of two tokens, or of one, side by side.
  inline void pair_codes(const void* a, int at_a, const void* b, int at_b, float* row) const {
    const int parts = parts_of(bits_of(value.format));
    for (int64_t column = 0; column < value.row_bytes; column += W)
      for (int part = 0; part < parts; part++) {
        const int64_t begin = column + part * value.part, end = part + 1 < parts ? smaller((part + 1) * value.part, value.dim) : value.dim;
        const __m512i low = codes_of(a, at_a, column, part), high = codes_of(b, at_b, column, part);
        const __m512i both = _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
        if (begin < end) _mm512_mask_storeu_epi32(row + begin, first_lanes(int(smaller(end - begin, W))), both);
      }
  }
  inline int64_t values(const void* const* from, int64_t count, int64_t dim, float* store, const char** to) {
    const int64_t pairs = (count + 1) / 2, cells = whole_cells(pairs);
    columns = store + PAIRS * dim;
    if (value.format == NATIVE) {
      pair_values(from, count, dim, store, to);
    } else {
      for (int64_t k = 0; k < count; k++) {
        const float scale = scale_of(from[k], places[k], value);
        factors[k] = scale == 0 ? 1.f : scale;  // then all codes are 0
        offsets[k] = zero_of(from[k], places[k], value) / factors[k];
      }
      for (int64_t k = 0; k < pairs; k++) {
        const bool two = 2 * k + 1 < count;
        pair_codes(from[2 * k], places[2 * k], two ? from[2 * k + 1] : nullptr, two ? places[2 * k + 1] : 0, store + k * dim);
      }
    }
    memset(store + pairs * dim, 0, size_t((cells - pairs) * dim) * sizeof(float));
    for (int64_t d = 0; d < dim; d += CELLS)
      for (int64_t k = 0; k < cells; k += CELLS) transpose(store + k * dim + d, dim, columns + d * PAIRS + k, PAIRS);
    return pairs;
  }

  // A token that is not finite has no codes but 0: it is its zero point that says so, to the lanes that see it.
  template <int VECS, class Sees> inline void weights(float* at, int64_t count, int64_t lane, const V* factor, const Sees& sees) {
    if (value.format != NATIVE)
      for (int v = 0; v < VECS; v++) {
        V more = load(zeros + lane + v * W) * factor[v];
        for (int64_t k = 0; k < count; k++) {
          float* const to = at + k * LANES + v * W;
          if (!(offsets[k] - offsets[k] == 0)) {
            more = select(sees.of(v)(k), set1(offsets[k]), more);
            store(to, zero());
            continue;
          }
          const V rounded =
              _mm512_castsi512_ps(_mm512_and_si512(round_bits(load(to) * set1(factors[k])), _mm512_set1_epi32(int(0xffff0000))));
          store(to, rounded);
          more = fma(rounded, set1(offsets[k]), more);
        }
        store(zeros + lane + v * W, more);
      }
    pair_weights<VECS>(at, count);
  }
  template <int VECS>
  inline void mix(const char* const*, int64_t pairs, int64_t dim, float* weights, const V* factor, float* to) {
    const int64_t cells = whole_cells(pairs);
    for (int64_t k = pairs; k < cells; k++)
      for (int v = 0; v < VECS; v++) store(weights + k * LANES + v * W, zero());
    for (int64_t d = 0; d < dim; d++)
      for (int v = 0; v < VECS; v++) store(to + d * LANES + v * W, load(to + d * LANES + v * W) * factor[v]);
    tile_product<false, true>(columns, PAIRS, dim, cells, weights, VECS, to);
  }
  inline V weight(const float* at, int64_t key, int v) const { return weight_of_pair(at, key, v); }
  inline bool finite_values(const void* const* rows, int64_t count, int64_t dim) const {
    return value.format != NATIVE || all_finite<bf16>(rows, count, dim);
  }
  inline float rest(int64_t lane) const { return zeros[lane]; }
  inline bool finite() const { return all_finite(zeros, lanes); }
};

}  // namespace
}  // namespace moacompress
