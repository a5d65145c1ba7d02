// Row top-K by magnitude on a CPU. The definition is sparsity.topk.topk_mask; tests hold the two together.
//
// A magnitude is the row's bit pattern without its sign, read as an unsigned integer: the order of the integers is the
// order of the magnitudes, and NaN lies above infinity, so a NaN is kept and seen, never dropped. The K-th largest is
// found bit by bit from the top: a bit stays set while at least K magnitudes reach the value so far. The search ends
// early where exactly K reach it.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstdint>
#include <vector>

namespace {

template <typename Bits>
struct Threshold {
  Bits value;
  int64_t reached;  // how many magnitudes are >= value; at least K
};

// The accumulator has the lanes of the data, so that the compiler keeps one vector of counts.
template <typename Bits>
int64_t count_at_least(const Bits* magnitude, int64_t length, Bits bound) {
  Bits count = 0;
  for (int64_t i = 0; i < length; ++i) count += magnitude[i] >= bound;
  return count;
}

template <typename Bits>
Threshold<Bits> find_threshold(const Bits* magnitude, int64_t length, int64_t num_kept) {
  Bits all_bits = 0;
  for (int64_t i = 0; i < length; ++i) all_bits |= magnitude[i];
  Threshold<Bits> found{0, length};
  for (int bit = 8 * sizeof(Bits) - 2; bit >= 0 && found.reached != num_kept; --bit) {
    const Bits step = Bits(1) << bit;
    if (!(all_bits & step)) continue;
    const Bits candidate = found.value | step;
    const int64_t reached = count_at_least(magnitude, length, candidate);
    if (reached >= num_kept) found = {candidate, reached};
  }
  return found;
}

template <typename Bits>
void select_row(const Bits* row, Bits* kept, bool* mask, Bits* magnitude, int64_t length, int64_t num_kept) {
  constexpr Bits no_sign = Bits(~Bits(0)) >> 1;
  for (int64_t i = 0; i < length; ++i) magnitude[i] = row[i] & no_sign;
  const Threshold<Bits> threshold = find_threshold(magnitude, length, num_kept);
  const Bits bound = threshold.value;
  int64_t surplus = threshold.reached - num_kept;
  // Ties at the threshold go to the lower index: from the right end, drop as many as are too many.
  for (int64_t i = length - 1; surplus > 0; --i) {
    if (magnitude[i] == bound) {
      magnitude[i] = 0;
      --surplus;
    }
  }
  // A threshold of 0 keeps zeros, which are dropped from the mask only where the loop above marked them.
  if (bound == 0 && mask) {
    int64_t room = num_kept;
    for (int64_t i = 0; i < length; ++i) room -= magnitude[i] > 0;
    for (int64_t i = 0; i < length; ++i) mask[i] = magnitude[i] > 0 || room-- > 0;
    mask = nullptr;
  }
  for (int64_t i = 0; i < length; ++i) kept[i] = magnitude[i] >= bound ? row[i] : Bits(0);
  if (mask)
    for (int64_t i = 0; i < length; ++i) mask[i] = magnitude[i] >= bound;
}

template <typename Bits>
void select_rows(const at::Tensor& x, const at::Tensor& kept, const at::Tensor& mask, int64_t num_kept,
                 const int64_t* num_kept_per_row, int64_t length) {
  const auto* rows = static_cast<const Bits*>(x.const_data_ptr());
  auto* out = static_cast<Bits*>(kept.mutable_data_ptr());
  bool* flags = mask.numel() ? mask.mutable_data_ptr<bool>() : nullptr;
  const int64_t num_rows = x.numel() / length;
  at::parallel_for(0, num_rows, 1 + 16384 / length, [&](int64_t begin, int64_t end) {
    std::vector<Bits> magnitude(length);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t offset = row * length;
      const int64_t row_kept = num_kept_per_row ? num_kept_per_row[row] : num_kept;
      select_row(rows + offset, out + offset, flags ? flags + offset : nullptr, magnitude.data(), length, row_kept);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> topk_select(const at::Tensor& x, int64_t num_kept,
                                               const std::optional<at::Tensor>& num_kept_per_row, bool with_mask) {
  const int64_t length = x.size(-1);
  TORCH_CHECK(x.is_contiguous(), "topk_select: x must be contiguous");
  TORCH_CHECK(length < 65536, "topk_select: rows must be shorter than 65536, got ", length);
  const int64_t* per_row = nullptr;
  if (num_kept_per_row) {
    TORCH_CHECK(num_kept_per_row->is_contiguous() && num_kept_per_row->scalar_type() == at::kLong &&
                    num_kept_per_row->numel() * length == x.numel(),
                "topk_select: num_kept_per_row must be contiguous int64, one a row");
    per_row = num_kept_per_row->const_data_ptr<int64_t>();
  } else {
    TORCH_CHECK(1 <= num_kept && num_kept <= length, "topk_select: num_kept must lie in [1, ", length, "], got ",
                num_kept);
  }
  at::Tensor kept = at::empty_like(x);
  at::Tensor mask = with_mask ? at::empty(x.sizes(), x.options().dtype(at::kBool)) : at::empty({0}, at::kBool);
  if (x.numel() == 0) return {kept, mask};
  switch (x.element_size()) {
    case 2:
      select_rows<uint16_t>(x, kept, mask, num_kept, per_row, length);
      break;
    case 4:
      select_rows<uint32_t>(x, kept, mask, num_kept, per_row, length);
      break;
    case 8:
      select_rows<uint64_t>(x, kept, mask, num_kept, per_row, length);
      break;
    default:
      TORCH_CHECK(false, "topk_select: x must be a 16-, 32- or 64-bit float, got ", x.scalar_type());
  }
  return {kept, mask};
}

}  // namespace

TORCH_LIBRARY(qsparse_moe, library) {
  library.def("topk_select(Tensor x, int num_kept, Tensor? num_kept_per_row, bool with_mask) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) { library.impl("topk_select", &topk_select); }
