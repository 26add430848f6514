// gram: products of panels summed over rows in fp64, one chunk after the other.

// out[a][b] += sum over rows of p[a] q[b].
inline void add_products(const double* p, const double* q, int64_t rank, double* out) {
  constexpr int64_t step = Lanes<double>::count, block = 4;
  for (int64_t a = 0; a < rank; ++a)
    for (int64_t b = 0; b < rank; b += block) {
      Vec<double> acc[block] = {};
      const int64_t width = rank - b < block ? rank - b : block;
      for (int64_t l = 0; l < kRows; l += step)
        for (int64_t j = 0; j < block; ++j)
          acc[j] +=
              lanes_at(p + a * kRows + l) * lanes_at(q + (b + (j < width ? j : 0)) * kRows + l);
      for (int64_t j = 0; j < width; ++j) out[a * rank + b + j] += sum_lanes<double>(acc[j]);
    }
}

// Rows of Y in the basis `first`, as a panel; `first` null: as they are.
inline const double* basis_panel(const Matrix& y, int64_t row, const double* packed_first) {
  const int64_t count = y.rows - row < kRows ? y.rows - row : kRows;
  double* panel = scratch<double, 0>(2 * y.cols * kRows);
  load_panel(y, row, count, panel);
  if (!packed_first) return panel;
  double* turned = panel + y.cols * kRows;
  transform_panel(packed_first, y.cols, panel, turned);
  return turned;
}

inline const double* packed(const double* matrix, int64_t rank, double divisor, double* out) {
  pack_rows(matrix, rank, int64_t(1), rank, rank, divisor, out);
  return out;
}

inline int64_t packed_size(int64_t rank) { return round_up(rank, kTall) * rank; }

void gram(const Matrix& y, const double* first, double* out) {
  const int64_t rank = y.cols;
  double* space = scratch<double, 1>(packed_size(rank));
  const double* packed_first = first ? packed(first, rank, 1.0, space) : nullptr;
  for (int64_t k = 0; k < rank * rank; ++k) out[k] = 0;
  for (int64_t row = 0; row < y.rows; row += kRows) {
    const double* panel = basis_panel(y, row, packed_first);
    add_products(panel, panel, rank, out);
  }
}

// The squared norm of g = grad L^-T / s; inf or NaN anywhere in the gradient stays visible.
double gradient_norm(const Side& side) {
  const int64_t rank = side.rank;
  double* space = scratch<double, 1>(packed_size(rank));
  const double* solve = packed(side.chol_inv, rank, side.scaling, space);
  double total = 0;
  for (int64_t row = 0; row < side.grad.rows; row += kRows) {
    const double* g = basis_panel(side.grad, row, solve);
    Vec<double> acc = {};
    for (int64_t k = 0; k < rank * kRows; k += Lanes<double>::count)
      acc += lanes_at(g + k) * lanes_at(g + k);
    total += sum_lanes<double>(acc);
  }
  return total;
}
