#include "step.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>

namespace loft {
namespace {

// Run f(0) .. f(count - 1) on PyTorch's threads. Whoever is free takes the next item: items differ
// in cost, and none depends on who computes it, nor on how many there are to share the work.
template <class F>
void for_each_item(int64_t count, const F& f) {
  struct Shared {
    const F& f;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::exception_ptr error{};
    std::mutex guard{};
  } shared{f, count};
  const auto work = [](int64_t, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    try {
      for (int64_t i; (i = s.next++) < s.count;) s.f(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(s.guard);
      s.error = std::current_exception();
    }
  };
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  const int64_t workers = std::min<int64_t>(count, threads);
  if (workers <= 1)
    work(0, 1, &shared);
  else if (torch_parallel_for(0, workers, 1, work, &shared))
    throw std::runtime_error("loft_kernels: PyTorch's parallel_for failed");
  if (shared.error) std::rethrow_exception(shared.error);
}

// The bound m~^2 <= guard v after one more step (update_guard of reference.py).
double updated_guard(double guard, double beta1, double beta2) {
  const double fresh = (1 - beta1) * (1 - beta1) / (1 - beta2);
  if (guard == 0 || beta1 == 0) return fresh;
  if (beta2 == 0) return std::numeric_limits<double>::infinity();
  return fresh + guard * beta1 * beta1 / beta2;
}

// 1 - beta^step without cancellation for betas close to 1.
double bias_correction(double beta, int64_t step) {
  return beta > 0 ? -std::expm1(static_cast<double>(step) * std::log(beta)) : 1.0;
}

// Count the step: what depends on it, and on nothing else of the data.
void advance_count(Side& side) {
  side.early = *side.step < 2;
  side.guard_before = *side.guard;
  *side.step += 1;
  *side.guard = updated_guard(side.guard_before, side.beta1, side.beta2);
  side.bias1 = bias_correction(side.beta1, *side.step);
  side.bias2 = bias_correction(side.beta2, *side.step);
  side.bound_inv = side.bias1 * side.bias1 / (*side.guard * side.bias2);
}

}  // namespace

std::vector<double> prepare(const std::vector<Side>& sides) {
  const Kernels& use = kernels();
  std::vector<double> norms(sides.size(), 0.0);
  for_each_item(static_cast<int64_t>(sides.size()), [&](int64_t i) {
    if (!sides[i].grad.data) return;
    solve(sides[i], use);
    norms[i] = use.gradient_norm(sides[i]);
  });
  return norms;
}

void apply(std::vector<Side>& sides) {
  const Kernels& use = kernels();
  std::vector<std::vector<double>> space(sides.size());
  for_each_item(static_cast<int64_t>(sides.size()), [&](int64_t i) {
    Side& side = sides[i];
    if (!side.grad.data) return;
    advance_count(side);
    const int64_t square = side.rank * side.rank;
    const bool keep_q = side.moving && side.early;
    space[i].resize(square + (keep_q ? side.partner.rows * side.rank : 0));
    side.change = space[i].data();
    side.wide_q = keep_q ? side.change + square : nullptr;
    use.basis(side);
  });
  // All reads of both factors are done; long items first, so that none is left to a lone thread.
  struct Item {
    const Side* side;
    int64_t row;
  };
  std::vector<Item> items;
  for (const bool moving : {true, false})
    for (const Side& side : sides)
      for (int64_t row = 0; side.grad.data && side.moving == moving && row < side.factor.rows;
           row += kRows)
        items.push_back({&side, row});
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const auto [side, row] = items[i];
    use.rows(*side, row, std::min(kRows, side->factor.rows - row));
  });
}

}  // namespace loft
