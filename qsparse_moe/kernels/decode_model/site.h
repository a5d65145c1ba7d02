// Apply a sparse site to one row and return a list of the remaining features: these are the rows of the next matrix that
// must be read. The references are sparsity.topk, sparsity.selection and sparsity.quantize; tests compare the two.
//
// A selected feature whose value is 0 is left out of the list: it changes no sum.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../topk_select/select_row.h"
#include "vector_math.h"

namespace qsparse_moe {

enum class Selection : int64_t { topk = 0, block = 1, threshold = 2, statistical = 3, relu = 4, shared = 5 };
enum class RowFormat : int64_t { none = 0, int8 = 1, int4 = 2 };
enum class Rescale : int64_t { none = 0, unit = 1, preserve = 2 };

struct SiteSettings {
  int64_t num_features = 0;
  Selection selection = Selection::topk;
  RowFormat format = RowFormat::none;
  Rescale rescale = Rescale::none;
  int64_t group_size = 0;
  std::vector<int64_t> num_selected;  // K per expert; one where all experts have the same
  std::vector<float> thresholds;      // likewise
  std::vector<int32_t> features;      // of a shared selection: as many per expert, of which the first K are selected
  bool selects_all = true;

  bool uniform() const { return num_selected.size() == 1; }
  int64_t listed_features() const { return int64_t(features.size() / num_selected.size()); }
};

// The features of a row that remain after the selection, in ascending order. Under a shared selection these are positions
// in the set of the expert, because the stored matrix has no other rows.
struct FeatureList {
  int32_t* features = nullptr;
  float* values = nullptr;
  int64_t length = 0;
  float step = 0;  // the values are whole multiples of it, from -128 to 127; 0: they are any numbers
};

// Scratch memory for one row at a time.
struct SiteScratch {
  std::vector<int32_t> magnitudes;
  std::vector<float> rounded;
  explicit SiteScratch(int64_t num_features) : magnitudes(num_features + kLanes), rounded(num_features + kLanes) {}
};

constexpr float kScaleEpsilon = 1e-30f;  // sparsity.quantize.EPSILON

// Return x rounded to the format of the site, written to `to`; x itself if the site has no format. `step`: as in FeatureList.
inline const float* rounded_row(const float* x, int64_t length, RowFormat format, float* to, float& step) {
  step = 0;
  if (format == RowFormat::none) return x;
  float scale;
  float low, high;
  if (format == RowFormat::int8) {
    float largest = 0;
    for (int64_t i = 0; i < length; ++i) largest = std::max(largest, std::fabs(x[i]));
    scale = 127.0f / (largest + kScaleEpsilon), step = largest / 127.0f, low = -128, high = 127;
  } else {
    double total = 0;
    for (int64_t i = 0; i < length; ++i) total += std::fabs(x[i]);
    const float mean = float(total / double(length)), sqrt_7 = std::sqrt(7.0f);
    scale = sqrt_7 / (mean + kScaleEpsilon), step = mean / sqrt_7, low = -8, high = 7;
  }
  for (int64_t i = 0; i < length; ++i) to[i] = std::clamp(std::nearbyintf(scale * x[i]), low, high) * step;
  return to;
}

// Append the features i of [begin, end) with magnitudes[i] >= threshold and a nonzero value.
inline void append_reached(const int32_t* magnitudes, int32_t threshold, const float* values, int64_t begin,
                           int64_t end, FeatureList& list) {
  int64_t i = begin, length = list.length;
#ifdef __AVX512F__
  const __m512i thresholds = _mm512_set1_epi32(std::max(threshold, int32_t(1)));
  __m512i index = _mm512_add_epi32(_mm512_set1_epi32(int32_t(begin)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + kLanes <= end; i += kLanes) {
    const __m512 value = _mm512_loadu_ps(values + i);
    __mmask16 reached = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(magnitudes + i), thresholds);
    reached = _mm512_mask_cmp_ps_mask(reached, value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    // Compressed in a register and stored whole: compressing into memory is microcode on Zen 4.
    _mm512_storeu_si512(list.features + length, _mm512_maskz_compress_epi32(reached, index));
    _mm512_storeu_ps(list.values + length, _mm512_maskz_compress_ps(reached, value));
    length += __builtin_popcount(reached);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
  }
#endif
  for (; i < end; ++i) {
    list.features[length] = int32_t(i);
    list.values[length] = values[i];
    length += magnitudes[i] >= threshold && values[i] != 0;
  }
  list.length = length;
}

inline void append_topk(const SiteScratch& scratch, const float* values, int64_t begin, int64_t end, int64_t num_selected,
                        FeatureList& list) {
  int32_t* magnitudes = const_cast<int32_t*>(scratch.magnitudes.data());
  const Threshold<uint32_t> found =
      find_threshold(reinterpret_cast<const uint32_t*>(magnitudes + begin), end - begin, num_selected);
  const int32_t threshold = int32_t(found.value);
  // Ties at the threshold go to the lower index. A threshold of 0 selects all that is not 0, and zeros change nothing.
  int64_t surplus = threshold > 0 ? found.reached - num_selected : 0;
  for (int64_t i = end - 1; surplus > 0; --i)
    if (magnitudes[i] == threshold) magnitudes[i] = 0, --surplus;
  append_reached(magnitudes, threshold, values, begin, end, list);
}

inline void append_above_threshold(const float* x, float threshold, bool by_magnitude, const float* values,
                                   int64_t length, FeatureList& list) {
  int64_t largest = 0;
  for (int64_t i = 0; by_magnitude && i < length; ++i)
    if (std::fabs(x[i]) > std::fabs(x[largest])) largest = i;
  for (int64_t i = 0; i < length; ++i) {
    const float compared = by_magnitude ? std::fabs(x[i]) : x[i];
    list.features[list.length] = int32_t(i);
    list.values[list.length] = values[i];
    list.length += (!(compared <= threshold) || (by_magnitude && i == largest)) && values[i] != 0;
  }
}

inline float statistical_threshold(const float* x, int64_t length, float quantile) {
  double total = 0, squares = 0;
  for (int64_t i = 0; i < length; ++i) total += std::fabs(x[i]);
  const double mean = total / double(length);
  for (int64_t i = 0; i < length; ++i) squares += (std::fabs(x[i]) - mean) * (std::fabs(x[i]) - mean);
  return float(mean) + quantile * float(std::sqrt(squares / double(length)));
}

inline void rescale_list(const float* x, int64_t num_features, Rescale rescale, FeatureList& list) {
  const float norm = std::sqrt(dot(list.values, list.values, list.length));
  float factor = norm == 0 ? 0 : 1 / norm;
  if (rescale == Rescale::preserve) factor *= std::sqrt(dot(x, x, num_features));
  for (int64_t k = 0; k < list.length; ++k) list.values[k] *= factor;
  list.step *= factor;
}

// Append the nonzero values of the features that all tokens of an expert share.
inline void append_shared(const SiteSettings& site, int64_t place, const float* values, FeatureList& list) {
  const int32_t* features = site.features.data() + place * site.listed_features();
  for (int64_t k = 0; k < site.num_selected[place]; ++k) {
    list.features[list.length] = int32_t(k);
    list.values[list.length] = values[features[k]];
    list.length += values[features[k]] != 0;
  }
}

// Fill `list` with the features of row `x` that the site selects for one expert. `list` must have space for one row and
// one vector more, because vectors are stored whole.
inline void select_features(const SiteSettings& site, int64_t expert, const float* x, SiteScratch& scratch,
                            FeatureList& list) {
  const int64_t length = site.num_features;
  const float* values = rounded_row(x, length, site.format, scratch.rounded.data(), list.step);
  list.length = 0;
  for (int64_t i = 0; i < length; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    scratch.magnitudes[i] = int32_t(bits & 0x7fffffffu);
  }
  if (site.selects_all) {
    append_reached(scratch.magnitudes.data(), 0, values, 0, length, list);
    return;
  }
  const int64_t place = site.uniform() ? 0 : expert;
  switch (site.selection) {
    case Selection::topk:
      append_topk(scratch, values, 0, length, site.num_selected[place], list);
      break;
    case Selection::block: {
      const int64_t per_group = site.num_selected[place] / (length / site.group_size);
      for (int64_t begin = 0; begin < length; begin += site.group_size)
        append_topk(scratch, values, begin, begin + site.group_size, per_group, list);
      break;
    }
    case Selection::threshold:
      append_above_threshold(x, site.thresholds[place], true, values, length, list);
      break;
    case Selection::statistical: {
      const float quantile = site.thresholds[place];
      const float threshold = std::isinf(quantile) ? quantile : statistical_threshold(x, length, quantile);
      append_above_threshold(x, threshold, true, values, length, list);
      break;
    }
    case Selection::relu:
      append_above_threshold(x, site.thresholds[place], false, values, length, list);
      break;
    case Selection::shared:
      append_shared(site, place, values, list);
      break;
  }
  if (site.rescale != Rescale::none) rescale_list(x, length, site.rescale, list);
}

}  // namespace qsparse_moe
