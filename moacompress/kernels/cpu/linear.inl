// Products of a few rows with a weight as it lies in memory, [outputs, inputs]: every weight is read once, and reading it is what
// takes the time. Written once over the vectors of a vec_*.h, like kernels.inl, whose dot products it uses.

namespace moacompress {
namespace {

constexpr int FEW = W >= 16 ? 4 : 2;  // rows whose products with four outputs fit the registers; with two, twice as many do
constexpr int MOST = 2 * FEW;         // more rows than that take another pass over the weight

// The products of ROWS rows of the input with OUTPUTS (2 or 4) rows of the weight, [ROWS, OUTPUTS], and maybe two numbers that mean
// nothing; what lies `ahead` bytes behind each weight is read ahead.
template <class T, int ROWS, int OUTPUTS>
inline void products(const T* x, const T* const* weight, int64_t inputs, int64_t ahead, float* to) {
  typedef typename DotOf<T>::type Op;
  V sums[ROWS + 1][OUTPUTS];
  for (int r = 0; r <= ROWS; r++)
    for (int o = 0; o < OUTPUTS; o++) sums[r][o] = zero();
  const int64_t whole = inputs / Op::STEP * Op::STEP;
  typename Op::Register w[OUTPUTS];
  for (int64_t i = 0; i < whole; i += Op::STEP) {
    for (int o = 0; o < OUTPUTS; o++) {
      prefetch((const char*)(weight[o] + i) + ahead);
      w[o] = Op::key(weight[o] + i);
    }
    for (int r = 0; r < ROWS; r++) {
      const typename Op::Register row = Op::key(x + r * inputs + i);
      for (int o = 0; o < OUTPUTS; o++) sums[r][o] = Op::dot(w[o], row, sums[r][o]);
    }
  }
  if (const int rest = int(inputs - whole)) {
    for (int o = 0; o < OUTPUTS; o++) w[o] = Op::key_part(weight[o] + whole, rest);
    for (int r = 0; r < ROWS; r++) {
      const typename Op::Register row = Op::key_part(x + r * inputs + whole, rest);
      for (int o = 0; o < OUTPUTS; o++) sums[r][o] = Op::dot(w[o], row, sums[r][o]);
    }
  }
  const V* flat = &sums[0][0];
  for (int i = 0; i < ROWS * OUTPUTS; i += 4) sum4(flat[i], flat[i + 1], flat[i + 2], flat[i + 3], to + i);
}

// As above for `rows` rows, of which there are at most ROWS.
template <class T, int ROWS>
void products_of(int rows, const T* x, const T* const* weight, int64_t inputs, int64_t ahead, float* to) {
  if (rows == ROWS) products<T, ROWS, (ROWS > FEW ? 2 : 4)>(x, weight, inputs, ahead, to);
  else if constexpr (ROWS > 1) products_of<T, ROWS - 1>(rows, x, weight, inputs, ahead, to);
}

template <class T> void linear_tile(const LinearTile& t) {
  const T *x = static_cast<const T*>(t.x), *weight = static_cast<const T*>(t.weight), *bias = static_cast<const T*>(t.bias);
  float sums[4 * (MOST + 1)];
  for (int64_t row = 0; row < t.rows; row += MOST) {
    const int rows = int(t.rows - row < MOST ? t.rows - row : MOST), outputs = rows > FEW ? 2 : 4;
    for (int64_t first = 0; first < t.outputs; first += outputs) {
      const int count = int(t.outputs - first < outputs ? t.outputs - first : outputs);
      const T* weights[4];
      for (int o = 0; o < outputs; o++) weights[o] = weight + (first + (o < count ? o : count - 1)) * t.inputs;
      float added[4] = {0};
      if (bias) widen_row(bias + first, count, added);
      products_of<T, MOST>(rows, x + row * t.inputs, weights, t.inputs, 4 * t.inputs * int64_t(sizeof(T)), sums);
      for (int r = 0; r < rows; r++) {
        for (int o = 0; o < count; o++) sums[r * outputs + o] += added[o];
        narrow_row(sums + r * outputs, count, static_cast<T*>(t.out) + (row + r) * t.out_row + first);
      }
    }
  }
}

#ifndef MOACOMPRESS_AMX  // with tiles these are in linear_tiles.inl
inline size_t panel_floats(int64_t, int64_t) { return 0; }
void lay_out(const void*, int64_t, int64_t, float*) {}
void linear_tiles(const LinearTile&) {}
#endif

template <class T> void rotate_head(void* x, const void* cos, const void* sin, const float* less, int64_t dim) {
  const int64_t half = dim / 2;
  T *low = static_cast<T*>(x), *high = low + half;
  const T *c = static_cast<const T*>(cos), *s = static_cast<const T*>(sin);
  for (int64_t i = 0; i < half; i += W) {
    const int n = int(half - i < W ? half - i : W);
    const V a = load_part(low + i, n), b = load_part(high + i, n);
    V first = a * load_part(c + i, n) - b * load_part(s + i, n), second = b * load_part(c + half + i, n) + a * load_part(s + half + i, n);
    if (less) {
      first = first - load_part(less + i, n);
      second = second - load_part(less + half + i, n);
    }
    store_part(low + i, first, n);
    store_part(high + i, second, n);
  }
}

// Each step is rounded to T, as a layer written in torch rounds it.
template <class T> inline V rounded(V x) {
  T at[W];
  store(at, x);
  return load(at);
}
template <> inline V rounded<float>(V x) { return x; }

template <class T> void gate_row(void* x, const void* up, int64_t count) {
  T* gate = static_cast<T*>(x);
  const T* other = static_cast<const T*>(up);
  for (int64_t i = 0; i < count; i += W) {
    const int n = int(count - i < W ? count - i : W);
    const V g = load_part(gate + i, n);
    const V activated = rounded<T>(g / (set1(1.f) + exp2(g * set1(-LOG2_E))));
    store_part(gate + i, activated * load_part(other + i, n), n);
  }
}

template <class T> void add_row(void* x, const void* other, int64_t count) {
  T* to = static_cast<T*>(x);
  const T* from = static_cast<const T*>(other);
  for (int64_t i = 0; i < count; i += W) {
    const int n = int(count - i < W ? count - i : W);
    store_part(to + i, load_part(to + i, n) + load_part(from + i, n), n);
  }
}

template <class T> void norm_row(const void* x, const void* weight, float eps, int64_t count, void* out) {
  const T *from = static_cast<const T*>(x), *scale = static_cast<const T*>(weight);
  V squares = zero();
  for (int64_t i = 0; i < count; i += W) {
    const V v = load_part(from + i, int(count - i < W ? count - i : W));
    squares = fma(v, v, squares);
  }
  const V factor = set1(1.f / __builtin_sqrtf(sum(squares) / float(count) + eps));
  for (int64_t i = 0; i < count; i += W) {
    const int n = int(count - i < W ? count - i : W);
    store_part(static_cast<T*>(out) + i, load_part(scale + i, n) * rounded<T>(load_part(from + i, n) * factor), n);
  }
}

}  // namespace
}  // namespace moacompress
