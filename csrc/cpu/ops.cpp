// The operators loft_kernels::prepare_ and apply_, and the checks of their arguments.
//
// Lists run over the factors of all pairs, lora_B before lora_A: entry i belongs to the factor i,
// whose partner is i ^ 1. An empty gradient (numel 0) means that the factor takes no part; its
// state may then be empty, too. Only functions of libtorch's stable ABI are used.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "step.h"

namespace {

using loft::Dtype;
using loft::Matrix;
using loft::Side;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Columns of `settings`, one row per factor; backends/cpu.py writes them in this order.
enum Setting {
  kScaling,
  kDamping,
  kLr,
  kWeightDecay,
  kBeta1,
  kBeta2,
  kEps,
  kSign,
  kMoving,
  kSettings
};

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "loft_kernels: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// A name for messages: "grads[3]".
struct Name {
  const char* list;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ')';
  return out.str();
}

void require_plain(const Tensor& t, const Name& name) {
  require(t.defined(), name, " is undefined");
  require(t.is_cpu(), name, " must be on the CPU");
  require(t.layout() == torch::headeronly::Layout::Strided, name, " must be a strided tensor");
}

void require_shape(const Tensor& t, const Name& name, const std::vector<int64_t>& shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = t.size(d) == shape[d];
  std::ostringstream expected;
  for (size_t d = 0; d < shape.size(); ++d) expected << (d ? ", " : "") << shape[d];
  require(same, name, " has shape ", shape_of(t), ", expected (", expected.str(), ")");
}

// The memory of a tensor of exactly this dtype and shape, contiguous.
template <class T = void>
T* contiguous(const Tensor& t, const Name& name, ScalarType dtype, const char* dtype_name,
              const std::vector<int64_t>& shape) {
  require_plain(t, name);
  require(t.scalar_type() == dtype, name, " must be ", dtype_name);
  require_shape(t, name, shape);
  require(t.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(t.data_ptr());
}

// A floating-point matrix as rows x r; lora_A is stored as its transpose.
Matrix matrix(const Tensor& t, const Name& name, bool transposed) {
  require_plain(t, name);
  require(t.dim() == 2, name, " must be a matrix, but has shape ", shape_of(t));
  Matrix x;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      x.dtype = Dtype::f64;
      break;
    case ScalarType::Float:
      x.dtype = Dtype::f32;
      break;
    case ScalarType::Half:
      x.dtype = Dtype::f16;
      break;
    case ScalarType::BFloat16:
      x.dtype = Dtype::bf16;
      break;
    default:
      require(false, name, " must be float64, float32, float16 or bfloat16");
  }
  x.data = t.data_ptr();
  x.rows = t.size(transposed ? 1 : 0), x.cols = t.size(transposed ? 0 : 1);
  x.stride_row = t.stride(transposed ? 1 : 0), x.stride_col = t.stride(transposed ? 0 : 1);
  return x;
}

// Memory that is written must not be reached under two names.
class Overlaps {
 public:
  void add(const Tensor& t, const Name& name, bool written) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) {
      require(!written || t.size(d) < 2 || t.stride(d) != 0, name,
              " is expanded: its entries share memory");
      last += (t.size(d) - 1) * t.stride(d);
    }
    const auto start = reinterpret_cast<uintptr_t>(t.data_ptr());
    const int64_t size = static_cast<int64_t>(t.element_size());
    const int64_t outer = t.dim() == 2 ? std::max(t.stride(0), t.stride(1)) * size : 0;
    const int64_t inner = t.dim() == 2 ? t.stride(0) > t.stride(1) ? (t.size(1) - 1) * t.stride(1)
                                                                   : (t.size(0) - 1) * t.stride(0)
                                       : 0;
    spans_.push_back({start, start + (last + 1) * size, outer, (inner + 1) * size, name, written});
  }

  void check() {
    std::stable_sort(spans_.begin(), spans_.end(),
                     [](const Span& a, const Span& b) { return a.start < b.start; });
    for (size_t i = 0; i < spans_.size(); ++i)
      for (size_t k = i + 1; k < spans_.size() && spans_[k].start < spans_[i].end; ++k) {
        const Span &a = spans_[i], &b = spans_[k];
        require(!(a.written || b.written) || interleaved(a, b), a.name, " and ", b.name,
                " share memory, and one of them is written");
      }
  }

 private:
  struct Span {
    uintptr_t start, end;
    int64_t outer, inner;  // bytes between rows, bytes of a row
    Name name;
    bool written;
  };

  // Columns of one buffer that lie side by side in every row, as slices of a fused matrix do.
  static bool interleaved(const Span& a, const Span& b) {
    if (a.outer == 0 || a.outer != b.outer) return false;
    const int64_t offset = static_cast<int64_t>(b.start - a.start) % a.outer;
    return offset >= a.inner && offset + b.inner <= a.outer;
  }

  std::vector<Span> spans_;
};

void require_count(const Tensors& list, const char* name, size_t count) {
  require(list.size() == count, name, " has ", list.size(), " entries, but factors has ", count);
}

// Sides with everything that both operators read, checked.
std::vector<Side> sides_of(const Tensors& factors, const Tensors& grads, const Tensor& settings,
                           const Tensor& transforms) {
  const int64_t count = static_cast<int64_t>(factors.size());
  require(count % 2 == 0, "factors must hold pairs, lora_B before lora_A, but has ", count,
          " entries");
  require_count(grads, "grads", count);
  const double* values =
      contiguous<double>(settings, {"settings"}, ScalarType::Double, "float64", {count, kSettings});
  std::vector<Side> sides(count);
  int64_t space = 0;
  for (int64_t i = 0; i < count; ++i) {
    Side& side = sides[i];
    side.factor = matrix(factors[i], {"factors", i}, i % 2);
    side.rank = side.factor.cols;
    require(side.rank > 0, Name{"factors", i}, " has rank 0");
    side.wide = side.factor.dtype == Dtype::f64;
    space += 3 * side.rank * side.rank;
    const Side& before = sides[i - i % 2];
    require(before.rank == side.rank, Name{"factors", i - i % 2}, " has rank ", before.rank,
            ", but ", Name{"factors", i}, " has rank ", side.rank);
  }
  double* place =
      contiguous<double>(transforms, {"transforms"}, ScalarType::Double, "float64", {space});
  for (int64_t i = 0; i < count; ++i, values += kSettings) {
    Side& side = sides[i];
    side.partner = sides[i ^ 1].factor;
    const int64_t square = side.rank * side.rank;
    side.first = place, side.second = place + square, side.chol_inv = place + 2 * square;
    place += 3 * square;
    side.scaling = values[kScaling], side.damping = values[kDamping], side.lr = values[kLr];
    side.weight_decay = values[kWeightDecay], side.eps = values[kEps];
    side.beta1 = values[kBeta1], side.beta2 = values[kBeta2];
    side.coefficient = values[kSign], side.moving = values[kMoving] != 0;
    require_plain(grads[i], {"grads", i});
    if (grads[i].numel() == 0) continue;
    side.grad = matrix(grads[i], {"grads", i}, i % 2);
    require(side.grad.rows == side.factor.rows && side.grad.cols == side.rank, Name{"grads", i},
            " has shape ", shape_of(grads[i]), ", but ", Name{"factors", i}, " has shape ",
            shape_of(factors[i]));
  }
  return sides;
}

void prepare_(const Tensors factors, const Tensors grads, const Tensors steps,
              const Tensor settings, Tensor transforms, Tensor numbers) {
  const std::vector<Side> sides = sides_of(factors, grads, settings, transforms);
  const int64_t count = static_cast<int64_t>(sides.size());
  require_count(steps, "steps", count);
  double* found =
      contiguous<double>(numbers, {"numbers"}, ScalarType::Double, "float64", {count, 2});
  Overlaps overlaps;
  overlaps.add(transforms, {"transforms"}, true);
  overlaps.add(numbers, {"numbers"}, true);
  overlaps.add(settings, {"settings"}, false);
  for (int64_t i = 0; i < count; ++i) {
    overlaps.add(factors[i], {"factors", i}, false);
    overlaps.add(grads[i], {"grads", i}, false);
    found[2 * i] = found[2 * i + 1] = 0;
  }
  overlaps.check();
  for (int64_t i = 0; i < count; ++i) {
    if (!sides[i].grad.data) continue;
    found[2 * i] = static_cast<double>(
        *contiguous<int64_t>(steps[i], {"steps", i}, ScalarType::Long, "int64", {}));
  }
  const std::vector<double> norms = loft::prepare(sides);
  for (int64_t i = 0; i < count; ++i) found[2 * i + 1] = norms[i];
}

void apply_(const Tensors factors, const Tensors grads, const Tensors steps, const Tensors guards,
            const Tensors exp_avgs, const Tensors second_moments, const Tensors partner_bases,
            const Tensors masters, const Tensor settings, const Tensor transforms,
            double coefficient) {
  std::vector<Side> sides = sides_of(factors, grads, settings, transforms);
  const int64_t count = static_cast<int64_t>(sides.size());
  const std::pair<const Tensors*, const char*> lists[] = {{&factors, "factors"},
                                                          {&steps, "steps"},
                                                          {&guards, "guards"},
                                                          {&exp_avgs, "exp_avgs"},
                                                          {&second_moments, "second_moments"},
                                                          {&partner_bases, "partner_bases"},
                                                          {&masters, "masters"}};
  Overlaps overlaps;
  overlaps.add(settings, {"settings"}, false);
  overlaps.add(transforms, {"transforms"}, false);
  for (const auto& [list, name] : lists) {
    require_count(*list, name, count);
    for (int64_t i = 0; i < count; ++i) {
      require_plain((*list)[i], {name, i});
      overlaps.add((*list)[i], {name, i}, true);
    }
  }
  for (int64_t i = 0; i < count; ++i) overlaps.add(grads[i], {"grads", i}, false);
  for (int64_t i = 0; i < count; ++i) {
    Side& side = sides[i];
    if (!side.grad.data) continue;
    const int64_t rows = side.factor.rows, r = side.rank;
    const ScalarType dtype = side.wide ? ScalarType::Double : ScalarType::Float;
    const char* word = side.wide ? "float64" : "float32";
    side.coefficient *= coefficient;
    side.step = contiguous<int64_t>(steps[i], {"steps", i}, ScalarType::Long, "int64", {});
    side.guard = contiguous<double>(guards[i], {"guards", i}, ScalarType::Double, "float64", {});
    side.exp_avg = contiguous(exp_avgs[i], {"exp_avgs", i}, dtype, word, {rows, r});
    side.second_moment = contiguous(second_moments[i], {"second_moments", i}, dtype, word,
                                    {rows, loft::packed_length(r)});
    side.partner_basis =
        contiguous(partner_bases[i], {"partner_bases", i}, dtype, word, {side.partner.rows, r});
    if (side.factor.dtype != Dtype::f16 && side.factor.dtype != Dtype::bf16) continue;
    require_shape(masters[i], {"masters", i}, {rows, r});
    side.master = matrix(masters[i], {"masters", i}, false);
    require(side.master.dtype == Dtype::f32, Name{"masters", i}, " must be float32");
  }
  overlaps.check();
  loft::apply(sides);
}

std::string capability() { return loft::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(loft_kernels, m) {
  m.def(
      "prepare_(Tensor[] factors, Tensor[] grads, Tensor[] steps, Tensor settings, "
      "Tensor(a!) transforms, Tensor(b!) numbers) -> ()");
  m.def(
      "apply_(Tensor(a!)[] factors, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!)[] guards, "
      "Tensor(d!)[] exp_avgs, Tensor(e!)[] second_moments, Tensor(f!)[] partner_bases, "
      "Tensor(g!)[] masters, Tensor settings, Tensor transforms, float coefficient) -> ()");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(loft_kernels, CPU, m) {
  m.impl("prepare_", TORCH_BOX(&prepare_));
  m.impl("apply_", TORCH_BOX(&apply_));
}

STABLE_TORCH_LIBRARY_IMPL(loft_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&capability));
}
