// Row top-K by magnitude on a CPU. The reference is sparsity.topk.topk_mask; tests compare the two.
//
// A magnitude is the bit pattern of a value without its sign, read as an unsigned integer: integers have the same order
// as the magnitudes, with NaN above infinity, so a NaN is always selected and stays visible. The K-th largest is
// determined bit by bit from the top: a bit stays set if at least K magnitudes reach the value so far. The search ends
// early when exactly K reach it.

#pragma once

#include <cstdint>
#include <type_traits>

namespace qsparse_moe {

template <typename Bits>
struct Threshold {
  Bits value;
  int64_t reached;  // number of magnitudes >= value; at least K
};

// Magnitudes have no sign bit, so they can be compared as signed integers, for which AVX2 has an instruction.
template <typename Bits>
bool reaches(Bits magnitude, Bits threshold) {
  using Signed = std::make_signed_t<Bits>;
  return Signed(magnitude) >= Signed(threshold);
}

// The accumulator has as many lanes as the data, so that the compiler uses one vector of counts.
template <typename Bits, typename Length>
int64_t count_at_least(const Bits* magnitude, Length length, Bits threshold) {
  Bits count = 0;
  for (int64_t i = 0; i < length; ++i) count += reaches(magnitude[i], threshold);
  return count;
}

template <typename Bits, typename Length>
Threshold<Bits> find_threshold(const Bits* magnitude, Length length, int64_t num_selected) {
  Bits all_bits = 0;
  for (int64_t i = 0; i < length; ++i) all_bits |= magnitude[i];
  Threshold<Bits> found{0, length};
  // A ReLU before the selection leaves many zeros: if at most K values are nonzero, all of them are selected.
  const int64_t nonzero = count_at_least(magnitude, length, Bits(1));
  if (nonzero == num_selected) return {1, nonzero};
  if (nonzero < num_selected) return found;
  for (int bit = 8 * sizeof(Bits) - 2; bit >= 0 && found.reached != num_selected; --bit) {
    const Bits step = Bits(1) << bit;
    // A bit that no magnitude has cannot be a bit of the threshold, and skipping it saves a pass over the row.
    if (!(all_bits & step)) continue;
    const Bits candidate = found.value | step;
    const int64_t reached = count_at_least(magnitude, length, candidate);
    if (reached >= num_selected) found = {candidate, reached};
  }
  return found;
}

// Write the selected values of `row` to `selected`, and the mask to `mask` unless it is null. `magnitude` is a buffer
// for one row. None of them may overlap. `length` is an int64_t, or a std::integral_constant of one, which fixes the
// length of the loops.
template <typename Bits, typename Length>
void select_row(const Bits* __restrict row, Bits* __restrict selected, bool* __restrict mask,
                Bits* __restrict magnitude, Length length, int64_t num_selected) {
  constexpr Bits no_sign = Bits(~Bits(0)) >> 1;
  for (int64_t i = 0; i < length; ++i) magnitude[i] = row[i] & no_sign;
  const Threshold<Bits> found = find_threshold(magnitude, length, num_selected);
  const Bits threshold = found.value;
  // Every value that is not zero is selected, and without a mask it does not matter which zeros are.
  if (threshold == 0 && !mask) {
    for (int64_t i = 0; i < length; ++i) selected[i] = row[i];
    return;
  }
  int64_t surplus = found.reached - num_selected;
  // Ties at the threshold go to the lower index: the surplus is dropped from the right end.
  for (int64_t i = length - 1; threshold > 0 && surplus > 0; --i) {
    if (magnitude[i] == threshold) {
      magnitude[i] = 0;
      --surplus;
    }
  }
  // A threshold of 0 selects all nonzero values, and the first zeros until K are selected.
  if (threshold == 0) {
    int64_t num_zeros = num_selected;
    for (int64_t i = 0; i < length; ++i) num_zeros -= magnitude[i] > 0;
    for (int64_t i = 0; i < length; ++i) mask[i] = magnitude[i] > 0 || num_zeros-- > 0;
    mask = nullptr;
  }
  for (int64_t i = 0; i < length; ++i) {
    const Bits value = row[i];  // read unconditionally: there are no conditional vector loads of 16-bit values
    selected[i] = reaches(magnitude[i], threshold) ? value : Bits(0);
  }
  if (mask)
    for (int64_t i = 0; i < length; ++i) mask[i] = reaches(magnitude[i], threshold);
}

}  // namespace qsparse_moe
