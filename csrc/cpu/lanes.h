// Vectors of one instruction set, panels of rows, and the one product that everything is made of.
// No include guard and no standard headers: each kernels_*.cpp includes this inside a namespace of
// its own, where instructions are allowed that other translation units must not contain.

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(LOFT_VECTOR_BYTES), may_alias));
  static constexpr int64_t count = LOFT_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Lanes<T>::type;

// A tile of kTall rows times kWide vectors is summed in registers.
constexpr int kTall = 6;
constexpr int kWide = 2;
template <class T>
constexpr int64_t tile_width = kWide * Lanes<T>::count;

static_assert(kRows % kTall == 0 && kRows % tile_width<float> == 0, "panels hold whole tiles");

template <class T>
inline Vec<T>& lanes_at(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
inline const Vec<T>& lanes_at(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

#if defined(LOFT_SQRT_F32)
inline Vec<float> square_root(Vec<float> x) { return LOFT_SQRT_F32(x); }
inline Vec<double> square_root(Vec<double> x) { return LOFT_SQRT_F64(x); }
#else
inline Vec<float> square_root(Vec<float> x) {
  for (int64_t l = 0; l < Lanes<float>::count; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
}
inline Vec<double> square_root(Vec<double> x) {
  for (int64_t l = 0; l < Lanes<double>::count; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
}
#endif

template <class T>
inline T sum_lanes(Vec<T> x) {
  T total = 0;
  for (int64_t l = 0; l < Lanes<T>::count; ++l) total += x[l];
  return total;
}

// Scratch memory of one thread and purpose, aligned for vectors; it only grows.
template <class T, int purpose>
T* scratch(int64_t count) {
  return static_cast<T*>(thread_scratch(purpose, count * static_cast<int64_t>(sizeof(T))));
}

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

inline float widened(uint16_t bits, Dtype dtype) {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, word = 0;
  float value;
  if (dtype == Dtype::bf16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
    const uint32_t exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    if (exponent == 0) {  // fraction * 2^-24
      value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    word = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  }
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// Round to nearest, ties to even.
inline uint16_t narrowed(float value, Dtype dtype) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  const uint32_t sign = word >> 16 & 0x8000u;
  word &= 0x7fffffffu;
  if (dtype == Dtype::bf16) {
    if (word > 0x7f800000u) return 0x7fc0u;
    return static_cast<uint16_t>(sign | (word + 0x7fffu + (word >> 16 & 1u)) >> 16);
  }
  if (word > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (word >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (word < 0x38800000u) {  // below 2^-14: adding 0.5 rounds where fp16's last bit stands
    float shifted;
    __builtin_memcpy(&shifted, &word, sizeof shifted);
    shifted += 0.5f;
    __builtin_memcpy(&word, &shifted, sizeof word);
    return static_cast<uint16_t>(sign | (word - 0x3f000000u));
  }
  word += 0xfffu + (word >> 13 & 1u);
  return static_cast<uint16_t>(sign | (word - (112u << 23)) >> 13);
}

// State, row-major.
template <class S>
Matrix state_rows(const S* data, int64_t rows, int64_t rank) {
  return {const_cast<S*>(data), sizeof(S) == 8 ? Dtype::f64 : Dtype::f32, rows, rank, rank, 1};
}

template <class T, class Read>
inline void fill_panel(const Matrix& x, int64_t count, T* panel, Read read) {
  for (int64_t a = 0; a < x.cols; ++a) {
    T* out = panel + a * kRows;
    for (int64_t l = 0; l < count; ++l)
      out[l] = static_cast<T>(read(l * x.stride_row + a * x.stride_col));
    for (int64_t l = count; l < kRows; ++l) out[l] = 0;
  }
}

// Load rows as a panel, cols x kRows: one row per lane, so that every loop below runs over lanes
// whatever the rank. Rows beyond the last are zero.
template <class T>
void load_panel(const Matrix& x, int64_t row, int64_t count, T* panel) {
  const int64_t start = row * x.stride_row;
  if (x.dtype == Dtype::f64) {
    const double* p = static_cast<const double*>(x.data) + start;
    fill_panel(x, count, panel, [p](int64_t o) { return p[o]; });
  } else if (x.dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(x.data) + start;
    fill_panel(x, count, panel, [p](int64_t o) { return p[o]; });
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + start;
    const Dtype dtype = x.dtype;
    fill_panel(x, count, panel, [p, dtype](int64_t o) { return widened(p[o], dtype); });
  }
}

// acc[i][j] = sum over depth of a[k][i] * b[k][j]: `a` holds kTall numbers per k, `b` kWide
// vectors.
template <class T>
inline void tile_product(const T* a, int64_t stride_a, const T* b, int64_t stride_b, int64_t depth,
                         Vec<T> (&acc)[kTall][kWide]) {
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kWide; ++j) acc[i][j] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> wide[kWide];
    for (int j = 0; j < kWide; ++j) wide[j] = lanes_at(b + k * stride_b + j * Lanes<T>::count);
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kWide; ++j) acc[i][j] += a[k * stride_a + i] * wide[j];
  }
}

// Lay a matrix out for tile_product: groups of kTall output rows, zeros beyond the last.
// out[group][k][i] = scale * x(group * kTall + i, k).
template <class T, class S>
void pack_rows(const S* x, int64_t stride_row, int64_t stride_col, int64_t rows, int64_t depth,
               T divisor, T* out) {
  for (int64_t group = 0; group < rows; group += kTall, out += depth * kTall)
    for (int i = 0; i < kTall; ++i)
      for (int64_t k = 0; k < depth; ++k)
        out[k * kTall + i] =
            group + i < rows
                ? static_cast<T>(x[(group + i) * stride_row + k * stride_col]) / divisor
                : T(0);
}

// out = M in for panels (rank x kRows), M packed by pack_rows.
template <class T>
void transform_panel(const T* packed, int64_t rank, const T* in, T* out) {
  for (int64_t k = 0; k < rank; k += kTall, packed += rank * kTall)
    for (int64_t l = 0; l < kRows; l += tile_width<T>) {
      Vec<T> acc[kTall][kWide];
      tile_product(packed, kTall, in + l, kRows, rank, acc);
      for (int i = 0; i < kTall && k + i < rank; ++i)
        for (int j = 0; j < kWide; ++j)
          lanes_at(out + (k + i) * kRows + l + j * Lanes<T>::count) = acc[i][j];
    }
}
