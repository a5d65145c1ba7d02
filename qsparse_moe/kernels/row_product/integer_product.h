// The product of chosen rows with int8 or ternary weights by integer dot products (AVX-512 VNNI).
//
// One instruction multiplies four unsigned bytes with four signed bytes per lane and adds the four products to an int32.
// The four bytes are the weights of four rows for one column: four rows are interleaved in registers, which costs eight
// shuffles per 256 weights, where a conversion of every weight to fp32 costs 48 instructions.
//
// A value (a feature times its scales) has 15 bits: code = round(value / scale), scale = max|values| / 16256 over a group
// of 32 rows, and code = 128 high + low, each a signed byte. Two instructions therefore replace one, and the rounding is a
// hundredth of that of the weights; with one byte per value it would exceed theirs. Sums of a group are exact in int32:
// 32 rows * 16256 * 255 < 2^31.
//
// `multiply` and `multiply_ternary` in row_product.h are the references; tests compare them with this.

#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512F__)
#define QSPARSE_MOE_INTEGER_PRODUCT 1

#include <immintrin.h>

#include <cstdint>
#include <limits>

namespace qsparse_moe {
namespace integer {

constexpr int64_t kGroupRows = 32;
constexpr int64_t kQuads = kGroupRows / 4;  // of rows
constexpr float kLargestCode = 16256;       // 127 * 128, so that the high byte is at most 127
// Values below this are 0: the quotient of kLargestCode and a smaller one is not finite.
constexpr float kSmallestValue = 1e-33f;

// The values of one group of rows for one token. A dword holds the bytes of four rows.
struct GroupValues {
  int32_t high[kQuads], low[kQuads];
  int32_t sum_high, sum_low;
  float scale;
};

// Round `count` values, `stride` floats apart, to codes; the codes beyond `count` are 0.
inline void encode(const float* values, int64_t stride, int64_t count, GroupValues& group) {
  alignas(64) float column[kGroupRows] = {};
  for (int64_t k = 0; k < count; ++k) column[k] = values[k * stride];
  const __m512 first = _mm512_load_ps(column), second = _mm512_load_ps(column + 16);
  // Magnitudes compared as integers, in which order NaN is above infinity and so cannot get lost.
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
  const int32_t largest_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(
      _mm512_and_si512(_mm512_castps_si512(first), no_sign), _mm512_and_si512(_mm512_castps_si512(second), no_sign)));
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const bool is_finite = largest_bits < 0x7f800000;
  const float inverse = is_finite && largest >= kSmallestValue ? kLargestCode / largest : 0.0f;
  group.scale = is_finite ? largest / kLargestCode : std::numeric_limits<float>::quiet_NaN();
  __m512i sums_high = _mm512_setzero_si512(), sums_low = sums_high;
  for (int half = 0; half < 2; ++half) {
    // A product with 0 would be NaN for a value that is not finite, so those codes are masked instead.
    const __mmask16 valid = inverse == 0 ? 0 : 0xffff;
    const __m512i codes = _mm512_maskz_cvtps_epi32(valid, _mm512_mul_ps(half ? second : first, _mm512_set1_ps(inverse)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(codes, _mm512_slli_epi32(high, 7));
    sums_high = _mm512_add_epi32(sums_high, high), sums_low = _mm512_add_epi32(sums_low, low);
    _mm_storeu_si128((__m128i*)(group.high + 4 * half), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(group.low + 4 * half), _mm512_cvtepi32_epi8(low));
  }
  group.sum_high = _mm512_reduce_add_epi32(sums_high), group.sum_low = _mm512_reduce_add_epi32(sums_low);
}

// Dwords of four rows each: dword 4 L + m has byte 16 L + 4 Q + m of every row.
template <int Q>
inline __m512i interleave(__m512i row0, __m512i row1, __m512i row2, __m512i row3) {
  const __m512i first = Q < 2 ? _mm512_unpacklo_epi8(row0, row1) : _mm512_unpackhi_epi8(row0, row1);
  const __m512i second = Q < 2 ? _mm512_unpacklo_epi8(row2, row3) : _mm512_unpackhi_epi8(row2, row3);
  return Q % 2 == 0 ? _mm512_unpacklo_epi16(first, second) : _mm512_unpackhi_epi16(first, second);
}

// How the 64 bytes of a line of a row hold weights. `unsigned_code<I>` is weight I of each byte, as a multiple of `unit<I>`
// above 0; `offset` is the code of weight 0. No shift is needed: a field of ternary codes stays where it is.
struct Int8Line {
  static constexpr int64_t columns = 64;
  static constexpr int fields = 1;
  static constexpr int32_t offset = 128;
  template <int I>
  static constexpr int32_t unit = 1;
  template <int I>
  static __m512i unsigned_code(__m512i bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80)));
  }
  // Sums q = 0..3: lane 4 L + m is column 16 L + 4 q + m.
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
  static constexpr int32_t offset = 1;
  template <int I>
  static constexpr int32_t unit = 1 << (2 * I);
  template <int I>
  static __m512i unsigned_code(__m512i bytes) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(char(3 << (2 * I))));
  }
  // Sums 4 q + i: byte 16 L + 4 q + m is byte m of word 4 L + q, so lane 4 L + m is column 16 (4 m + i) + 4 L + q.
  static void store(const __m512* sums, float* to) {
    for (int i = 0; i < 4; ++i) {
      const __m512 a = _mm512_unpacklo_ps(sums[i], sums[4 + i]), b = _mm512_unpackhi_ps(sums[i], sums[4 + i]);
      const __m512 c = _mm512_unpacklo_ps(sums[8 + i], sums[12 + i]), d = _mm512_unpackhi_ps(sums[8 + i], sums[12 + i]);
      const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
      const auto write = [&](int m, __m512d x) { _mm512_storeu_ps(to + 16 * (4 * m + i), _mm512_castpd_ps(x)); };
      write(0, _mm512_unpacklo_pd(pairs(a), pairs(c)));
      write(1, _mm512_unpackhi_pd(pairs(a), pairs(c)));
      write(2, _mm512_unpacklo_pd(pairs(b), pairs(d)));
      write(3, _mm512_unpackhi_pd(pairs(b), pairs(d)));
    }
  }
};

// The rows of one group, four per entry; rows beyond the last one repeat it, with codes of 0.
struct GroupRows {
  int32_t rows[kGroupRows];
  int64_t quads;
};

// Add to `sums` the products of one group with fields [I0, I0 + NI) of interleaved parts [Q0, Q0 + NQ) of a line of bytes.
// 16 accumulators at most, so that they and the four rows stay in the 32 registers.
template <typename Line, int T, int Q0, int NQ, int I0, int NI>
inline void add_part(const char* line, int64_t row_bytes, const GroupRows& rows, const GroupValues* values,
                     __m512* const* sums) {
  __m512i high[T][NQ][NI], low[T][NQ][NI];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < NQ; ++q) {
      const auto start = [&](auto i) {
        constexpr int I = I0 + decltype(i)::value;
        if constexpr (decltype(i)::value < NI) {
          constexpr int32_t zero = -Line::offset * Line::template unit<I>;
          high[t][q][decltype(i)::value] = _mm512_set1_epi32(zero * values[t].sum_high);
          low[t][q][decltype(i)::value] = _mm512_set1_epi32(zero * values[t].sum_low);
        }
      };
      start(std::integral_constant<int, 0>{}), start(std::integral_constant<int, 1>{});
      start(std::integral_constant<int, 2>{}), start(std::integral_constant<int, 3>{});
    }
  for (int64_t quad = 0; quad < rows.quads; ++quad) {
    const int32_t* four = rows.rows + 4 * quad;
    const __m512i row0 = _mm512_loadu_si512(line + four[0] * row_bytes), row1 = _mm512_loadu_si512(line + four[1] * row_bytes);
    const __m512i row2 = _mm512_loadu_si512(line + four[2] * row_bytes), row3 = _mm512_loadu_si512(line + four[3] * row_bytes);
    const auto part = [&](auto q) {
      constexpr int at = decltype(q)::value;
      if constexpr (at < NQ) {
        const __m512i bytes = interleave<Q0 + at>(row0, row1, row2, row3);
        const auto field = [&](auto i) {
          constexpr int which = decltype(i)::value;
          if constexpr (which < NI) {
            const __m512i codes = Line::template unsigned_code<I0 + which>(bytes);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
              high[t][at][which] = _mm512_dpbusd_epi32(high[t][at][which], codes, _mm512_set1_epi32(values[t].high[quad]));
              low[t][at][which] = _mm512_dpbusd_epi32(low[t][at][which], codes, _mm512_set1_epi32(values[t].low[quad]));
            }
          }
        };
        field(std::integral_constant<int, 0>{}), field(std::integral_constant<int, 1>{});
        field(std::integral_constant<int, 2>{}), field(std::integral_constant<int, 3>{});
      }
    };
    part(std::integral_constant<int, 0>{}), part(std::integral_constant<int, 1>{});
    part(std::integral_constant<int, 2>{}), part(std::integral_constant<int, 3>{});
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < NQ; ++q)
#pragma GCC unroll 4
      for (int i = 0; i < NI; ++i) {
        const __m512 total =
            _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[t][q][i], 7), low[t][q][i]));
        __m512& sum = sums[t][(Q0 + q) * Line::fields + I0 + i];
        // The unit of a field is a power of two, so dividing by it is exact.
        sum = _mm512_fmadd_ps(total, _mm512_set1_ps(values[t].scale / float(1 << (Line::fields > 1 ? 2 * (I0 + i) : 0))), sum);
      }
}

// All parts of a line, as many at a time as there are registers for.
template <typename Line, int T, int Q0 = 0, int I0 = 0>
inline void add_line(const char* line, int64_t row_bytes, const GroupRows& rows, const GroupValues* values,
                     __m512* const* sums) {
  constexpr int at_once = 8 / T;  // pairs of accumulators per token
  constexpr int fields = at_once < Line::fields ? at_once : Line::fields;
  constexpr int parts = at_once / fields < 4 ? at_once / fields : 4;
  add_part<Line, T, Q0, parts, I0, fields>(line, row_bytes, rows, values, sums);
  if constexpr (I0 + fields < Line::fields) {
    add_line<Line, T, Q0, I0 + fields>(line, row_bytes, rows, values, sums);
  } else if constexpr (Q0 + parts < 4) {
    add_line<Line, T, Q0 + parts, 0>(line, row_bytes, rows, values, sums);
  }
}

// out[t] = the product, for columns up to `num_columns`, a multiple of a line's columns.
template <typename Line, int T>
void multiply(const char* weights, int64_t row_bytes, int64_t num_columns, const ChosenRows& chosen, float* const* out) {
  constexpr int64_t lines_at_once = 32;
  constexpr int64_t sums_per_line = Line::columns / 16;
  const int64_t num_lines = num_columns / Line::columns;
  __m512 buffer[T][lines_at_once * sums_per_line];
  for (int64_t first = 0; first < num_lines; first += lines_at_once) {
    const int64_t lines = std::min(lines_at_once, num_lines - first);
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < lines * sums_per_line; ++i) buffer[t][i] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < chosen.num_rows; begin += kGroupRows) {
      const int64_t count = std::min(kGroupRows, chosen.num_rows - begin);
      GroupRows rows;
      rows.quads = (count + 3) / 4;
      for (int64_t k = 0; k < 4 * rows.quads; ++k) rows.rows[k] = chosen.rows[begin + std::min(k, count - 1)];
      GroupValues values[T];
      for (int t = 0; t < T; ++t) encode(chosen.values + begin * T + t, T, count, values[t]);
      const int64_t next = std::min(kGroupRows, chosen.num_rows - begin - kGroupRows);
      const int32_t* next_rows = chosen.rows + begin + kGroupRows;
      for (int64_t line = 0; line < lines; ++line) {
        const char* at = weights + (first + line) * 64;
        // The same line of the rows of the next group, into the L2 cache: they arrive while this group is computed.
        for (int64_t k = 0; k < next; ++k) __builtin_prefetch(at + next_rows[k] * row_bytes, 0, 2);
        __m512* sums[T];
        for (int t = 0; t < T; ++t) sums[t] = buffer[t] + line * sums_per_line;
        add_line<Line, T>(at, row_bytes, rows, values, sums);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int64_t line = 0; line < lines; ++line)
        Line::store(buffer[t] + line * sums_per_line, out[t] + (first + line) * Line::columns);
  }
}

}  // namespace integer
}  // namespace qsparse_moe

#endif
