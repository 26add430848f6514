// moments: scale the gradient, transport both moments and accumulate, one block of rows at a time.

// g = grad L^-T / s times the step's coefficient (clipping, unscaling, sign), rank x kRows.
inline const double* scaled_gradient(const Side& side, int64_t row) {
  double* space = scratch<double, 1>(packed_size(side.rank));
  const double* g =
      basis_panel(side.grad, row, packed(side.chol_inv, side.rank, side.scaling, space));
  double* scaled = scratch<double, 2>(side.rank * kRows);
  for (int64_t k = 0; k < side.rank * kRows; ++k) scaled[k] = g[k] * side.coefficient;
  return scaled;
}

// m <- b1 m C + (1 - b1) g.
template <class S>
void update_first_moment(const Side& side, int64_t row, int64_t count, const S* g,
                         const S* packed_c) {
  const int64_t rank = side.rank;
  S* state = static_cast<S*>(side.exp_avg) + row * rank;
  S* before = scratch<S, 3>(2 * rank * kRows);
  S* m = before;
  load_panel(state_rows(state, count, rank), 0, count, before);
  if (!side.unchanged) {
    m = before + rank * kRows;
    transform_panel(packed_c, rank, before, m);
  }
  const S beta = static_cast<S>(side.beta1), rest = static_cast<S>(1 - side.beta1);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t a = 0; a < rank; ++a)
      state[l * rank + a] = beta * m[a * kRows + l] + rest * g[a * kRows + l];
}

// Where a moving factor's second moment goes on its way to the update: m^ = m / bias1 and P^ = P /
// bias2 of a row block in groups of kTall rows, ready for tile_product. P^ comes in parts that are
// not rounded together, because v is a small difference of large products where gradients differ
// little: P^ = R + s^2 m^T m with s^2 m^T m as large as leaves R least, or P^ = sum of roots^T
// roots.
template <class T>
struct Operands {
  int64_t rank, rows, groups;
  T* m;         // [group][r][kTall]
  T* residual;  // [group][r(r+1)/2][kTall], or null
  T* share;     // s, [group][kTall]
  T* roots[2];  // [group][r][kTall] each, where there is no residual
};

template <class T>
Operands<T> operands_of(int64_t rank, int64_t rows, bool early) {
  const int64_t groups = round_up(rows, kTall) / kTall, size = groups * kTall;
  const int64_t length = early ? 0 : packed_length(rank) + 1;
  T* m = scratch<T, 13>(size * (rank * (early ? 3 : 1) + length));
  for (int64_t k = 0; k < size * (rank * (early ? 3 : 1) + length); ++k) m[k] = 0;
  T* next = m + size * rank;
  if (early) return {rank, rows, groups, m, nullptr, nullptr, {next, next + size * rank}};
  return {rank, rows, groups, m, next + size, next, {nullptr, nullptr}};
}

// full <- b2 C^T full C for one symmetric matrix, r x r with rows `stride` apart.
inline void transport(const double* full, const double* change, int64_t rank, int64_t stride,
                      double beta, double* half, double* out) {
  Vec<double> acc[kTall][kWide];
  constexpr int64_t width = tile_width<double>, step = Lanes<double>::count;
  for (int64_t a = 0; a < rank; a += kTall)
    for (int64_t b = 0; b < stride; b += width) {
      tile_product(full + a, stride, change + b, stride, rank, acc);  // full is symmetric
      for (int i = 0; i < kTall && a + i < rank; ++i)
        for (int j = 0; j < kWide; ++j)
          lanes_at(half + (a + i) * stride + b + j * step) = acc[i][j];
    }
  for (int64_t a = 0; a < rank; a += kTall)
    for (int64_t b = a / width * width; b < stride; b += width) {  // upper triangle
      tile_product(change + a, stride, half + b, stride, rank, acc);
      for (int i = 0; i < kTall && a + i < rank; ++i)
        for (int j = 0; j < kWide; ++j)
          lanes_at(out + (a + i) * stride + b + j * step) = beta * acc[i][j];
    }
}

// Split one row of P, r x r upper triangle in fp64: writes m^, s and R into the operands.
template <class S>
void split_along(const double* p, int64_t stride, const S* exp_avg, double bias1, double bias2,
                 int64_t row, const Operands<S>& to) {
  const int64_t rank = to.rank, group = row / kTall, i = row % kTall;
  double* m = scratch<double, 12>(rank);
  double length_sq = 0, share = 0;
  for (int64_t a = 0; a < rank; ++a) {
    const S hat = exp_avg[a] / static_cast<S>(bias1);
    to.m[(group * rank + a) * kTall + i] = hat;
    m[a] = hat;
    length_sq += m[a] * m[a];
  }
  const double length = __builtin_sqrt(length_sq), inverse = length > 0 ? 1 / length : 0;
  for (int64_t a = 0; a < rank; ++a) {
    double product = 0;
    for (int64_t b = a + 1; b < rank; ++b) product += p[a * stride + b] * m[b];
    share += m[a] * inverse * ((p[a * stride + a] * m[a] + 2 * product) * inverse);
  }
  share = share > 0 ? share / bias2 : 0;
  S s = static_cast<S>(__builtin_sqrt(share) * inverse);
  // Where m is nothing beside sqrt(P), s is huge and there is nothing to split.
  if (!(s < static_cast<S>(1e30))) s = 0;
  to.share[group * kTall + i] = s;
  S* residual = to.residual + group * packed_length(rank) * kTall + i;
  const double square = static_cast<double>(s) * static_cast<double>(s), rest = 1 / bias2;
  for (int64_t a = 0; a < rank; ++a)
    for (int64_t b = a; b < rank; ++b, residual += kTall)
      *residual = static_cast<S>(p[a * stride + b] * rest - square * m[a] * m[b]);
}

// P_i <- b2 C^T P_i C + (1 - b2) g_i^T g_i in fp64, row by row; with operands, P is split before it
// is rounded to the state.
template <class S>
void update_second_moment(const Side& side, int64_t row, int64_t count, const double* g,
                          const Operands<S>* operands) {
  const int64_t rank = side.rank, stride = round_up(rank, tile_width<double>),
                size = rank * stride + kTall;
  const double beta = side.beta2, rest = 1 - side.beta2;
  double* change = scratch<double, 4>(4 * round_up(size, tile_width<double>) + stride);
  double* full = change + round_up(size, tile_width<double>);
  double* half = full + round_up(size, tile_width<double>);
  double* p = side.unchanged ? full : half + round_up(size, tile_width<double>);
  double* own = change + 4 * round_up(size, tile_width<double>);
  for (int64_t k = 0; k < 2 * round_up(size, tile_width<double>); ++k) change[k] = 0;
  for (int64_t a = 0; a < rank; ++a)
    for (int64_t b = 0; b < rank; ++b) change[a * stride + b] = side.change[a * rank + b];
  S* state = static_cast<S*>(side.second_moment) + row * packed_length(rank);
  const S* exp_avg = static_cast<const S*>(side.exp_avg) + row * rank;
  for (int64_t l = 0; l < count; ++l, exp_avg += rank) {
    const double scale = side.unchanged ? beta : 1;
    const S* stored = state;
    for (int64_t a = 0; a < rank; ++a, stored += rank - a + 1)
      for (int64_t b = a; b < rank; ++b)
        full[a * stride + b] = scale * static_cast<double>(stored[b - a]);
    if (!side.unchanged) {
      for (int64_t a = 1; a < rank; ++a)
        for (int64_t b = 0; b < a; ++b) full[a * stride + b] = full[b * stride + a];
      transport(full, change, rank, stride, beta, half, p);
    }
    for (int64_t a = 0; a < rank; ++a) own[a] = g[a * kRows + l];
    for (int64_t a = 0; a < rank; ++a) {
      const double left = rest * own[a];
      for (int64_t b = a; b < rank; ++b) {
        p[a * stride + b] += left * own[b];
        state[b - a] = static_cast<S>(p[a * stride + b]);
      }
      state += rank - a;
    }
    if (operands) split_along(p, stride, exp_avg, side.bias1, side.bias2, l, *operands);
  }
}

template <class S>
void moments(const Side& side, int64_t row, int64_t count, const double* g_wide,
             const Operands<S>* operands) {
  const int64_t rank = side.rank;
  S* g = scratch<S, 5>(rank * kRows);
  for (int64_t k = 0; k < rank * kRows; ++k) g[k] = static_cast<S>(g_wide[k]);
  S* packed_c = scratch<S, 6>(packed_size(rank));
  if (!side.unchanged) pack_rows(side.change, int64_t(1), rank, rank, rank, S(1), packed_c);
  update_first_moment(side, row, count, g, packed_c);
  update_second_moment(side, row, count, g_wide, operands);
}

// Both moments after one of the first two steps without reading P back: P is of rank one or two
// there, and rounding it would ruin small v. One gradient makes the guard an equality,
// P = m^T m / guard. `before` is m before the step; panels are rank x kRows.
inline Operands<double> early_moments(const Side& side, int64_t count, const double* before,
                                      const double* g) {
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
  const Operands<double> to = operands_of<double>(rank, count, true);
  const double old = fresh ? 0 : __builtin_sqrt(side.beta2 / side.guard_before / side.bias2);
  const double rest = __builtin_sqrt((1 - side.beta2) / side.bias2);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t a = 0; a < rank; ++a) {
      const int64_t place = ((l / kTall) * rank + a) * kTall + l % kTall;
      const double own = g[a * kRows + l], past = fresh ? 0 : carried[a * kRows + l];
      to.roots[0][place] = old * past;
      to.roots[1][place] = rest * own;
      to.m[place] = (side.beta1 * past + (1 - side.beta1) * own) / side.bias1;
    }
  return to;
}
