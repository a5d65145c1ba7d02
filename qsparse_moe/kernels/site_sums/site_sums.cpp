// The sums and the pattern of the rows of a site, each in one pass over memory on a CPU. The references are row_sums
// and row_pattern of sparsity/stats.py; tests compare them. Sums are fp32, or fp64 for fp64 rows.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace {

template <typename Value>
using Wide = std::conditional_t<std::is_same_v<Value, double>, double, float>;

at::Tensor new_sums(const at::Tensor& like, int64_t fields, int64_t num_rows) {
  return at::empty({fields, num_rows}, like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

void check_rows(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "site_sums: rows must be (N, D) and contiguous");
}

int64_t grain(int64_t length) { return 1 + 16384 / std::max<int64_t>(length, 1); }

// Blocks are summed in fp64, so that the error does not grow with the length of the row.
constexpr int64_t kSumBlock = 128;

template <typename Value>
void sum_rows(const Value* before, const Value* after, int64_t num_rows, int64_t length, Wide<Value>* sums) {
  using W = Wide<Value>;
  at::parallel_for(0, num_rows, grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Value *x = before + row * length, *y = after + row * length;
      double nonzeros = 0, energies = 0, kept_energies = 0;
      for (int64_t start = 0; start < length; start += kSumBlock) {
        const int64_t stop = std::min(start + kSumBlock, length);
        W nonzero = 0, energy = 0, kept_energy = 0;
#pragma omp simd reduction(+ : nonzero, energy, kept_energy)
        for (int64_t i = start; i < stop; ++i) {
          const W a = W(x[i]), b = W(y[i]);
          nonzero += b != 0 ? W(1) : W(0);
          energy += a * a;
          kept_energy += b * b;
        }
        nonzeros += nonzero;
        energies += energy;
        kept_energies += kept_energy;
      }
      sums[row] = W(nonzeros);
      sums[num_rows + row] = W(energies);
      sums[2 * num_rows + row] = W(kept_energies);
    }
  });
}

at::Tensor site_row_sums(const at::Tensor& before, const at::Tensor& after) {
  check_rows(before);
  check_rows(after);
  TORCH_CHECK(before.sizes() == after.sizes() && before.scalar_type() == after.scalar_type(),
              "site_sums: both must have one shape and dtype");
  const int64_t num_rows = after.size(0), length = after.size(1);
  at::Tensor sums = new_sums(after, 3, num_rows);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, after.scalar_type(), "site_row_sums", [&] {
    sum_rows<scalar_t>(before.const_data_ptr<scalar_t>(), after.const_data_ptr<scalar_t>(), num_rows, length,
                       sums.mutable_data_ptr<Wide<scalar_t>>());
  });
  return sums;
}

template <typename Value>
void pattern_of_rows(const Value* data, int64_t num_rows, int64_t length, Wide<Value>* smallest, Wide<Value>* common) {
  using W = Wide<Value>;
  constexpr W none = std::numeric_limits<W>::infinity();
  at::parallel_for(0, num_rows, grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Value* x = data + row * length;
      const Value* next = row + 1 < num_rows ? x + length : nullptr;
      W least = none, both = 0;
#pragma omp simd reduction(min : least)
      for (int64_t i = 0; i < length; ++i) {
        const W magnitude = std::abs(W(x[i]));
        // Only nonzero features count as selected ones: a ReLU leaves rows with fewer than K of them.
        const W candidate = magnitude == 0 ? none : magnitude;
        least = candidate < least ? candidate : least;
      }
      if (next) {
#pragma omp simd reduction(+ : both)
        for (int64_t i = 0; i < length; ++i) both += (W(x[i]) != 0) & (W(next[i]) != 0) ? W(1) : W(0);
      }
      smallest[row] = least == none ? W(0) : least;
      common[row] = both;
    }
  });
}

// Threads divide the columns between them, so no two write the same flag.
template <typename Value>
void flag_used(const Value* data, int64_t length, const int64_t* rows, const int64_t* experts, int64_t num_readings,
               bool* used) {
  at::parallel_for(0, length, 256, [&](int64_t begin, int64_t end) {
    for (int64_t reading = 0; reading < num_readings; ++reading) {
      const Value* x = data + (rows ? rows[reading] : reading) * length;
      bool* flags = used + (experts ? experts[reading] : 0) * length;
      for (int64_t i = begin; i < end; ++i) flags[i] |= Wide<Value>(x[i]) != 0;
    }
  });
}

const int64_t* indices(const std::optional<at::Tensor>& x) {
  if (!x) return nullptr;
  TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kLong, "site_sums: indices must be contiguous int64");
  return x->const_data_ptr<int64_t>();
}

std::tuple<at::Tensor, at::Tensor> site_row_pattern(const at::Tensor& after, const std::optional<at::Tensor>& row,
                                                    const std::optional<at::Tensor>& expert, int64_t num_experts) {
  check_rows(after);
  const int64_t num_rows = after.size(0), length = after.size(1);
  const int64_t num_readings = row ? row->numel() : num_rows;
  TORCH_CHECK(!expert || expert->numel() == num_readings, "site_sums: there must be one expert per reading");
  at::Tensor sums = new_sums(after, 2, num_rows);
  at::Tensor used = at::zeros({num_experts, length}, after.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, after.scalar_type(), "site_row_pattern", [&] {
    const auto* data = after.const_data_ptr<scalar_t>();
    auto* out = sums.mutable_data_ptr<Wide<scalar_t>>();
    pattern_of_rows<scalar_t>(data, num_rows, length, out, out + num_rows);
    flag_used<scalar_t>(data, length, indices(row), indices(expert), num_readings, used.mutable_data_ptr<bool>());
  });
  return {sums, used};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qsparse_moe, library) {
  library.def("site_row_sums(Tensor before, Tensor after) -> Tensor");
  library.def("site_row_pattern(Tensor after, Tensor? row, Tensor? expert, int num_experts) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) {
  library.impl("site_row_sums", &site_row_sums);
  library.impl("site_row_pattern", &site_row_pattern);
}
