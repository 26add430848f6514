// What one LoFT step knows of one factor: plain data, shared by all files of this folder.
#pragma once

#include <cstdint>

namespace loft {

// Rows per panel and per work item: a multiple of every tile height and vector width, and fixed, so
// that sums do not depend on the number of threads.
constexpr int64_t kRows = 96;

enum class Dtype { f64, f32, f16, bf16 };

// A matrix as rows x cols, whatever its layout in memory; strides count elements.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, cols = 0;
  int64_t stride_row = 0, stride_col = 0;
};

// One factor X (rows x r) with its partner Y (partner rows x r), in the words of reference.py.
// Matrices of r x r are row-major fp64; state is row-major in `wide` ? fp64 : fp32.
struct Side {
  Matrix factor, partner, grad, master;
  int64_t rank = 0;
  bool wide = false;

  // Options and decisions of this step.
  double scaling = 1, damping = 0, lr = 0, weight_decay = 0;
  double beta1 = 0, beta2 = 0, eps = 0, coefficient = 1;
  bool moving = false;

  // Basis of the partner's snapshot: Q = Y first^T second^T, and L^+.
  double *first = nullptr, *second = nullptr, *chol_inv = nullptr;

  // State; absent in prepare.
  void *exp_avg = nullptr, *second_moment = nullptr, *partner_basis = nullptr;
  int64_t* step = nullptr;
  double* guard = nullptr;

  // Found on the way.
  double* change = nullptr;  // C
  bool unchanged = false;    // C is exactly I
  double* wide_q = nullptr;  // Q before it is rounded to the state, where `early`
  double guard_before = 0;
  double bias1 = 1, bias2 = 1;
  double bound_inv = 0;  // bound of v / m~^2 on bias-corrected moments, inverted
  bool early = false;    // one of the first two steps: P is of rank one or two
};

inline int64_t packed_length(int64_t rank) { return rank * (rank + 1) / 2; }

// The loops that are worth vectorising, compiled once per instruction set.
struct Kernels {
  const char* name;
  // Fill a panel of transformed rows and add Y^T Y to out (r x r). Null: no transform.
  void (*gram)(const Matrix& y, const double* first, double* out);
  // Return the squared norm of grad L^-T / s.
  double (*gradient_norm)(const Side& side);
  // Write Q to the state, and Q_prev^T Q and whether they are equal to the side.
  void (*basis)(Side& side);
  // Advance the moments of a block of rows and move it.
  void (*rows)(const Side& side, int64_t row, int64_t count);
};

// Memory of this thread, one block per purpose, aligned to 64 bytes; it grows and is kept.
void* thread_scratch(int purpose, int64_t bytes);
constexpr int kPurposes = 16;

// nullptr where the compiler cannot build this instruction set.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

// The fastest set that this processor runs; ATEN_CPU_CAPABILITY lowers it, as it does torch's own.
const Kernels& kernels();

// Factor the Gram matrix of the partner, and that of its first basis; fills first, second,
// chol_inv.
void solve(const Side& side, const Kernels& kernels);

}  // namespace loft
