// Everything that is compiled per instruction set, inside the namespace that includes it.

#include "lanes.h"

#include "gram.h"

#include "basis.h"

#include "moments.h"

#include "update.h"

template <class S>
void rows_of(const Side& side, int64_t row, int64_t count) {
  const double* g = scaled_gradient(side, row);
  if (!side.moving) return moments<S>(side, row, count, g, nullptr);
  if (!side.early) {
    const Operands<S> operands = operands_of<S>(side.rank, count, false);
    moments(side, row, count, g, &operands);
    return update<S>(side, row, operands, static_cast<const S*>(side.partner_basis));
  }
  const S* exp_avg = static_cast<const S*>(side.exp_avg) + row * side.rank;
  double* before = scratch<double, 15>(side.rank * kRows);
  load_panel(state_rows(exp_avg, count, side.rank), 0, count, before);
  const Operands<double> operands = early_moments(side, count, before, g);
  moments<S>(side, row, count, g, nullptr);
  update<S>(side, row, operands, side.wide_q);
}

void rows(const Side& side, int64_t row, int64_t count) {
  side.wide ? rows_of<double>(side, row, count) : rows_of<float>(side, row, count);
}
