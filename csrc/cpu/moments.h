// moments: scale the gradient, transport both moments and accumulate, one block of rows at a time.

// g = grad L^-T / s times the step's coefficient (clipping, unscaling, sign), rank x kRows.
inline const double* scaled_gradient(const Side& side, int64_t row) {
  double* space = scratch<double, 1>(packed_size(side.rank));
  const double* g = basis_panel(side.grad, row, packed(side.chol_inv, side.rank, side.scaling, space));
  double* scaled = scratch<double, 2>(side.rank * kRows);
  for (int64_t k = 0; k < side.rank * kRows; ++k) scaled[k] = g[k] * side.coefficient;
  return scaled;
}

// m <- b1 m C + (1 - b1) g.
template <class S>
void update_first_moment(const Side& side, int64_t row, int64_t count, const S* g, const S* packed_c) {
  const int64_t rank = side.rank;
  S* state = static_cast<S*>(side.exp_avg) + row * rank;
  const Matrix stored{state, sizeof(S) == 8 ? Dtype::f64 : Dtype::f32, count, rank, rank, 1};
  S* before = scratch<S, 3>(2 * rank * kRows);
  S* m = before;
  load_panel(stored, 0, count, before);
  if (!side.unchanged) {
    m = before + rank * kRows;
    transform_panel(packed_c, rank, before, m);
  }
  const S beta = static_cast<S>(side.beta1), rest = static_cast<S>(1 - side.beta1);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t a = 0; a < rank; ++a)
      state[l * rank + a] = beta * m[a * kRows + l] + rest * g[a * kRows + l];
}

// P_i <- b2 P_i + (1 - b2) g_i^T g_i, where C is I.
template <class S>
void accumulate_second_moment(const Side& side, int64_t count, const S* g, S* state) {
  const int64_t rank = side.rank;
  const S beta = static_cast<S>(side.beta2), rest = static_cast<S>(1 - side.beta2);
  S* own = scratch<S, 4>(rank);
  for (int64_t l = 0; l < count; ++l) {
    for (int64_t a = 0; a < rank; ++a) own[a] = g[a * kRows + l];
    for (int64_t a = 0; a < rank; ++a) {
      const S left = rest * own[a];
      for (int64_t b = a; b < rank; ++b) state[b - a] = beta * state[b - a] + left * own[b];
      state += rank - a;
    }
  }
}

// P_i <- b2 C^T P_i C + (1 - b2) g_i^T g_i: rows in lanes, a vector block at a time.
template <class S>
void transport_second_moment(const Side& side, int64_t count, const S* g, const S* packed_c, S* state) {
  constexpr int64_t width = tile_width<S>;
  const int64_t rank = side.rank, length = packed_length(rank);
  const S beta = static_cast<S>(side.beta2), rest = static_cast<S>(1 - side.beta2);
  S* full = scratch<S, 4>(2 * rank * rank * width);
  S* half = full + rank * rank * width;  // (P C)^T
  for (int64_t first = 0; first < count; first += width, state += width * length) {
    const int64_t here = count - first < width ? count - first : width;
    int64_t k = 0;
    for (int64_t a = 0; a < rank; ++a)
      for (int64_t b = a; b < rank; ++b, ++k) {
        S *upper = full + (a * rank + b) * width, *lower = full + (b * rank + a) * width;
        for (int64_t l = 0; l < width; ++l) upper[l] = l < here ? state[l * length + k] : S(0);
        for (int64_t l = 0; l < width; ++l) lower[l] = upper[l];
      }
    Vec<S> acc[kTall][kWide];
    for (int64_t a = 0; a < rank; ++a)
      for (int64_t b = 0; b < rank; b += kTall) {
        tile_product(packed_c + b * rank, full + a * rank * width, width, rank, acc);
        for (int i = 0; i < kTall && b + i < rank; ++i)
          for (int j = 0; j < kWide; ++j)
            lanes_at(half + ((b + i) * rank + a) * width + j * Lanes<S>::count) = acc[i][j];
      }
    for (int64_t b = 0; b < rank; ++b)
      for (int64_t a = 0; a <= b; a += kTall) {
        tile_product(packed_c + a * rank, half + b * rank * width, width, rank, acc);
        for (int i = 0; i < kTall && a + i <= b; ++i)
          for (int j = 0; j < kWide; ++j) {
            const int64_t lane = first + j * Lanes<S>::count;
            const Vec<S> fresh = lanes_at(g + (a + i) * kRows + lane) * lanes_at(g + b * kRows + lane);
            lanes_at(full + ((a + i) * rank + b) * width + j * Lanes<S>::count) =
                beta * acc[i][j] + rest * fresh;
          }
      }
    k = 0;
    for (int64_t a = 0; a < rank; ++a)
      for (int64_t b = a; b < rank; ++b, ++k)
        for (int64_t l = 0; l < here; ++l) state[l * length + k] = full[(a * rank + b) * width + l];
  }
}

template <class S>
void moments(const Side& side, int64_t row, int64_t count, const double* g_wide) {
  const int64_t rank = side.rank;
  S* g = scratch<S, 5>(rank * kRows);
  for (int64_t k = 0; k < rank * kRows; ++k) g[k] = static_cast<S>(g_wide[k]);
  S* packed_c = scratch<S, 6>(packed_size(rank));
  if (!side.unchanged) pack_rows(side.change, int64_t(1), rank, rank, rank, S(1), packed_c);
  update_first_moment(side, row, count, g, packed_c);
  S* state = static_cast<S*>(side.second_moment) + row * packed_length(rank);
  if (side.unchanged)
    accumulate_second_moment(side, count, g, state);
  else
    transport_second_moment(side, count, g, packed_c, state);
}

// Both moments in fp64 after one of the first two steps, where P has rank one or two: m and the
// roots R of P = R_1^T R_1 + R_2^T R_2, each rank x kRows. Rounding P itself would ruin small v.
inline void early_moments(const Side& side, const double* before, const double* g, double* m,
                          double* root1, double* root2) {
  const int64_t rank = side.rank;
  const bool fresh = side.guard_before == 0;
  const double* carried = before;
  if (!fresh && !side.unchanged) {
    double* packed_c = scratch<double, 1>(packed_size(rank));
    pack_rows(side.change, int64_t(1), rank, rank, rank, 1.0, packed_c);
    double* turned = scratch<double, 7>(rank * kRows);
    transform_panel(packed_c, rank, before, turned);
    carried = turned;
  }
  const double old = fresh ? 0 : __builtin_sqrt(side.beta2 / side.guard_before);
  const double rest = __builtin_sqrt(1 - side.beta2);
  for (int64_t k = 0; k < rank * kRows; ++k) {
    root1[k] = fresh ? 0 : old * carried[k];
    root2[k] = rest * g[k];
    m[k] = (fresh ? 0 : side.beta1 * carried[k]) + (1 - side.beta1) * g[k];
  }
}
