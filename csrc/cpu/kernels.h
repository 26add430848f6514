// Everything that is compiled per instruction set, inside the namespace that includes it.

#include "lanes.h"

#include "gram.h"

#include "basis.h"

#include "moments.h"

#include "update.h"

template <class S>
void rows_of(const Side& side, int64_t row, int64_t count) {
  const double* g = scaled_gradient(side, row);
  if (!(side.moving && side.early)) {
    moments<S>(side, row, count, g);
    if (side.moving) update<S>(side, row, count);
    return;
  }
  const int64_t size = side.rank * kRows;
  double* m = scratch<double, 15>(4 * size);
  double *root1 = m + size, *root2 = root1 + size, *before = root2 + size;
  S* state = static_cast<S*>(side.exp_avg) + row * side.rank;
  load_panel(Matrix{state, sizeof(S) == 8 ? Dtype::f64 : Dtype::f32, count, side.rank, side.rank, 1},
             0, count, before);
  early_moments(side, before, g, m, root1, root2);
  moments<S>(side, row, count, g);
  early_update<S>(side, row, count, m, root1, root2);
}

void rows(const Side& side, int64_t row, int64_t count) {
  side.wide ? rows_of<double>(side, row, count) : rows_of<float>(side, row, count);
}
