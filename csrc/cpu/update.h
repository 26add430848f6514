// update: Adam's step in every entry of the virtual weight, projected back onto the factor.
//
// Streams over panels of Q. Per row block: P once packed for the tile product, per panel the
// pairwise products of Q's columns, then v, m~, the step and its contraction with Q out of cache.

constexpr int64_t kStrips = 4;  // tile widths that share one pass of the projection

// Q's columns as strip x r x width; columns beyond r (to a multiple of 4) and rows beyond n are 0.
template <class T, class S>
void load_strip(const S* q, int64_t rank, int64_t count, T* out) {
  constexpr int64_t width = tile_width<T>;
  for (int64_t a = 0; a < rank; ++a)
    for (int64_t l = 0; l < width; ++l)
      out[a * width + l] = l < count ? static_cast<T>(q[l * rank + a]) : T(0);
  for (int64_t k = rank * width; k < round_up(rank, 4) * width; ++k) out[k] = 0;
}

// Rows of Q such that Q_j P Q_j^T is a dot product with packed P: off-diagonals count twice.
template <class T>
void expand_strip(const T* strip, int64_t rank, T* out) {
  constexpr int64_t width = tile_width<T>, step = Lanes<T>::count;
  for (int64_t a = 0; a < rank; ++a)
    for (int64_t l = 0; l < width; l += step) {
      const Vec<T> own = lanes_at(strip + a * width + l), twice = own + own;
      T* to = out + (a * rank - a * (a - 1) / 2) * width + l;
      lanes_at(to) = own * own;
      for (int64_t b = a + 1; b < rank; ++b)
        lanes_at(to + (b - a) * width) = twice * lanes_at(strip + b * width + l);
    }
}

// D = m~ / (sqrt(max(v, m~^2 / bound)) + eps) with x / 0 = 0, for one tile.
template <class T>
inline void step_tile(const Operands<T>& block, int64_t group, const T* strip, const T* products,
                      T eps, T bound_inv, T* out) {
  constexpr int64_t width = tile_width<T>, step = Lanes<T>::count;
  const int64_t rank = block.rank, place = group * rank * kTall;
  Vec<T> m[kTall][kWide], v[kTall][kWide];
  if (block.residual) {
    const int64_t length = packed_length(rank);
    tile_product(block.residual + group * length * kTall, kTall, products, width, length, v);
    tile_product(block.m + place, kTall, strip, width, rank, m);
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kWide; ++j) {
        const Vec<T> root = block.share[group * kTall + i] * m[i][j];
        v[i][j] += root * root;
      }
  } else {
    tile_product(block.roots[0] + place, kTall, strip, width, rank, m);
    tile_product(block.roots[1] + place, kTall, strip, width, rank, v);
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kWide; ++j) v[i][j] = m[i][j] * m[i][j] + v[i][j] * v[i][j];
    tile_product(block.m + place, kTall, strip, width, rank, m);
  }
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kWide; ++j) {
      const Vec<T> least = m[i][j] * m[i][j] * bound_inv;
      const Vec<T> root = square_root(least > v[i][j] ? least : v[i][j]) + eps;
      lanes_at(out + i * width + j * step) = root > Vec<T>{} ? m[i][j] / root : Vec<T>{};
    }
}

// sums[i][k] += D[i] . Q[k] by lanes, for kTall rows of one group and all strips.
template <class T>
inline void project(const T* steps, int64_t stride_steps, const T* strips, int64_t padded,
                    int64_t count, T* sums) {
  constexpr int64_t width = tile_width<T>, step = Lanes<T>::count;
  constexpr int tall = LOFT_VECTOR_BYTES == 64 ? kTall : 2;
  for (int64_t top = 0; top < kTall; top += tall)
    for (int64_t k = 0; k < padded; k += 4) {
      Vec<T> acc[tall][4];
      for (int i = 0; i < tall; ++i)
        for (int b = 0; b < 4; ++b)
          acc[i][b] = lanes_at(sums + ((top + i) * padded + k + b) * step);
      for (int64_t s = 0; s < count; ++s)
        for (int64_t l = 0; l < width; l += step) {
          Vec<T> q[4];
          for (int b = 0; b < 4; ++b) q[b] = lanes_at(strips + (s * padded + k + b) * width + l);
          for (int i = 0; i < tall; ++i) {
            const Vec<T> d = lanes_at(steps + s * stride_steps + (top + i) * width + l);
            for (int b = 0; b < 4; ++b) acc[i][b] += d * q[b];
          }
        }
      for (int i = 0; i < tall; ++i)
        for (int b = 0; b < 4; ++b)
          lanes_at(sums + ((top + i) * padded + k + b) * step) = acc[i][b];
    }
}

// D Q for a row block, rows x r in fp64.
template <class T, class S>
void virtual_adam_projection(const Side& side, const Operands<T>& block, const S* q,
                             double* projected) {
  constexpr int64_t width = tile_width<T>, step = Lanes<T>::count;
  const int64_t rank = block.rank, padded = round_up(rank, 4), q_rows = side.partner.rows;
  const T eps = static_cast<T>(side.eps), bound_inv = static_cast<T>(side.bound_inv);
  T* strips = scratch<T, 8>(kStrips * padded * width);
  T* products = scratch<T, 9>(packed_length(rank) * width);
  T* steps = scratch<T, 10>(kStrips * kRows * width);
  T* sums = scratch<T, 11>(block.groups * kTall * padded * step);
  for (int64_t k = 0; k < block.groups * kTall * padded * step; ++k) sums[k] = 0;
  for (int64_t first = 0; first < q_rows; first += kStrips * width) {
    int64_t count = 0;
    for (; count < kStrips && first + count * width < q_rows; ++count) {
      const int64_t row = first + count * width, left = q_rows - row;
      T* strip = strips + count * padded * width;
      load_strip(q + row * rank, rank, left < width ? left : width, strip);
      if (block.residual) expand_strip(strip, rank, products);
      for (int64_t group = 0; group < block.groups; ++group)
        step_tile(block, group, strip, products, eps, bound_inv,
                  steps + (count * kRows + group * kTall) * width);
    }
    for (int64_t group = 0; group < block.groups; ++group)
      project(steps + group * kTall * width, kRows * width, strips, padded, count,
              sums + group * kTall * padded * step);
  }
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t k = 0; k < rank; ++k)
      projected[i * rank + k] = sum_lanes<T>(lanes_at(sums + (i * padded + k) * step));
}

// X <- (1 - lr wd) X - (lr / s) D Q L^-1, in the master where there is one.
template <class S>
void move_rows(const Side& side, int64_t row, int64_t count, const double* projected) {
  const int64_t rank = side.rank;
  const double lr = static_cast<S>(side.lr);
  const double keep = 1 - lr * side.weight_decay, rate = lr / side.scaling;
  double* direction = scratch<double, 12>(rank);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t a = 0; a < rank; ++a) direction[a] = 0;
    for (int64_t k = 0; k < rank; ++k)
      for (int64_t a = 0; a < rank; ++a)
        direction[a] += projected[i * rank + k] * side.chol_inv[k * rank + a];
    for (int64_t a = 0; a < rank; ++a) {
      const int64_t place = (row + i) * side.factor.stride_row + a * side.factor.stride_col;
      if (!side.master.data) {
        S& x = static_cast<S*>(side.factor.data)[place];
        x = static_cast<S>(static_cast<double>(x) * keep - direction[a] * rate);
        continue;
      }
      uint16_t& x = static_cast<uint16_t*>(side.factor.data)[place];
      float& master = static_cast<float*>(
          side.master.data)[(row + i) * side.master.stride_row + a * side.master.stride_col];
      // Someone may have changed the parameter since the master was rounded.
      const float now = widened(x, side.factor.dtype);
      if (widened(narrowed(master, side.factor.dtype), side.factor.dtype) != now) master = now;
      master = static_cast<float>(static_cast<double>(master) * keep - direction[a] * rate);
      x = narrowed(master, side.factor.dtype);
    }
  }
}

// Move a row block by the step that the operands describe.
template <class S, class T, class Basis>
void update(const Side& side, int64_t row, const Operands<T>& operands, const Basis* q) {
  double* projected = scratch<double, 14>(kRows * side.rank);
  virtual_adam_projection(side, operands, q, projected);
  move_rows<S>(side, row, operands.rows, projected);
}
