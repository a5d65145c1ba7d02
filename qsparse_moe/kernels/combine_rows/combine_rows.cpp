// The weighted sum of the rows of each token on a CPU: one pass over memory forward and one backward. The reference is
// combine_rows/reference.py; tests compare the two. The arithmetic is fp32 (fp64 for fp64), rounded once.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../storage_types.h"

namespace {

using qsparse_moe::BFloat16;
using qsparse_moe::Float16;
using qsparse_moe::Float32;
using qsparse_moe::Float64;

// The width may be 0.
int64_t rows_at_least(int64_t width) { return 1 + 16384 / (width + 1); }

template <typename Type>
void sum_tokens(const at::Tensor& rows, const int64_t* row_of_choice, const at::Tensor& weights, const at::Tensor& out,
                int64_t choices) {
  using Bits = typename Type::Bits;
  using Wide = typename Type::Wide;
  const auto* values = static_cast<const Bits*>(rows.const_data_ptr());
  const auto* factors = weights.defined() ? static_cast<const Wide*>(weights.const_data_ptr()) : nullptr;
  auto* sums = static_cast<Bits*>(out.mutable_data_ptr());
  const int64_t width = out.size(1);
  at::parallel_for(0, out.size(0), rows_at_least(width), [&](int64_t begin, int64_t end) {
    std::vector<Wide> total(width);
    for (int64_t token = begin; token < end; ++token) {
      std::fill(total.begin(), total.end(), Wide(0));
      for (int64_t slot = token * choices; slot < (token + 1) * choices; ++slot) {
        const Bits* row = values + row_of_choice[slot] * width;
        const Wide factor = factors ? factors[slot] : Wide(1);
        for (int64_t i = 0; i < width; ++i) total[i] += factor * Type::widen(row[i]);
      }
      for (int64_t i = 0; i < width; ++i) sums[token * width + i] = Type::narrow(total[i]);
    }
  });
}

template <typename Type>
void row_grads(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& weights, const int64_t* slot_of_row,
               const at::Tensor& grad_rows, const at::Tensor& grad_weights) {
  using Bits = typename Type::Bits;
  using Wide = typename Type::Wide;
  const auto* upstream = static_cast<const Bits*>(grad.const_data_ptr());
  const auto* values = static_cast<const Bits*>(rows.const_data_ptr());
  const auto* factors = static_cast<const Wide*>(weights.const_data_ptr());
  auto* by_rows = static_cast<Bits*>(grad_rows.mutable_data_ptr());
  auto* by_weights = static_cast<Wide*>(grad_weights.mutable_data_ptr());
  const int64_t width = rows.size(1), choices = weights.size(1);
  at::parallel_for(0, rows.size(0), rows_at_least(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = slot_of_row[row];
      const Bits *above = upstream + slot / choices * width, *value = values + row * width;
      Bits* out = by_rows + row * width;
      const Wide factor = factors[slot];
      Wide dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < width; ++i) {
        const Wide wide = Type::widen(above[i]);
        dot += wide * Type::widen(value[i]);
        out[i] = Type::narrow(factor * wide);
      }
      by_weights[slot] = dot;
    }
  });
}

template <typename Function>
void by_type(at::ScalarType type, Function&& function) {
  switch (type) {
    case at::kFloat:
      return function(Float32{});
    case at::kDouble:
      return function(Float64{});
    case at::kBFloat16:
      return function(BFloat16{});
    case at::kHalf:
      return function(Float16{});
    default:
      TORCH_CHECK(false, "combine_rows: rows must be fp16, bf16, fp32 or fp64, got ", type);
  }
}

void check(const at::Tensor& rows, const at::Tensor& indices, const at::Tensor& weights) {
  TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "combine_rows: rows must be contiguous (N, D)");
  TORCH_CHECK(indices.is_contiguous() && indices.scalar_type() == at::kLong,
              "combine_rows: indices must be contiguous int64");
  const auto wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(!weights.defined() || (weights.is_contiguous() && weights.scalar_type() == wide),
              "combine_rows: weights must be contiguous ", wide);
}

at::Tensor combine_rows_forward(const at::Tensor& rows, const at::Tensor& row_of_choice,
                                const std::optional<at::Tensor>& weights) {
  const at::Tensor factors = weights.value_or(at::Tensor());
  check(rows, row_of_choice, factors);
  TORCH_CHECK(row_of_choice.dim() == 2 && (!weights || factors.sizes() == row_of_choice.sizes()),
              "combine_rows: the row of every choice and its weight must be (T, A)");
  at::Tensor out = at::empty({row_of_choice.size(0), rows.size(1)}, rows.options());
  by_type(rows.scalar_type(), [&](auto type) {
    sum_tokens<decltype(type)>(rows, row_of_choice.const_data_ptr<int64_t>(), factors, out, row_of_choice.size(1));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& grad, const at::Tensor& rows,
                                                         const at::Tensor& weights, const at::Tensor& slot_of_row) {
  check(rows, slot_of_row, weights);
  TORCH_CHECK(weights.dim() == 2 && slot_of_row.numel() == rows.size(0) && grad.is_contiguous() &&
                  grad.scalar_type() == rows.scalar_type() && grad.dim() == 2 && grad.size(0) == weights.size(0) &&
                  grad.size(1) == rows.size(1),
              "combine_rows: the gradient must be contiguous (T, D), the slots (N), the weights (T, A)");
  at::Tensor grad_rows = at::empty(rows.sizes(), rows.options());
  // Zeros, because no row writes the gradient of a choice without a row.
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  by_type(rows.scalar_type(), [&](auto type) {
    row_grads<decltype(type)>(grad, rows, weights, slot_of_row.const_data_ptr<int64_t>(), grad_rows, grad_weights);
  });
  return {grad_rows, grad_weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qsparse_moe, library) {
  library.def("combine_rows_forward(Tensor rows, Tensor row_of_choice, Tensor? weights) -> Tensor");
  library.def(
      "combine_rows_backward(Tensor grad, Tensor rows, Tensor weights, Tensor slot_of_row) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) {
  library.impl("combine_rows_forward", &combine_rows_forward);
  library.impl("combine_rows_backward", &combine_rows_backward);
}
