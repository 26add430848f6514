// basis: Q of the partner's snapshot goes to the state, C = Q_prev^T Q comes out (Eq. 7-8).

template <class S>
void basis_of(Side& side) {
  const int64_t rank = side.rank;
  double* space = scratch<double, 1>(2 * packed_size(rank));
  const double* first = packed(side.first, rank, 1.0, space);
  const double* second = packed(side.second, rank, 1.0, space + packed_size(rank));
  double* q = scratch<double, 2>(2 * rank * kRows);
  double* before = q + rank * kRows;
  S* memory = static_cast<S*>(side.partner_basis);
  const Matrix remembered = state_rows(memory, side.partner.rows, rank);
  for (int64_t k = 0; k < rank * rank; ++k) side.change[k] = 0;
  side.unchanged = true;
  for (int64_t row = 0; row < side.partner.rows; row += kRows) {
    const int64_t left = side.partner.rows - row, count = left < kRows ? left : kRows;
    transform_panel(second, rank, basis_panel(side.partner, row, first), q);
    load_panel(remembered, row, count, before);
    for (int64_t l = 0; l < count; ++l)
      for (int64_t a = 0; a < rank; ++a) {
        const int64_t place = (row + l) * rank + a;
        double& exact = q[a * kRows + l];
        if (side.wide_q) side.wide_q[place] = exact;
        memory[place] = static_cast<S>(exact);
        exact = static_cast<double>(memory[place]);
        side.unchanged = side.unchanged && exact == before[a * kRows + l];
      }
    add_products(before, q, rank, side.change);
  }
}

void basis(Side& side) { side.wide ? basis_of<double>(side) : basis_of<float>(side); }
