// The products of routed tokens with the matrices of their experts, all experts in one call. The reference is
// expert_products/reference.py; tests compare the two. N routed tokens sorted by expert, E experts, X and Y widths.
//
// Made for many small experts: a product of 64 rows with 256 x 96 takes less time than the call of a library. Sums are
// fp32, in the order of the depth and whatever the number of threads or rows, and are rounded once.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "panels.h"

namespace {

using namespace qsparse_moe;

// A unit of work: one panel of the result's columns of one expert.
struct Task {
  int64_t expert, first_row, num_rows, first_column, columns;
  int vectors;
};

std::vector<Task> make_tasks(const at::Tensor& counts, int64_t columns) {
  const int64_t* count = counts.const_data_ptr<int64_t>();
  std::vector<Task> tasks;
  int64_t first_row = 0;
  const int most = vectors_per_panel(columns);
  for (int64_t expert = 0; expert < counts.numel(); first_row += count[expert++])
    for (int64_t column = 0; column < columns; column += most * kLanes) {
      const int64_t remaining = std::min<int64_t>(columns - column, most * kLanes);
      tasks.push_back({expert, first_row, count[expert], column, remaining, int((remaining + kLanes - 1) / kLanes)});
    }
  return tasks;
}

int64_t unit_size(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16 ? 2 : 1; }

template <typename Unit>
void multiply(at::TensorList lefts, at::TensorList weights, const at::Tensor& counts, bool transposed,
              const at::Tensor& out) {
  using Bits = typename Unit::Storage::Bits;
  constexpr int64_t per_unit = 4 / sizeof(Bits);
  const int num_terms = int(lefts.size());
  const int64_t width = out.size(1), inner = lefts[0].size(1), depth = inner / per_unit;
  const auto tasks = make_tasks(counts, width);
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    std::vector<uint32_t> panels(num_terms * depth * kMostVectors * kLanes);
    std::vector<const uint32_t*> left(lefts[0].size(0) * num_terms);
    std::vector<const uint16_t*> weight_rows(inner);
    std::vector<Term> terms(num_terms);
    for (size_t number = next++; number < tasks.size(); number = next++) {
      const Task& task = tasks[number];
      if (!task.num_rows) continue;
      const int64_t panel_width = task.vectors * kLanes;
      for (int term = 0; term < num_terms; ++term) {
        uint32_t* panel = panels.data() + term * depth * panel_width;
        const uint32_t** pointers = left.data() + term * task.num_rows;
        const auto* rows = static_cast<const Bits*>(lefts[term].const_data_ptr());
        for (int64_t row = 0; row < task.num_rows; ++row)
          pointers[row] = reinterpret_cast<const uint32_t*>(rows + (task.first_row + row) * lefts[term].stride(0));
        const auto* matrix =
            static_cast<const Bits*>(weights[term].const_data_ptr()) + task.expert * weights[term].stride(0);
        if (transposed) {
          pack_columns(reinterpret_cast<const uint32_t*>(matrix + task.first_column * inner), depth, depth,
                       task.columns, panel_width, panel);
        } else if constexpr (per_unit == 1) {
          pack_rows(matrix + task.first_column, width, depth, task.columns, panel_width, panel);
        } else {
          for (int64_t row = 0; row < inner; ++row) weight_rows[row] = matrix + row * width;
          pack_row_pairs(weight_rows.data(), inner, task.first_column, task.columns, panel_width, panel);
        }
        terms[term] = {pointers, panel};
      }
      auto* result = static_cast<Bits*>(out.mutable_data_ptr()) + task.first_row * width + task.first_column;
      all_blocks<Unit, false>(task.vectors, terms.data(), num_terms, task.num_rows, depth, result, width, task.columns);
    }
  });
}

template <typename Unit>
void multiply_transposed_rows(const at::Tensor& rows, const at::Tensor& grads, const at::Tensor& counts,
                              const at::Tensor& out) {
  using Bits = typename Unit::Storage::Bits;
  constexpr int64_t per_unit = 4 / sizeof(Bits);
  const int64_t height = out.size(1), width = out.size(2);
  const auto tasks = make_tasks(counts, width);
  std::atomic<size_t> next{0};
  const auto* row_values = static_cast<const Bits*>(rows.const_data_ptr());
  const auto* grad_values = static_cast<const Bits*>(grads.const_data_ptr());
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    std::vector<uint32_t> panel, pairs;
    std::vector<const uint32_t*> left;
    std::vector<const Bits*> sources;
    int64_t packed_expert = -1;
    for (size_t number = next++; number < tasks.size(); number = next++) {
      const Task& task = tasks[number];
      auto* result = static_cast<Bits*>(out.mutable_data_ptr()) + task.expert * height * width + task.first_column;
      if (!task.num_rows) {
        for (int64_t row = 0; row < height; ++row) std::memset(result + row * width, 0, task.columns * sizeof(Bits));
        continue;
      }
      const int64_t depth = (task.num_rows + per_unit - 1) / per_unit, panel_width = task.vectors * kLanes;
      panel.resize(depth * panel_width);
      left.resize(depth);
      const Bits* first_grad = grad_values + task.first_row * grads.stride(0);
      if constexpr (per_unit == 1) {
        for (int64_t step = 0; step < depth; ++step) left[step] = row_values + (task.first_row + step) * rows.stride(0);
        pack_rows(first_grad + task.first_column, grads.stride(0), depth, task.columns, panel_width, panel.data());
      } else {
        sources.resize(task.num_rows);
        if (packed_expert != task.expert) {
          for (int64_t row = 0; row < task.num_rows; ++row)
            sources[row] = row_values + (task.first_row + row) * rows.stride(0);
          pairs.resize(depth * height);
          pack_row_pairs(sources.data(), task.num_rows, 0, height, height, pairs.data());
          packed_expert = task.expert;
        }
        for (int64_t step = 0; step < depth; ++step) left[step] = pairs.data() + step * height;
        for (int64_t row = 0; row < task.num_rows; ++row) sources[row] = first_grad + row * grads.stride(0);
        pack_row_pairs(sources.data(), task.num_rows, task.first_column, task.columns, panel_width, panel.data());
      }
      const Term term{left.data(), panel.data()};
      all_blocks<Unit, true>(task.vectors, &term, 1, height, depth, result, width, task.columns);
    }
  });
}

void check_counts(const at::Tensor& counts, int64_t num_experts, int64_t num_rows) {
  TORCH_CHECK(counts.dim() == 1 && counts.scalar_type() == at::kLong && counts.is_contiguous() &&
                  counts.numel() == num_experts,
              "expert_products: counts must be contiguous int64, one per expert");
  int64_t total = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) total += counts.const_data_ptr<int64_t>()[expert];
  TORCH_CHECK(total == num_rows, "expert_products: the counts add up to ", total, ", but there are ", num_rows,
              " rows");
}

void check_rows(const at::Tensor& rows, const at::Tensor& like) {
  TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1 && rows.scalar_type() == like.scalar_type(),
              "expert_products: rows must be (N, X) with adjacent features, in the dtype of the weights");
}

// Call `run` with the unit of the dtype.
template <typename Run>
void by_type(at::ScalarType type, Run run) {
  if (type == at::kFloat) return run(SingleUnit());
#if defined(__AVX512BF16__)
  if (type == at::kBFloat16) return run(PairUnit());
#endif
  TORCH_CHECK(false, "expert_products: no product in ", type, " on this processor");
}

at::Tensor expert_products(at::TensorList rows, at::TensorList weights, const at::Tensor& counts, bool transposed) {
  TORCH_CHECK(rows.size() && rows.size() == weights.size(), "expert_products: one stack of weights per rows");
  const at::Tensor &first = rows[0], &first_weight = weights[0];
  TORCH_CHECK(first_weight.dim() == 3, "expert_products: weights must be (E, X, Y)");
  const int64_t inner = first_weight.size(transposed ? 2 : 1), width = first_weight.size(transposed ? 1 : 2);
  check_counts(counts, first_weight.size(0), first.size(0));
  for (size_t term = 0; term < rows.size(); ++term) {
    check_rows(rows[term], first_weight);
    TORCH_CHECK(rows[term].size(0) == first.size(0) && rows[term].size(1) == inner,
                "expert_products: rows must be (N, ", inner, ")");
    TORCH_CHECK(weights[term].sizes() == first_weight.sizes() && weights[term].is_contiguous() &&
                    weights[term].scalar_type() == first_weight.scalar_type(),
                "expert_products: weights must be contiguous, of one shape and dtype");
  }
  TORCH_CHECK(inner % unit_size(first) == 0, "expert_products: the inner width must be even in bf16, got ", inner);
  at::Tensor out = at::empty({first.size(0), width}, first.options());
  if (out.numel())
    by_type(first.scalar_type(), [&](auto unit) { multiply<decltype(unit)>(rows, weights, counts, transposed, out); });
  return out;
}

at::Tensor expert_outer_products(const at::Tensor& rows, const at::Tensor& grads, const at::Tensor& counts) {
  check_rows(rows, grads);
  check_rows(grads, rows);
  TORCH_CHECK(rows.size(0) == grads.size(0), "expert_products: rows and gradients must be of one number");
  check_counts(counts, counts.numel(), rows.size(0));
  at::Tensor out = at::empty({counts.numel(), rows.size(1), grads.size(1)}, rows.options());
  if (out.numel())
    by_type(rows.scalar_type(),
            [&](auto unit) { multiply_transposed_rows<decltype(unit)>(rows, grads, counts, out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qsparse_moe, library) {
  library.def("expert_products(Tensor[] rows, Tensor[] weights, Tensor counts, bool transposed) -> Tensor");
  library.def("expert_outer_products(Tensor rows, Tensor grads, Tensor counts) -> Tensor");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) {
  library.impl("expert_products", &expert_products);
  library.impl("expert_outer_products", &expert_outer_products);
}
