// Gated activation, top-K selection, and row sums on a CPU, fused into one pass over memory forward and one backward.
// The reference is fused_glu/reference.py; tests compare the two. A row stays in the L1 cache between its activation,
// selection, and sums. The arithmetic is fp32 (fp64 for fp64). The selection uses the activation as it is stored.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../storage_types.h"
#include "../topk_select/select_row.h"

namespace {

using qsparse_moe::BFloat16;
using qsparse_moe::bits_as;
using qsparse_moe::Float16;
using qsparse_moe::Float32;
using qsparse_moe::Float64;

enum Activation : int64_t { kReLU2GLU = 0, kSwiGLU = 1 };

// e^x as 2^n e^r with |r| <= ln(2)/2 and the polynomial of Cephes' expf: it vectorises, while libm is a call per value.
inline float exponential(float x) {
  // Beyond these limits 2^n is no normal fp32 number: n + 127 must lie from 1 to 254.
  x = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float rounder = 12582912.0f;  // adding it rounds to an integer
  const float n = (x * 1.44269504f + rounder) - rounder;
  // ln(2) as a sum of two constants, of which the first has few bits: its product with n is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_as<float>(uint32_t(int32_t(n) + 127) << 23);
}
inline double exponential(double x) { return std::exp(x); }

template <Activation activation, typename Wide>
Wide activate(Wide gate, Wide up) {
  if constexpr (activation == kReLU2GLU) {
    // Not std::fmax, which would turn a NaN into 0.
    const Wide positive = gate < 0 ? Wide(0) : gate;
    return positive * positive * up;
  }
  return gate / (1 + exponential(-gate)) * up;
}

template <Activation activation, typename Wide>
void gradients(Wide gate, Wide up, Wide grad, Wide& grad_gate, Wide& grad_up) {
  if constexpr (activation == kReLU2GLU) {
    const Wide positive = gate < 0 ? Wide(0) : gate;
    const Wide through = grad * positive;
    grad_gate = 2 * through * up;
    grad_up = through * positive;
  } else {
    // silu(x) = x s(x) has the derivative s (1 + x (1 - s)), with s the sigmoid.
    const Wide sigmoid = 1 / (1 + exponential(-gate));
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid));
    grad_up = grad * gate * sigmoid;
  }
}

// Sums of a whole row in 8 lanes missed the error budget of the tests by a tenth (lab log of 24 November 2026).
constexpr int64_t kSumBlock = 128;

template <typename Type>
void sum_row(const typename Type::Bits* dense, const typename Type::Bits* selected, int64_t length,
             typename Type::Wide* sums, int64_t stride) {
  using Wide = typename Type::Wide;
  double nonzeros = 0, energies = 0, kept_energies = 0;
  // Blocks are summed in fp64, so that the error does not grow with the length of the row.
  for (int64_t begin = 0; begin < length; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < length ? begin + kSumBlock : length;
    Wide nonzero = 0, energy = 0, kept_energy = 0;
#pragma omp simd reduction(+ : nonzero, energy, kept_energy)
    for (int64_t i = begin; i < end; ++i) {
      const Wide before = Type::widen(dense[i]), after = Type::widen(selected[i]);
      nonzero += after != 0 ? Wide(1) : Wide(0);
      energy += before * before;
      kept_energy += after * after;
    }
    nonzeros += nonzero;
    energies += energy;
    kept_energies += kept_energy;
  }
  sums[stride] = Wide(nonzeros);
  sums[2 * stride] = Wide(energies);
  sums[3 * stride] = Wide(kept_energies);
}

// A row of gate, up, or an upstream gradient starts `stride` values after the previous one.
template <typename Bits>
struct Rows {
  const Bits* data;
  int64_t stride;
  explicit Rows(const at::Tensor& x) : data(static_cast<const Bits*>(x.const_data_ptr())), stride(x.stride(0)) {}
  const Bits* operator[](int64_t row) const { return data + row * stride; }
};

template <typename Type, Activation activation>
void forward_rows(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& selected, const at::Tensor& mask,
                  const at::Tensor& sums, int64_t num_selected, const int64_t* num_selected_per_row) {
  using Bits = typename Type::Bits;
  using Wide = typename Type::Wide;
  const Rows<Bits> gates(gate), ups(up);
  auto* out = static_cast<Bits*>(selected.mutable_data_ptr());
  bool* flags = mask.numel() ? mask.mutable_data_ptr<bool>() : nullptr;
  auto* totals = sums.numel() ? static_cast<Wide*>(sums.mutable_data_ptr()) : nullptr;
  const int64_t num_rows = gate.size(0), length = gate.size(1);
  at::parallel_for(0, num_rows, 1 + 16384 / length, [&](int64_t begin, int64_t end) {
    std::vector<Bits> dense(length), magnitude(length);
    for (int64_t row = begin; row < end; ++row) {
      const Bits *gate_row = gates[row], *up_row = ups[row];
      for (int64_t i = 0; i < length; ++i)
        dense[i] = Type::narrow(activate<activation>(Type::widen(gate_row[i]), Type::widen(up_row[i])));
      const int64_t row_num_selected = num_selected_per_row ? num_selected_per_row[row] : num_selected;
      Bits* selected_row = out + row * length;
      qsparse_moe::select_row(dense.data(), selected_row, flags ? flags + row * length : nullptr, magnitude.data(),
                              length, row_num_selected);
      if (!totals) continue;
      totals[row] = Wide(row_num_selected);
      sum_row<Type>(dense.data(), selected_row, length, totals + row, num_rows);
    }
  });
}

template <typename Type, Activation activation>
void backward_rows(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& grad, const bool* mask,
                   const at::Tensor& grad_gate, const at::Tensor& grad_up) {
  using Bits = typename Type::Bits;
  using Wide = typename Type::Wide;
  const Rows<Bits> gates(gate), ups(up), grads(grad);
  auto* gate_out = static_cast<Bits*>(grad_gate.mutable_data_ptr());
  auto* up_out = static_cast<Bits*>(grad_up.mutable_data_ptr());
  const int64_t num_rows = gate.size(0), length = gate.size(1);
  at::parallel_for(0, num_rows, 1 + 16384 / length, [&](int64_t begin, int64_t end) {
    std::vector<Bits> upstream(length);
    for (int64_t row = begin; row < end; ++row) {
      const Bits *gate_row = gates[row], *up_row = ups[row], *grad_row = grads[row];
      const bool* row_mask = mask ? mask + row * length : nullptr;
      // A loop of its own: a load under a condition would keep the next loop from being vectorised for 16-bit values.
      for (int64_t i = 0; i < length; ++i) upstream[i] = !row_mask || row_mask[i] ? grad_row[i] : Bits(0);
      Bits *gate_row_out = gate_out + row * length, *up_row_out = up_out + row * length;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        Wide by_gate, by_up;
        gradients<activation>(Type::widen(gate_row[i]), Type::widen(up_row[i]), Type::widen(upstream[i]), by_gate,
                              by_up);
        gate_row_out[i] = Type::narrow(by_gate);
        up_row_out[i] = Type::narrow(by_up);
      }
    }
  });
}

template <template <typename, Activation> class Call, Activation activation, typename... Arguments>
void by_type(at::ScalarType type, Arguments&&... arguments) {
  switch (type) {
    case at::kFloat:
      return Call<Float32, activation>::run(arguments...);
    case at::kDouble:
      return Call<Float64, activation>::run(arguments...);
    case at::kBFloat16:
      return Call<BFloat16, activation>::run(arguments...);
    case at::kHalf:
      return Call<Float16, activation>::run(arguments...);
    default:
      TORCH_CHECK(false, "fused_glu: gate must be fp16, bf16, fp32 or fp64, got ", type);
  }
}

template <template <typename, Activation> class Call, typename... Arguments>
void dispatch(int64_t activation, at::ScalarType type, Arguments&&... arguments) {
  TORCH_CHECK(activation == kReLU2GLU || activation == kSwiGLU, "fused_glu: no activation has number ", activation);
  if (activation == kReLU2GLU) return by_type<Call, kReLU2GLU>(type, arguments...);
  by_type<Call, kSwiGLU>(type, arguments...);
}

template <typename Type, Activation activation>
struct Forward {
  template <typename... Arguments>
  static void run(Arguments&&... arguments) {
    forward_rows<Type, activation>(arguments...);
  }
};

template <typename Type, Activation activation>
struct Backward {
  template <typename... Arguments>
  static void run(Arguments&&... arguments) {
    backward_rows<Type, activation>(arguments...);
  }
};

void check_rows(const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK(x.dim() == 2 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.stride(1) == 1,
              "fused_glu: gate, up and the gradient must be (N, F) of one dtype, features side by side");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_glu_forward(const at::Tensor& gate, const at::Tensor& up,
                                                                 int64_t num_selected,
                                                                 const std::optional<at::Tensor>& num_selected_per_row,
                                                                 int64_t activation, bool with_mask, bool with_sums) {
  check_rows(gate, gate);
  check_rows(up, gate);
  const int64_t num_rows = gate.size(0), length = gate.size(1);
  // select_row counts 16-bit values in 16-bit lanes.
  TORCH_CHECK(length < 65536, "fused_glu: rows must be shorter than 65536, got ", length);
  const int64_t* per_row = nullptr;
  if (num_selected_per_row) {
    TORCH_CHECK(num_selected_per_row->is_contiguous() && num_selected_per_row->scalar_type() == at::kLong &&
                    num_selected_per_row->numel() == num_rows,
                "fused_glu: num_selected_per_row must be contiguous int64, one per row");
    per_row = num_selected_per_row->const_data_ptr<int64_t>();
  } else {
    TORCH_CHECK(1 <= num_selected && num_selected <= length, "fused_glu: num_selected must lie in [1, ", length,
                "], got ", num_selected);
  }
  at::Tensor selected = at::empty({num_rows, length}, gate.options());
  at::Tensor mask = at::empty({with_mask ? num_rows : 0, length}, gate.options().dtype(at::kBool));
  const auto wide = gate.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor sums = at::empty({4, with_sums ? num_rows : 0}, gate.options().dtype(wide));
  if (selected.numel())
    dispatch<Forward>(activation, gate.scalar_type(), gate, up, selected, mask, sums, num_selected, per_row);
  return {selected, mask, sums};
}

std::tuple<at::Tensor, at::Tensor> fused_glu_backward(const at::Tensor& gate, const at::Tensor& up,
                                                      const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                                      int64_t activation) {
  check_rows(gate, gate);
  check_rows(up, gate);
  check_rows(grad, gate);
  TORCH_CHECK(!mask || (mask->is_contiguous() && mask->sizes() == gate.sizes() && mask->scalar_type() == at::kBool),
              "fused_glu: the mask must be contiguous bool of the shape of gate");
  at::Tensor grad_gate = at::empty(gate.sizes(), gate.options());
  at::Tensor grad_up = at::empty(gate.sizes(), gate.options());
  const bool* flags = mask ? mask->const_data_ptr<bool>() : nullptr;
  if (gate.numel()) dispatch<Backward>(activation, gate.scalar_type(), gate, up, grad, flags, grad_gate, grad_up);
  return {grad_gate, grad_up};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qsparse_moe, library) {
  library.def(
      "fused_glu_forward(Tensor gate, Tensor up, int num_selected, Tensor? num_selected_per_row, int activation, "
      "bool with_mask, bool with_sums) -> (Tensor, Tensor, Tensor)");
  library.def(
      "fused_glu_backward(Tensor gate, Tensor up, Tensor grad, Tensor? mask, int activation) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) {
  library.impl("fused_glu_forward", &fused_glu_forward);
  library.impl("fused_glu_backward", &fused_glu_backward);
}
