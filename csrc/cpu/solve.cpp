// solve: Cholesky factors of r x r Gram matrices in fp64, as in reference.py.
#include <cmath>
#include <vector>

#include "side.h"

namespace loft {
namespace {

using Square = std::vector<double>;  // r x r, row-major

// A column whose squared distance to the span of its predecessors is below this share of its
// squared length is dependent; the same number stands in reference.py.
constexpr double kPivotTolerance = 1e-13;

// Cholesky with diagonal pivoting, dropping dependent columns: L, and M that inverts it on the kept
// columns. A dropped column has a zero column in L and a zero row in M.
void cholesky_dropping(const Square& gram, int64_t r, Square& chol, Square& inverse,
                       std::vector<bool>& kept) {
  std::vector<double> left(r), column(r), solved(r);
  for (int64_t j = 0; j < r; ++j) left[j] = gram[j * r + j] > 0 ? 1 : 0;
  kept.assign(r, false);
  for (int64_t pass = 0; pass < r; ++pass) {
    int64_t j = 0;
    for (int64_t k = 1; k < r; ++k)
      if (left[k] > left[j]) j = k;
    const double* row = &chol[j * r];
    if (left[j] > kPivotTolerance) {
      for (int64_t i = 0; i < r; ++i) {
        double product = 0;
        for (int64_t k = 0; k < r; ++k) product += chol[i * r + k] * row[k];
        // Rows of columns that are already pivots are zero in exact arithmetic.
        column[i] = left[i] >= 0 ? gram[j * r + i] - product : 0;
      }
      for (int64_t i = 0; i < r; ++i) solved[i] = i == j ? 1 : 0;
      for (int64_t k = 0; k < r; ++k)
        for (int64_t i = 0; i < r; ++i) solved[i] -= row[k] * inverse[k * r + i];
      const double root = std::sqrt(column[j] > 0 ? column[j] : 0);
      for (int64_t i = 0; i < r; ++i) {
        chol[i * r + j] = column[i] / root;
        inverse[j * r + i] = solved[i] / root;
      }
      for (int64_t i = 0; i < r; ++i)
        if (gram[i * r + i] > 0) left[i] -= chol[i * r + j] * chol[i * r + j] / gram[i * r + i];
      kept[j] = true;
    }
    left[j] = -1;
  }
}

// Plain Cholesky of a matrix that is positive definite by construction; the lower triangle.
Square cholesky(const Square& a, int64_t r) {
  Square l(r * r, 0.0);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = a[i * r + j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * r + k] * l[j * r + k];
      l[i * r + j] = i == j ? std::sqrt(sum) : sum / l[j * r + j];
    }
  return l;
}

// x <- L^-1 x for lower triangular L and r x r right-hand sides.
void solve_lower(const Square& l, Square& x, int64_t r) {
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k)
      for (int64_t c = 0; c < r; ++c) x[i * r + c] -= l[i * r + k] * x[k * r + c];
    for (int64_t c = 0; c < r; ++c) x[i * r + c] /= l[i * r + i];
  }
}

// x <- L^-T x.
void solve_upper(const Square& l, Square& x, int64_t r) {
  for (int64_t i = r; i-- > 0;) {
    for (int64_t k = i + 1; k < r; ++k)
      for (int64_t c = 0; c < r; ++c) x[i * r + c] -= l[k * r + i] * x[k * r + c];
    for (int64_t c = 0; c < r; ++c) x[i * r + c] /= l[i * r + i];
  }
}

Square product(const Square& a, const Square& b, int64_t r) {
  Square c(r * r, 0.0);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t k = 0; k < r; ++k)
      for (int64_t j = 0; j < r; ++j) c[i * r + j] += a[i * r + k] * b[k * r + j];
  return c;
}

Square identity(int64_t r) {
  Square eye(r * r, 0.0);
  for (int64_t i = 0; i < r; ++i) eye[i * r + i] = 1;
  return eye;
}

// L^+ = M (I + Z^T Z)^-1 (kept I + Z^T) with Z = L_dropped M.
Square pseudo_inverse(const Square& chol, const Square& inverse, const std::vector<bool>& kept,
                      int64_t r) {
  Square dropped = chol;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t k = 0; kept[i] && k < r; ++k) dropped[i * r + k] = 0;
  const Square z = product(dropped, inverse, r);
  Square inner = identity(r), right(r * r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < r; ++k) inner[i * r + j] += z[k * r + i] * z[k * r + j];
      right[i * r + j] = z[j * r + i] + (i == j && kept[i] ? 1 : 0);
    }
  const Square l = cholesky(inner, r);
  solve_lower(l, right, r);
  solve_upper(l, right, r);
  return product(inverse, right, r);
}

}  // namespace

void solve(const Side& side, const Kernels& kernels) {
  const int64_t r = side.rank;
  Square gram(r * r), chol(r * r, 0.0), inverse(r * r, 0.0);
  std::vector<bool> kept;
  kernels.gram(side.partner, nullptr, gram.data());
  if (side.damping != 0) {
    double trace = 0;
    for (int64_t i = 0; i < r; ++i) trace += gram[i * r + i];
    for (int64_t i = 0; i < r; ++i) gram[i * r + i] += side.damping * (trace / r);
  }
  cholesky_dropping(gram, r, chol, inverse, kept);
  Square second = identity(r);
  Square first = inverse;
  if (side.damping == 0) {
    // Orthonormalise again: the Gram matrix of Y squares its condition, that of Q is close to I.
    kernels.gram(side.partner, first.data(), gram.data());
    for (int64_t i = 0; i < r; ++i)
      if (gram[i * r + i] == 0) gram[i * r + i] = 1;
    const Square again = cholesky(gram, r);
    solve_lower(again, second, r);
    chol = product(chol, again, r);
    inverse = product(second, inverse, r);
  }
  bool whole = true;
  for (int64_t i = 0; i < r; ++i) whole = whole && kept[i];
  const Square pseudo = whole ? inverse : pseudo_inverse(chol, inverse, kept, r);
  for (int64_t k = 0; k < r * r; ++k) {
    side.first[k] = first[k];
    side.second[k] = second[k];
    side.chol_inv[k] = pseudo[k];
  }
}

}  // namespace loft
