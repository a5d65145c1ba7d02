// Row top-K by magnitude on a CPU. The definition is sparsity.topk.topk_mask; tests hold the two together.
//
// A magnitude is the row's bit pattern without its sign, read as an unsigned integer: the order of the integers is the
// order of the magnitudes, and NaN lies above infinity, so a NaN is kept and seen, never dropped. The K-th largest is
// found bit by bit from the top: a bit stays set while at least K magnitudes reach the value so far. The search ends
// early where exactly K reach it.

#pragma once

#include <cstdint>
#include <type_traits>

namespace qsparse_moe {

template <typename Bits>
struct Threshold {
  Bits value;
  int64_t reached;  // how many magnitudes are >= value; at least K
};

// Magnitudes have no sign bit, so that they may be compared as signed integers, which AVX2 has an instruction for.
template <typename Bits>
bool reaches(Bits magnitude, Bits bound) {
  using Signed = std::make_signed_t<Bits>;
  return Signed(magnitude) >= Signed(bound);
}

// The accumulator has the lanes of the data, so that the compiler keeps one vector of counts.
template <typename Bits, typename Length>
int64_t count_at_least(const Bits* magnitude, Length length, Bits bound) {
  Bits count = 0;
  for (int64_t i = 0; i < length; ++i) count += reaches(magnitude[i], bound);
  return count;
}

template <typename Bits, typename Length>
Threshold<Bits> find_threshold(const Bits* magnitude, Length length, int64_t num_kept) {
  Bits all_bits = 0;
  for (int64_t i = 0; i < length; ++i) all_bits |= magnitude[i];
  Threshold<Bits> found{0, length};
  // A ReLU before the selection leaves many zeros: where no more than K values are not zero, all of those are kept.
  const int64_t nonzero = count_at_least(magnitude, length, Bits(1));
  if (nonzero == num_kept) return {1, nonzero};
  if (nonzero < num_kept) return found;
  for (int bit = 8 * sizeof(Bits) - 2; bit >= 0 && found.reached != num_kept; --bit) {
    const Bits step = Bits(1) << bit;
    if (!(all_bits & step)) continue;
    const Bits candidate = found.value | step;
    const int64_t reached = count_at_least(magnitude, length, candidate);
    if (reached >= num_kept) found = {candidate, reached};
  }
  return found;
}

// Write what is kept of `row` to `kept`, and to `mask`, unless it is null, which; `magnitude` is room for a row. No two
// of them may overlap. `length` is an int64_t, or a std::integral_constant of one, which fixes the length of the loops.
template <typename Bits, typename Length>
void select_row(const Bits* __restrict row, Bits* __restrict kept, bool* __restrict mask, Bits* __restrict magnitude,
                Length length, int64_t num_kept) {
  constexpr Bits no_sign = Bits(~Bits(0)) >> 1;
  for (int64_t i = 0; i < length; ++i) magnitude[i] = row[i] & no_sign;
  const Threshold<Bits> threshold = find_threshold(magnitude, length, num_kept);
  const Bits bound = threshold.value;
  if (bound == 0 && !mask) {
    for (int64_t i = 0; i < length; ++i) kept[i] = row[i];
    return;
  }
  int64_t surplus = threshold.reached - num_kept;
  // Ties at the threshold go to the lower index: from the right end, drop as many as are too many.
  for (int64_t i = length - 1; bound > 0 && surplus > 0; --i) {
    if (magnitude[i] == bound) {
      magnitude[i] = 0;
      --surplus;
    }
  }
  // A threshold of 0 keeps everything that is not zero, and the first zeros that there is room for.
  if (bound == 0) {
    int64_t room = num_kept;
    for (int64_t i = 0; i < length; ++i) room -= magnitude[i] > 0;
    for (int64_t i = 0; i < length; ++i) mask[i] = magnitude[i] > 0 || room-- > 0;
    mask = nullptr;
  }
  for (int64_t i = 0; i < length; ++i) {
    const Bits value = row[i];  // read in any case: no vectors of 16-bit values are read under a condition
    kept[i] = reaches(magnitude[i], bound) ? value : Bits(0);
  }
  if (mask)
    for (int64_t i = 0; i < length; ++i) mask[i] = reaches(magnitude[i], bound);
}

}  // namespace qsparse_moe
