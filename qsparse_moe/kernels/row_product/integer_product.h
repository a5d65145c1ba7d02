// The product of chosen rows with int8 or ternary weights by integer dot products (AVX-512 VNNI).
//
// One instruction multiplies four unsigned bytes with four signed bytes in every lane and adds the four products to an int32.
// The four bytes are the weights of four rows for one column: four rows are interleaved in registers, with eight shuffles
// per 256 bytes, where a conversion of int8 to fp32 costs 48 instructions.
//
// A value (a feature times its scales) is rounded to a code of 15 bits: scale = max|values| / 16256 over a group of rows,
// and code = 128 high + low, each a signed byte, so that two instructions replace one. The rounding is a hundredth of that
// of the weights; with one byte per value it would exceed theirs. Where the site rounds to int8 itself, as in BitNet b1.58,
// its own codes are used, which are exact and need no low byte. The sums of a group are exact in int32, because
// 128 rows * 16256 * 255 < 2^31.
//
// `multiply` and `multiply_ternary` in row_product.h are the references; tests compare the two.
//
// T tokens, L lines of 64 bytes, Q interleaved parts of a line, I fields of a byte.

#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512F__)
#define QSPARSE_MOE_INTEGER_PRODUCT 1

#include <immintrin.h>

#include <cstdint>
#include <limits>

namespace qsparse_moe {
namespace integer {

constexpr int64_t kMaxGroupRows = 32;
constexpr float kLargestCode = 16256;  // 127 * 128, so that the high byte is at most 127
// A group whose largest value is below this counts as zeros: kLargestCode divided by a smaller one is not finite.
constexpr float kSmallestValue = 1e-33f;

// The codes of one group of rows for one token; a dword holds the bytes of four rows.
struct GroupCodes {
  int32_t high[kMaxGroupRows / 4], low[kMaxGroupRows / 4];
  int32_t sum_high, sum_low;
  float scale;
};

// Round `count` values, `stride` floats apart, to codes. With a `step`, every value is a whole multiple of it between -128
// and 127: that is the code, and the low bytes are 0. The codes beyond `count` are 0.
inline void encode(const float* values, int64_t stride, int64_t count, float step, GroupCodes& group) {
  alignas(64) float column[kMaxGroupRows];
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t k = 0; k < count; ++k) column[k] = values[k * stride];
  for (int64_t k = count; k < padded; ++k) column[k] = 0;
  // Magnitudes are compared as integers: in that order NaN is above infinity, so that it does not get lost.
  __m512i largest_bits = _mm512_setzero_si512();
  for (int64_t k = 0; k < padded; k += 16)
    largest_bits = _mm512_max_epi32(
        largest_bits, _mm512_and_si512(_mm512_load_si512(column + k), _mm512_set1_epi32(0x7fffffff)));
  const int32_t bits = _mm512_reduce_max_epi32(largest_bits);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const bool is_finite = bits < 0x7f800000, is_zero = largest < kSmallestValue;
  const float scale = step > 0 ? step : largest / kLargestCode;
  const float inverse = is_finite && !is_zero ? 1 / scale : 0.0f;
  group.scale = is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
  // 0 times a value that is not finite would be NaN, so its codes are masked instead.
  const __mmask16 valid = inverse == 0 ? 0 : 0xffff;
  const int shift = step > 0 ? 0 : 7;
  const __m512i half = _mm512_set1_epi32(step > 0 ? 0 : 64);
  __m512i sums_high = _mm512_setzero_si512(), sums_low = sums_high;
  for (int64_t k = 0; k < padded; k += 16) {
    const __m512i codes =
        _mm512_maskz_cvtps_epi32(valid, _mm512_mul_ps(_mm512_load_ps(column + k), _mm512_set1_ps(inverse)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, half), shift);
    const __m512i low = _mm512_sub_epi32(codes, _mm512_slli_epi32(high, shift));
    sums_high = _mm512_add_epi32(sums_high, high), sums_low = _mm512_add_epi32(sums_low, low);
    _mm_storeu_si128((__m128i*)(group.high + k / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(group.low + k / 4), _mm512_cvtepi32_epi8(low));
  }
  group.sum_high = _mm512_reduce_add_epi32(sums_high), group.sum_low = _mm512_reduce_add_epi32(sums_low);
}

// Interleave four rows: dword 4 l + m of the result has byte 16 l + 4 q + m of every row. `q` is a constant once the loops
// are unrolled.
inline __attribute__((always_inline)) __m512i interleave(int q, __m512i row0, __m512i row1, __m512i row2, __m512i row3) {
  const __m512i first = q < 2 ? _mm512_unpacklo_epi8(row0, row1) : _mm512_unpackhi_epi8(row0, row1);
  const __m512i second = q < 2 ? _mm512_unpacklo_epi8(row2, row3) : _mm512_unpackhi_epi8(row2, row3);
  return q % 2 == 0 ? _mm512_unpacklo_epi16(first, second) : _mm512_unpackhi_epi16(first, second);
}

// How the bytes of a row hold weights. `code` is field i of each byte, where weight 0 is `zero * unit(i)`: a field is masked
// and not shifted, so that its codes are multiples of its unit.
struct Int8Line {
  static constexpr int64_t columns = 64;
  static constexpr int fields = 1;
  static constexpr int32_t zero = 128;
  static constexpr int32_t unit(int) { return 1; }
  // On two threads of an AMD EPYC (family 25) at S 0.5, T 1: 60 GB/s with groups of 8, 47 with 16, 41 with 32; more tokens
  // have more sums to add at the end of a group.
  static constexpr int64_t group_rows(int tokens) { return tokens == 1 ? 8 : tokens == 2 ? 16 : 32; }
  static __m512i code(int, __m512i bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80)));
  }
  // Sum q of a line: lane 4 l + m is column 16 l + 4 q + m.
  static void store(const __m512* sums, float* to) {
    const __m512 a = _mm512_shuffle_f32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_f32x4(sums[0], sums[1], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(sums[2], sums[3], 0x44), d = _mm512_shuffle_f32x4(sums[2], sums[3], 0xee);
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(to + 16, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(to + 32, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(to + 48, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
};

struct TernaryLine {
  static constexpr int64_t columns = 256;
  static constexpr int fields = 4;
  static constexpr int32_t zero = 1;
  static constexpr int32_t unit(int i) { return 1 << (2 * i); }
  static constexpr int64_t group_rows(int) { return 32; }
  static __m512i code(int i, __m512i bytes) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(char(3 << (2 * i))));
  }
  // Sum 4 q + i of a line: byte 16 l + 4 q + m is byte m of word 4 l + q, so lane 4 l + m is column 16 (4 m + i) + 4 l + q.
  static void store(const __m512* sums, float* to) {
    const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
    for (int i = 0; i < 4; ++i) {
      const __m512 a = _mm512_unpacklo_ps(sums[i], sums[4 + i]), b = _mm512_unpackhi_ps(sums[i], sums[4 + i]);
      const __m512 c = _mm512_unpacklo_ps(sums[8 + i], sums[12 + i]), d = _mm512_unpackhi_ps(sums[8 + i], sums[12 + i]);
      const auto write = [&](int m, __m512d x) { _mm512_storeu_ps(to + 16 * (4 * m + i), _mm512_castpd_ps(x)); };
      write(0, _mm512_unpacklo_pd(pairs(a), pairs(c)));
      write(1, _mm512_unpackhi_pd(pairs(a), pairs(c)));
      write(2, _mm512_unpacklo_pd(pairs(b), pairs(d)));
      write(3, _mm512_unpackhi_pd(pairs(b), pairs(d)));
    }
  }
};

// Where the rows of one group lie, from the begin of the matrix; rows beyond the last one repeat it, with codes of 0.
struct GroupRows {
  int64_t offsets[kMaxGroupRows];
  int64_t ahead[kMaxGroupRows];  // of the rows to prefetch
  int64_t quads;                 // number of rows / 4
};

// Add to `sums[t]` the products of one group with parts [Q0, Q0 + Q) and fields [I0, I0 + I) of L lines. Their accumulators
// must fit into 16 registers, the loops are unrolled. `Wide`: the codes have low bytes.
template <typename Line, int T, bool Wide, int L, int Q0, int Q, int I0, int I>
inline void add_part(const char* line, const GroupRows& rows, const GroupCodes* codes, __m512* const* sums) {
  __m512i high[T][L][Q][I], low[T][L][Q][I];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) {
          const int32_t zero = -Line::zero * Line::unit(I0 + i);
          high[t][l][q][i] = _mm512_set1_epi32(zero * codes[t].sum_high);
          low[t][l][q][i] = _mm512_set1_epi32(zero * codes[t].sum_low);
        }
  for (int64_t quad = 0; quad < rows.quads; ++quad) {
    const int64_t *four = rows.offsets + 4 * quad, *ahead = rows.ahead + 4 * quad;
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) {
      const char* from = line + 64 * l;
      // The same lines of rows of a later group, into the L2 cache, which allows more outstanding requests than L1.
      if (Q0 == 0 && I0 == 0)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) __builtin_prefetch(from + ahead[r], 0, 2);
      const __m512i row0 = _mm512_loadu_si512(from + four[0]), row1 = _mm512_loadu_si512(from + four[1]);
      const __m512i row2 = _mm512_loadu_si512(from + four[2]), row3 = _mm512_loadu_si512(from + four[3]);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const __m512i bytes = interleave(Q0 + q, row0, row1, row2, row3);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) {
          const __m512i weights = Line::code(I0 + i, bytes);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            high[t][l][q][i] = _mm512_dpbusd_epi32(high[t][l][q][i], weights, _mm512_set1_epi32(codes[t].high[quad]));
            if (Wide)
              low[t][l][q][i] = _mm512_dpbusd_epi32(low[t][l][q][i], weights, _mm512_set1_epi32(codes[t].low[quad]));
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l)
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) {
          __m512i total = high[t][l][q][i];
          if (Wide) total = _mm512_add_epi32(_mm512_slli_epi32(total, 7), low[t][l][q][i]);
          __m512& sum = sums[t][(4 * l + Q0 + q) * Line::fields + I0 + i];
          // A unit is a power of two, so that the division is exact.
          const __m512 scale = _mm512_set1_ps(codes[t].scale * (1.0f / float(Line::unit(I0 + i))));
          sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum);
        }
}

// All parts of L lines, one after the other, each as large as the registers allow.
template <typename Line, int T, bool Wide, int L, int Q0 = 0, int I0 = 0>
inline void add_lines(const char* line, const GroupRows& rows, const GroupCodes* codes, __m512* const* sums) {
  constexpr int fitting = (Wide ? 8 : 16) / T / L;
  constexpr int fields = fitting < Line::fields ? fitting : Line::fields;
  constexpr int parts = fitting / fields < 4 ? fitting / fields : 4;
  add_part<Line, T, Wide, L, Q0, parts, I0, fields>(line, rows, codes, sums);
  if constexpr (I0 + fields < Line::fields) {
    add_lines<Line, T, Wide, L, Q0, I0 + fields>(line, rows, codes, sums);
  } else if constexpr (Q0 + parts < 4) {
    add_lines<Line, T, Wide, L, Q0 + parts, 0>(line, rows, codes, sums);
  }
}

template <typename Line, int T, bool Wide>
void multiply(const char* weights, int64_t row_bytes, int64_t num_columns, const ChosenRows& chosen, float* const* out) {
  constexpr int64_t lines_at_once = 32, group_rows = Line::group_rows(T);
  constexpr int64_t sums_per_line = Line::columns / 16;
  // Two lines of a row at a time where the registers allow it: half as many jumps in memory.
  constexpr int together = T == 1 && Line::fields == 1 ? 2 : 1;
  const int64_t num_lines = num_columns / Line::columns;
  __m512 buffer[T][lines_at_once * sums_per_line];
  for (int64_t first = 0; first < num_lines; first += lines_at_once) {
    const int64_t lines = std::min(lines_at_once, num_lines - first);
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < lines * sums_per_line; ++i) buffer[t][i] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < chosen.num_rows; begin += group_rows) {
      const int64_t count = std::min(group_rows, chosen.num_rows - begin);
      // As far ahead as the rows that the caller requests before the first group.
      const int64_t ahead = begin + std::max<int64_t>(group_rows, 16);
      GroupRows rows;
      rows.quads = (count + 3) / 4;
      for (int64_t k = 0; k < 4 * rows.quads; ++k) {
        rows.offsets[k] = chosen.rows[begin + std::min(k, count - 1)] * row_bytes;
        rows.ahead[k] = chosen.rows[std::min(ahead + k, chosen.num_rows - 1)] * row_bytes;
      }
      GroupCodes codes[T];
      for (int t = 0; t < T; ++t)
        encode(chosen.values + begin * T + t, T, count, Wide ? 0.0f : chosen.steps[t], codes[t]);
      __m512* sums[T];
      const auto sums_of = [&](int64_t line) {
        for (int t = 0; t < T; ++t) sums[t] = buffer[t] + line * sums_per_line;
      };
      int64_t line = 0;
      for (; line + together <= lines; line += together) {
        sums_of(line);
        add_lines<Line, T, Wide, together>(weights + (first + line) * 64, rows, codes, sums);
      }
      for (; line < lines; ++line) {
        sums_of(line);
        add_lines<Line, T, Wide, 1>(weights + (first + line) * 64, rows, codes, sums);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int64_t line = 0; line < lines; ++line)
        Line::store(buffer[t] + line * sums_per_line, out[t] + (first + line) * Line::columns);
  }
}

// out[t] = the product, for columns up to `num_columns`, a multiple of a line's columns.
template <typename Line, int T>
void multiply(const char* weights, int64_t row_bytes, int64_t num_columns, const ChosenRows& chosen, float* const* out) {
  if constexpr (Line::fields > 1)
    if (chosen.steps) return multiply<Line, T, false>(weights, row_bytes, num_columns, chosen, out);
  multiply<Line, T, true>(weights, row_bytes, num_columns, chosen, out);
}

}  // namespace integer
}  // namespace qsparse_moe

#endif
