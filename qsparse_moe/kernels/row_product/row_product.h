// The product of a few sparse rows with a matrix of which only the rows behind their nonzero features are read.
//
// A matrix (D, O) is stored input-major: row d holds the O weights that feature d is multiplied with, so that a feature
// that no token selected is a row that is never touched. T tokens share one pass over the rows that at least one of them
// selected; a token that did not select a row multiplies it by 0, which costs arithmetic and no memory traffic.
//
// Sums are formed in fp32 registers, a segment of columns at a time, so that the result is written once. Vectors are
// GCC's own, 16 floats wide: one AVX-512 register, or two of AVX2.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace qsparse_moe {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
// Columns that the smallest step of a row covers; a stored row is padded to a multiple of them with zeros.
constexpr int64_t kUnit = 32;
constexpr int64_t kTernaryBlock = 256;

template <typename Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <typename Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(Vector));
}

inline Floats broadcast(float value) { return Floats{} + value; }

inline float sum(Floats vector) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += vector[lane];
  return total;
}

// Each number format turns one unit of 32 stored weights into two vectors. Which column is in which lane is the
// format's own choice; `order` puts a pair of sums back into the order of the columns.

struct Fp32 {
  static constexpr int64_t unit_bytes = 128;
  static void read(const char* from, Floats& first, Floats& second) {
    first = load<Floats>(from);
    second = load<Floats>(from + 64);
  }
  static void order(Floats&, Floats&) {}
};

struct Bf16 {
  static constexpr int64_t unit_bytes = 64;
  // The upper half of a word is one weight in place, the lower half is one after a shift: no unpacking is needed.
  static void read(const char* from, Floats& even, Floats& odd) {
    const Words words = load<Words>(from);
    even = (Floats)(words << 16);
    odd = (Floats)(words & 0xffff0000u);
  }
  static void order(Floats& even, Floats& odd) {
    const Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Ints high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Floats first = __builtin_shuffle(even, odd, low);
    odd = __builtin_shuffle(even, odd, high);
    even = first;
  }
};

struct Int8 {
  static constexpr int64_t unit_bytes = 32;
  static void read(const char* from, Floats& first, Floats& second) {
    first = widen(from);
    second = widen(from + 16);
  }
  // In two steps with an instruction each: of the conversion in one, GCC 12 makes sixteen scalar ones.
  static Floats widen(const char* from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
  }
  static void order(Floats&, Floats&) {}
};

// Rows are taken in blocks, all columns of a block before the next one, so that a page of memory is met once and not once
// per segment. While one block is computed the same columns of the next are asked of the memory: rows are chosen, so the
// processor cannot foresee them.
#ifndef ROWS_PER_BLOCK
#define ROWS_PER_BLOCK 8
#endif
constexpr int64_t kRowsPerBlock = ROWS_PER_BLOCK;

// Columns whose sums are held at a time, in the first cache.
constexpr int64_t kColumnsAtOnce = 1024;

inline void prefetch(const char* from, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(from + byte);
}

// Add to `sums[t]`, for U units of columns in the lanes of the format, the sum over one block of `num_rows` rows of
// values[row][t] * weights. `rows_after` is how many rows there are behind the block.
template <typename Format, int T, int U>
inline void add_segment(const char* segment, int64_t row_bytes, const int32_t* rows, int64_t num_rows,
                        int64_t rows_after, const float* values, Floats* sums, int64_t sums_stride) {
  Floats total[T][U][2];
  for (int t = 0; t < T; ++t)
    for (int u = 0; u < U; ++u)
      for (int half = 0; half < 2; ++half) total[t][u][half] = sums[t * sums_stride + 2 * u + half];
  for (int64_t k = 0; k < num_rows; ++k) {
    const char* row = segment + rows[k] * row_bytes;
    if (k < rows_after) prefetch(segment + rows[k + num_rows] * row_bytes, U * Format::unit_bytes);
    Floats value[T];
    for (int t = 0; t < T; ++t) value[t] = broadcast(values[k * T + t]);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      Floats first, second;
      Format::read(row + u * Format::unit_bytes, first, second);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        total[t][u][0] += value[t] * first;
        total[t][u][1] += value[t] * second;
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int u = 0; u < U; ++u)
      for (int half = 0; half < 2; ++half) sums[t * sums_stride + 2 * u + half] = total[t][u][half];
}

// Columns [begin, end) of the product, both multiples of a unit: as wide segments as the registers hold for T tokens.
template <typename Format, int T>
void add_columns(const char* weights, int64_t row_bytes, const int32_t* rows, int64_t num_rows, const float* values,
                 float* const* out, int64_t begin, int64_t end) {
  constexpr int wide = T >= 8 ? 1 : 8 / T;
  constexpr int64_t stride = kColumnsAtOnce / kLanes;
  Floats sums[T * stride];
  for (; begin < end; begin += kColumnsAtOnce) {
    const int64_t units = (end - begin < kColumnsAtOnce ? end - begin : kColumnsAtOnce) / kUnit;
    const char* columns = weights + begin / kUnit * Format::unit_bytes;
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < 2 * units; ++i) sums[t * stride + i] = Floats{};
    for (int64_t k = 0; k < num_rows; k += kRowsPerBlock) {
      const int64_t count = num_rows - k < kRowsPerBlock ? num_rows - k : kRowsPerBlock;
      const int64_t after = num_rows - k - count < count ? num_rows - k - count : count;
      int64_t unit = 0;
      for (; unit + wide <= units; unit += wide)
        add_segment<Format, T, wide>(columns + unit * Format::unit_bytes, row_bytes, rows + k, count, after,
                                     values + k * T, sums + 2 * unit, stride);
      for (; unit < units; ++unit)
        add_segment<Format, T, 1>(columns + unit * Format::unit_bytes, row_bytes, rows + k, count, after,
                                  values + k * T, sums + 2 * unit, stride);
    }
    for (int t = 0; t < T; ++t)
      for (int64_t unit = 0; unit < units; ++unit) {
        Floats first = sums[t * stride + 2 * unit], second = sums[t * stride + 2 * unit + 1];
        Format::order(first, second);
        float* to = out[t] + begin + unit * kUnit;
        store(to, load<Floats>(to) + first);
        store(to + kLanes, load<Floats>(to + kLanes) + second);
      }
  }
}

// Ternary weights, 2 bits each as code 0, 1 or 2 for -1, 0 or 1. In a block of 256 columns word w holds, two bits per
// step s, the columns 16 s + w: shifting all sixteen words by 2 s brings the codes of 16 adjacent columns to the bottom.
struct Ternary {
  static constexpr int64_t block_bytes = 64;
  static constexpr int64_t steps = 16;
};

#ifdef __AVX512F__
// The product with a code is looked up: vpermps reads the four lowest bits, of which the upper two are the neighbour's,
// so every entry stands in the table four times.
struct TernaryTable {
  Floats entries;
  explicit TernaryTable(float value)
      : entries{-value, 0, value, 0, -value, 0, value, 0, -value, 0, value, 0, -value, 0, value, 0} {}
  Floats of(Words codes) const { return __builtin_shuffle(entries, (Ints)codes); }
};
#else
struct TernaryTable {
  Floats value;
  explicit TernaryTable(float factor) : value(broadcast(factor)) {}
  Floats of(Words codes) const { return value * (__builtin_convertvector((Ints)(codes & 3u), Floats) - 1.0f); }
};
#endif

constexpr int64_t kRowsAhead = 16;

// Steps [S0, S0 + S) of one block of columns.
template <int T, int S, int S0>
inline void add_ternary_steps(const char* block, int64_t row_bytes, const int32_t* rows, int64_t num_rows,
                              const float* values, float* const* out, int64_t column) {
  Floats sums[T][S] = {};
  for (int64_t k = 0; k < num_rows; ++k) {
    const Words words = load<Words>(block + rows[k] * row_bytes);
    if (k + kRowsAhead < num_rows) __builtin_prefetch(block + rows[k + kRowsAhead] * row_bytes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const TernaryTable table(values[k * T + t]);
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) sums[t][s] += table.of(words >> (2 * (S0 + s)));
    }
  }
  for (int t = 0; t < T; ++t)
    for (int s = 0; s < S; ++s) {
      float* to = out[t] + column + (S0 + s) * kLanes;
      store(to, load<Floats>(to) + sums[t][s]);
    }
}

template <int T, int S, int S0 = 0>
inline void add_ternary_block(const char* block, int64_t row_bytes, const int32_t* rows, int64_t num_rows,
                              const float* values, float* const* out, int64_t column) {
  add_ternary_steps<T, S, S0>(block, row_bytes, rows, num_rows, values, out, column);
  if constexpr (S0 + S < Ternary::steps)
    add_ternary_block<T, S, S0 + S>(block, row_bytes, rows, num_rows, values, out, column);
}

template <int T>
void add_ternary_columns(const char* weights, int64_t row_bytes, const int32_t* rows, int64_t num_rows,
                         const float* values, float* const* out, int64_t begin, int64_t end) {
  for (; begin < end; begin += kTernaryBlock)
    add_ternary_block<T, 16 / T>(weights + begin / kTernaryBlock * Ternary::block_bytes, row_bytes, rows, num_rows,
                                 values, out, begin);
}

enum class NumberFormat : int64_t { fp32 = 0, bf16 = 1, int8 = 2, ternary = 3 };

// A matrix (or a stack of them, one after another) as it is stored. `row_scales` and `scale` are folded into the values
// by the caller: a row's weight is code * row_scales[row] (int8) or code * scale (ternary).
struct Matrix {
  const char* data = nullptr;
  NumberFormat format = NumberFormat::fp32;
  int64_t num_columns = 0;  // padded
  int64_t row_bytes = 0;

  int64_t grain() const { return format == NumberFormat::ternary ? kTernaryBlock : kUnit; }
};

constexpr int kMaxTokens = 8;  // of one pass over the rows

template <int T>
void add_product(const Matrix& matrix, const int32_t* rows, int64_t num_rows, const float* values, float* const* out,
                 int64_t begin, int64_t end) {
  if (num_rows == 0 || begin >= end) return;
  switch (matrix.format) {
    case NumberFormat::fp32:
      return add_columns<Fp32, T>(matrix.data, matrix.row_bytes, rows, num_rows, values, out, begin, end);
    case NumberFormat::bf16:
      return add_columns<Bf16, T>(matrix.data, matrix.row_bytes, rows, num_rows, values, out, begin, end);
    case NumberFormat::int8:
      return add_columns<Int8, T>(matrix.data, matrix.row_bytes, rows, num_rows, values, out, begin, end);
    case NumberFormat::ternary:
      return add_ternary_columns<T>(matrix.data, matrix.row_bytes, rows, num_rows, values, out, begin, end);
  }
}

// Tokens that a pass is compiled for: 1, 2, 4 or 8. The caller pads values with 0 and `out` with a spare row.
inline int padded_tokens(int num_tokens) { return num_tokens <= 1 ? 1 : num_tokens <= 2 ? 2 : num_tokens <= 4 ? 4 : 8; }

inline void add_product(const Matrix& matrix, int tokens, const int32_t* rows, int64_t num_rows, const float* values,
                        float* const* out, int64_t begin, int64_t end) {
  switch (tokens) {
    case 1: return add_product<1>(matrix, rows, num_rows, values, out, begin, end);
    case 2: return add_product<2>(matrix, rows, num_rows, values, out, begin, end);
    case 4: return add_product<4>(matrix, rows, num_rows, values, out, begin, end);
    default: return add_product<8>(matrix, rows, num_rows, values, out, begin, end);
  }
}

// The slice of `num_columns` that thread `thread` of `num_threads` computes, in whole grains.
inline void column_slice(int64_t num_columns, int64_t grain, int thread, int num_threads, int64_t& begin,
                         int64_t& end) {
  const int64_t grains = (num_columns + grain - 1) / grain;
  begin = grains * thread / num_threads * grain;
  end = grains * (thread + 1) / num_threads * grain;
}

}  // namespace qsparse_moe
