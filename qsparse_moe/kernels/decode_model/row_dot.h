// The product of dense tokens with a matrix that is stored output-major (O, D): one weight row per output, read whole.
// It is used for the output head, which has no sparse site before it, and for the rows of up whose gate is positive.

#pragma once

#include <type_traits>

#include "vector_math.h"

namespace qsparse_moe {

// Tokens in the layout of a format: the two halves of every unit are separate, so that they match the lanes of the weights.
struct DotTokens {
  const float* first;   // (T, units, lanes)
  const float* second;  // likewise
};

// Rows are read in order; this is the distance, in bytes, at which weights are prefetched.
constexpr int64_t kAhead = 16384;

template <typename Format, int T, int R>
inline void dot_rows(const char* weights, int64_t row_bytes, int64_t units, const DotTokens& tokens, float sums[R][T]) {
  Floats total[R][T][2] = {};
  for (int64_t u = 0; u < units; ++u)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Floats first, second;
      const char* from = weights + r * row_bytes + u * Format::unit_bytes;
      prefetch(from + kAhead, Format::unit_bytes);
      Format::read(from, first, second);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        total[r][t][0] += load<Floats>(tokens.first + (t * units + u) * kLanes) * first;
        total[r][t][1] += load<Floats>(tokens.second + (t * units + u) * kLanes) * second;
      }
    }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = sum(total[r][t][0] + total[r][t][1]);
}

// out[t][row] = row_scales[row] * (weights[row] . tokens[t]) for the rows [begin, end).
template <typename Format, int T>
void dot_range(const char* weights, int64_t row_bytes, int64_t units, const DotTokens& tokens, const float* row_scales,
               float* const* out, int64_t begin, int64_t end) {
  constexpr int together = T == 1 ? 4 : 2;
  float sums[together][T];
  const auto write = [&](int64_t row, int count) {
    for (int r = 0; r < count; ++r)
      for (int t = 0; t < T; ++t) out[t][row + r] = sums[r][t] * (row_scales ? row_scales[row + r] : 1.0f);
  };
  int64_t row = begin;
  for (; row + together <= end; row += together) {
    dot_rows<Format, T, together>(weights + row * row_bytes, row_bytes, units, tokens, sums);
    write(row, together);
  }
  for (; row < end; ++row) {
    dot_rows<Format, T, 1>(weights + row * row_bytes, row_bytes, units, tokens, sums);
    write(row, 1);
  }
}

// out[t][row] = weights[row] . tokens[t] for the `count` outputs in `rows`; the other outputs are not written.
template <typename Format, int T>
void dot_chosen(const char* weights, int64_t row_bytes, int64_t units, const DotTokens& tokens, const int32_t* rows,
                int64_t count, float* const* out) {
  constexpr int together = T == 1 ? 4 : 2;
  for (int64_t k = 0; k < count; k += together) {
    // Rows beyond the last one repeat it; those two groups ahead are requested while this group is computed.
    const char *from[together], *ahead[together];
    for (int r = 0; r < together; ++r) {
      from[r] = weights + rows[std::min(k + r, count - 1)] * row_bytes;
      ahead[r] = weights + rows[std::min(k + r + 2 * together, count - 1)] * row_bytes;
    }
    Floats total[together][T][2] = {};
    for (int64_t u = 0; u < units; ++u)
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) {
        Floats first, second;
        prefetch(ahead[r] + u * Format::unit_bytes, Format::unit_bytes);
        Format::read(from[r] + u * Format::unit_bytes, first, second);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          total[r][t][0] += load<Floats>(tokens.first + (t * units + u) * kLanes) * first;
          total[r][t][1] += load<Floats>(tokens.second + (t * units + u) * kLanes) * second;
        }
      }
    for (int r = 0; r < together && k + r < count; ++r)
      for (int t = 0; t < T; ++t) out[t][rows[k + r]] = sum(total[r][t][0] + total[r][t][1]);
  }
}

inline void dot_chosen(int tokens_padded, NumberFormat format, const char* weights, int64_t row_bytes, int64_t units,
                       const DotTokens& tokens, const int32_t* rows, int64_t count, float* const* out) {
  const auto run = [&](auto padded) {
    constexpr int T = decltype(padded)::value;
    if (format == NumberFormat::bf16) dot_chosen<Bf16, T>(weights, row_bytes, units, tokens, rows, count, out);
    else dot_chosen<Fp32, T>(weights, row_bytes, units, tokens, rows, count, out);
  };
  switch (tokens_padded) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 4: return run(std::integral_constant<int, 4>{});
    default: return run(std::integral_constant<int, 8>{});
  }
}

// Arrange `token` (padded with zeros to whole units) as DotTokens of a format.
inline void split_units(NumberFormat format, const float* token, int64_t units, float* first, float* second) {
  for (int64_t u = 0; u < units; ++u)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool alternate = format == NumberFormat::bf16;
      first[u * kLanes + lane] = token[u * kUnit + (alternate ? 2 * lane : lane)];
      second[u * kLanes + lane] = token[u * kUnit + (alternate ? 2 * lane + 1 : kLanes + lane)];
    }
}

template <int T>
void dot_range(NumberFormat format, const char* weights, int64_t row_bytes, int64_t units, const DotTokens& tokens,
               const float* row_scales, float* const* out, int64_t begin, int64_t end) {
  switch (format) {
    case NumberFormat::fp32:
      return dot_range<Fp32, T>(weights, row_bytes, units, tokens, row_scales, out, begin, end);
    case NumberFormat::bf16:
      return dot_range<Bf16, T>(weights, row_bytes, units, tokens, row_scales, out, begin, end);
    default:
      return dot_range<Int8, T>(weights, row_bytes, units, tokens, row_scales, out, begin, end);
  }
}

inline void dot_range(int tokens_padded, NumberFormat format, const char* weights, int64_t row_bytes, int64_t units,
                      const DotTokens& tokens, const float* row_scales, float* const* out, int64_t begin, int64_t end) {
  switch (tokens_padded) {
    case 1: return dot_range<1>(format, weights, row_bytes, units, tokens, row_scales, out, begin, end);
    case 2: return dot_range<2>(format, weights, row_bytes, units, tokens, row_scales, out, begin, end);
    case 4: return dot_range<4>(format, weights, row_bytes, units, tokens, row_scales, out, begin, end);
    default: return dot_range<8>(format, weights, row_bytes, units, tokens, row_scales, out, begin, end);
  }
}

}  // namespace qsparse_moe
