// The product of a few sparse rows with a matrix, which reads only the matrix rows behind nonzero features.
//
// A matrix (D, O) is stored input-major: row d holds the O weights that feature d is multiplied with, so that the row of
// a feature that no token selected is never read. T tokens share one pass over the rows that at least one of them
// selected; a token that did not select a row multiplies it by 0, which costs arithmetic and no memory traffic.
//
// Sums are formed in fp32 registers, one segment of columns at a time. The rows of a product are divided among the threads,
// each with sums of its own, which are added at the end. Dividing the columns instead would multiply the jumps in memory
// for the same bytes. Vectors are GCC's vector extension, as wide as a register: 16 floats with AVX-512 and 8 without. (GCC
// keeps wider vectors than registers in memory: 16 floats with AVX2 ran at a fifth of the speed.)

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qsparse_moe {

#ifdef __AVX512F__
#define QSPARSE_MOE_LANES 16
#else
#define QSPARSE_MOE_LANES 8
#endif
constexpr int64_t kLanes = QSPARSE_MOE_LANES;
typedef float Floats __attribute__((vector_size(4 * QSPARSE_MOE_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * QSPARSE_MOE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * QSPARSE_MOE_LANES)));
typedef int8_t Bytes __attribute__((vector_size(QSPARSE_MOE_LANES)));

// Number of columns per step of the innermost loop.
constexpr int64_t kUnit = 2 * kLanes;
// A stored row is padded with zeros to a multiple of this number of columns, on every processor.
constexpr int64_t kStoredUnit = 32;
static_assert(kStoredUnit % kUnit == 0);
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

// Subtracting zero, not adding it: x - 0 is x for every x, so the compiler drops it; -0 + 0 is 0, so it keeps an addition.
inline Floats broadcast(float value) { return value - Floats{}; }

// In halves: a sum of one lane after the other would wait sixteen times for an addition.
inline float sum(Floats vector) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)vector);
#else
  float lanes[kLanes];
  store(lanes, vector);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
#endif
}

// Each number format turns one unit of stored weights into two vectors. Every format has its own assignment of columns
// to lanes; `order` puts a pair of sums back into the order of the columns.

struct Fp32 {
  static constexpr int64_t unit_bytes = 4 * kUnit;
  static void read(const char* from, Floats& first, Floats& second) {
    first = load<Floats>(from);
    second = load<Floats>(from + 4 * kLanes);
  }
  static void order(Floats&, Floats&) {}
};

struct Bf16 {
  static constexpr int64_t unit_bytes = 2 * kUnit;
  // The upper half of a word is one weight in place, the lower half is one after a shift: no unpacking is needed.
  static void read(const char* from, Floats& even, Floats& odd) {
    const Words words = load<Words>(from);
    even = (Floats)(words << 16);
    odd = (Floats)(words & 0xffff0000u);
  }
  static void order(Floats& even, Floats& odd) {
#ifdef __AVX512F__
    const Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Ints high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#else
    const Ints low = {0, 8, 1, 9, 2, 10, 3, 11};
    const Ints high = {4, 12, 5, 13, 6, 14, 7, 15};
#endif
    const Floats first = __builtin_shuffle(even, odd, low);
    odd = __builtin_shuffle(even, odd, high);
    even = first;
  }
};

struct Int8 {
  static constexpr int64_t unit_bytes = kUnit;
  static void read(const char* from, Floats& first, Floats& second) {
    first = widen(from);
    second = widen(from + kLanes);
  }
  // In two steps of one instruction each: GCC 12 compiles a direct conversion to sixteen scalar ones.
  static Floats widen(const char* from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
  }
  static void order(Floats&, Floats&) {}
};

// Rows are processed in blocks, all columns of a block before the next block, so that a memory page is visited once and not
// once per segment of columns. The processor cannot predict which rows are chosen, so while one row is computed, the same
// columns of the row two blocks ahead are prefetched into the L2 cache, which allows more outstanding requests than L1. On
// two threads of an AMD EPYC (family 25, AVX-512) with 1024 rows of 2048 columns in bf16: 43 GB/s with this, 21 GB/s with prefetches
// into L1, 17 GB/s without any.
constexpr int64_t kBlockBytes = 16384;
inline int64_t rows_per_block(int64_t row_bytes) {
  const int64_t rows = kBlockBytes / row_bytes;
  return rows < 8 ? 8 : rows > 32 ? 32 : rows;
}

// Number of vectors of sums that a loop over rows holds: half of the registers of AVX-512, or of those of AVX2.
#ifdef __AVX512F__
constexpr int kSumsAtOnce = 16;
#else
constexpr int kSumsAtOnce = 8;
#endif

// Number of columns whose sums are held at a time; they fit into the L1 cache.
constexpr int64_t kColumnsAtOnce = 2048;

inline void prefetch(const char* from, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

// The rows of a pass: `num_rows` chosen ones, with values[row][t] for T tokens. `steps`, unless null: the values of token t
// are whole multiples, from -128 to 127, of steps[t].
struct ChosenRows {
  const int32_t* rows;
  const float* values;
  int64_t num_rows;
  const float* steps = nullptr;
};

// Add to `sums[t]`, for U units of columns in the lanes of the format, the products with the rows [begin, end).
template <typename Format, int T, int U>
inline void add_segment(const char* segment, int64_t row_bytes, const ChosenRows& chosen, int64_t begin, int64_t end,
                        int64_t ahead, Floats* sums, int64_t sums_stride) {
  Floats total[T][U][2];
  for (int t = 0; t < T; ++t)
    for (int u = 0; u < U; ++u)
      for (int half = 0; half < 2; ++half) total[t][u][half] = sums[t * sums_stride + 2 * u + half];
  for (int64_t k = begin; k < end; ++k) {
    const char* row = segment + chosen.rows[k] * row_bytes;
    if (k + ahead < chosen.num_rows) prefetch(segment + chosen.rows[k + ahead] * row_bytes, U * Format::unit_bytes);
    Floats value[T];
    for (int t = 0; t < T; ++t) value[t] = broadcast(chosen.values[k * T + t]);
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

// out[t] = the product, for columns up to `num_columns`, a multiple of a unit.
template <typename Format, int T>
void multiply(const char* weights, int64_t row_bytes, int64_t num_columns, const ChosenRows& chosen,
              float* const* out) {
  // One token is limited by memory, where narrow segments of more rows are faster (by 1.0 to 1.15 in bf16).
  constexpr int wide = T == 1 ? kSumsAtOnce / 4 : std::max(1, kSumsAtOnce / 2 / T);
  constexpr int64_t stride = kColumnsAtOnce / kLanes;
  const int64_t block = rows_per_block(row_bytes), ahead = 2 * block;
  Floats sums[T * stride];
  for (int64_t begin = 0; begin < num_columns; begin += kColumnsAtOnce) {
    const int64_t units = (num_columns - begin < kColumnsAtOnce ? num_columns - begin : kColumnsAtOnce) / kUnit;
    const char* columns = weights + begin / kUnit * Format::unit_bytes;
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < 2 * units; ++i) sums[t * stride + i] = Floats{};
    for (int64_t k = 0; k < chosen.num_rows; k += block) {
      const int64_t end = k + block < chosen.num_rows ? k + block : chosen.num_rows;
      int64_t unit = 0;
      for (; unit + wide <= units; unit += wide)
        add_segment<Format, T, wide>(columns + unit * Format::unit_bytes, row_bytes, chosen, k, end, ahead,
                                     sums + 2 * unit, stride);
      for (; unit < units; ++unit)
        add_segment<Format, T, 1>(columns + unit * Format::unit_bytes, row_bytes, chosen, k, end, ahead,
                                  sums + 2 * unit, stride);
    }
    for (int t = 0; t < T; ++t)
      for (int64_t unit = 0; unit < units; ++unit) {
        Floats first = sums[t * stride + 2 * unit], second = sums[t * stride + 2 * unit + 1];
        Format::order(first, second);
        store(out[t] + begin + unit * kUnit, first);
        store(out[t] + begin + unit * kUnit + kLanes, second);
      }
  }
}

// Ternary weights, 2 bits each as code 0, 1 or 2 for -1, 0 or 1. In a block of 256 columns word w holds, two bits per
// step s, the columns 16 s + w: shifting all sixteen words by 2 s brings the codes of 16 adjacent columns to the bottom.
struct Ternary {
  static constexpr int64_t block_bytes = 64;
  static constexpr int64_t steps = 16;
  static constexpr int64_t words = 16;
};

// Two rows at a time: their codes are combined into fields of 4 bits, whose 16 values index a table of the amounts that the
// two weights add to the sum. Field i of `even` belongs to step 2 i, of `odd` to step 2 i + 1.
struct CodePairs {
  Words even, odd;
  CodePairs(Words first, Words second)
      : even((first & 0x33333333u) | ((second & 0x33333333u) << 2)),
        odd(((first >> 2) & 0x33333333u) | (second & 0xccccccccu)) {}
};

#ifdef __AVX512F__
// vpermps looks up the lowest 4 bits of every lane and ignores the others, so the fields need no masking.
struct PairTable {
  Floats entries;
  PairTable(float first, float second) {
    const Floats low = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0};
    const Floats high = {-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0};
    entries = first * low + second * high;
  }
  Floats of(Words fields) const { return (Floats)_mm512_permutexvar_ps((__m512i)fields, (__m512)entries); }
};
#elif defined(__AVX2__)
// vpermps of AVX2 looks up the lowest 3 bits: one row at a time, with the entries repeated for the bit of the next field.
struct PairTable {
  Floats first, second;
  PairTable(float first_, float second_) {
    const Floats weights = {-1, 0, 1, 0, -1, 0, 1, 0};
    first = weights * first_, second = weights * second_;
  }
  static Floats look_up(Floats table, Words fields) {
    return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)fields);
  }
  Floats of(Words fields) const { return look_up(first, fields) + look_up(second, fields >> 2); }
};
#else
struct PairTable {
  float first, second;
  PairTable(float first_, float second_) : first(first_), second(second_) {}
  static Floats weights(Words codes) { return __builtin_convertvector((Ints)(codes & 3u), Floats) - 1.0f; }
  Floats of(Words fields) const { return first * weights(fields) + second * weights(fields >> 2); }
};
#endif

// S of the 16 steps of one block of columns, from step S0 on; both even. All rows go through one block before the next
// one: a line of memory holds a block of a row, so that blocks of rows save nothing here (17 GB/s so at S 0.5, 11 in blocks).
// The block's sixteen words are one vector, or two that are processed one after the other: `block` and `out` begin at one of them.
template <int T, int S, int S0>
inline void multiply_ternary_steps(const char* block, int64_t row_bytes, const ChosenRows& chosen, float* const* out) {
  constexpr int64_t ahead = 32;
  const int64_t num_rows = chosen.num_rows;
  Floats sums[T][S] = {};
  for (int64_t k = 0; k < num_rows; k += 2) {
    // Rows are processed in pairs; an odd last row is paired with itself, with the value 0.
    const bool paired = k + 1 < num_rows;
    const int64_t other = paired ? k + 1 : k;
    if (S0 == 0 && k + ahead + 1 < num_rows) {
      prefetch(block + chosen.rows[k + ahead] * row_bytes, Ternary::block_bytes);
      prefetch(block + chosen.rows[k + ahead + 1] * row_bytes, Ternary::block_bytes);
    }
    const CodePairs codes(load<Words>(block + chosen.rows[k] * row_bytes),
                          load<Words>(block + chosen.rows[other] * row_bytes));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const PairTable table(chosen.values[k * T + t], paired ? chosen.values[other * T + t] : 0.0f);
#pragma GCC unroll 16
      for (int s = 0; s < S; s += 2) {
        sums[t][s] += table.of(codes.even >> (2 * (S0 + s)));
        sums[t][s + 1] += table.of(codes.odd >> (2 * (S0 + s)));
      }
    }
  }
  for (int t = 0; t < T; ++t)
    for (int s = 0; s < S; ++s) store(out[t] + (S0 + s) * Ternary::words, sums[t][s]);
}

template <int T, int S, int S0 = 0>
inline void multiply_ternary_block(const char* block, int64_t row_bytes, const ChosenRows& chosen, float* const* out) {
  multiply_ternary_steps<T, S, S0>(block, row_bytes, chosen, out);
  if constexpr (S0 + S < Ternary::steps) multiply_ternary_block<T, S, S0 + S>(block, row_bytes, chosen, out);
}

template <int T>
void multiply_ternary(const char* weights, int64_t row_bytes, int64_t num_columns, const ChosenRows& chosen,
                      float* const* out) {
  float* to[T];
  for (int64_t begin = 0; begin < num_columns; begin += kTernaryBlock)
    for (int64_t word = 0; word < Ternary::words; word += kLanes) {
      for (int t = 0; t < T; ++t) to[t] = out[t] + begin + word;
      const char* block = weights + begin / kTernaryBlock * Ternary::block_bytes + 4 * word;
      multiply_ternary_block<T, std::max(2, kSumsAtOnce / T)>(block, row_bytes, chosen, to);
    }
}

}  // namespace qsparse_moe

#include "integer_product.h"

namespace qsparse_moe {

enum class NumberFormat : int64_t { fp32 = 0, bf16 = 1, int8 = 2, ternary = 3 };

// A matrix (or a stack of them, one after another) as it is stored. `row_scales` and `scale` are folded into the values
// by the caller: a row's weight is code * row_scales[row] (int8) or code * scale (ternary).
struct Matrix {
  const char* data = nullptr;
  NumberFormat format = NumberFormat::fp32;
  int64_t num_columns = 0;  // padded
  int64_t row_bytes = 0;
  bool by_integers = true;  // codes are multiplied as integers, where the processor can; else in fp32
};

constexpr int kMaxTokens = 8;  // largest number of tokens per pass over the rows

// Prefetch the rows that `multiply` begins with, because its own prefetches would come too late for them.
inline void request_first_rows(const Matrix& matrix, const ChosenRows& chosen) {
  const int64_t count = std::min(chosen.num_rows, 2 * rows_per_block(matrix.row_bytes));
  for (int64_t k = 0; k < count; ++k) prefetch(matrix.data + chosen.rows[k] * matrix.row_bytes, matrix.row_bytes);
}

template <int T>
void multiply(const Matrix& matrix, const ChosenRows& chosen, float* const* out) {
#ifdef QSPARSE_MOE_INTEGER_PRODUCT
  const bool is_int8 = matrix.format == NumberFormat::int8, is_ternary = matrix.format == NumberFormat::ternary;
  if (matrix.by_integers && is_int8)
    return integer::multiply<integer::Int8Line, T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
  if (matrix.by_integers && is_ternary)
    return integer::multiply<integer::TernaryLine, T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
#endif
  switch (matrix.format) {
    case NumberFormat::fp32:
      return multiply<Fp32, T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
    case NumberFormat::bf16:
      return multiply<Bf16, T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
    case NumberFormat::int8:
      return multiply<Int8, T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
    case NumberFormat::ternary:
      return multiply_ternary<T>(matrix.data, matrix.row_bytes, matrix.num_columns, chosen, out);
  }
}

// The number of tokens that a pass is compiled for: 1, 2, 4 or 8. The caller pads values with 0 and `out` with spare rows.
inline int padded_tokens(int num_tokens) { return num_tokens <= 1 ? 1 : num_tokens <= 2 ? 2 : num_tokens <= 4 ? 4 : 8; }

// out[t] = sum over the chosen rows of values[row][t] * weights, for `tokens` tokens (padded).
inline void multiply(const Matrix& matrix, int tokens, const ChosenRows& chosen, float* const* out) {
  switch (tokens) {
    case 1: return multiply<1>(matrix, chosen, out);
    case 2: return multiply<2>(matrix, chosen, out);
    case 4: return multiply<4>(matrix, chosen, out);
    default: return multiply<8>(matrix, chosen, out);
  }
}

// Set [begin, end) to the part of `count` items for thread `thread` of `num_threads`, in whole grains.
inline void slice(int64_t count, int64_t grain, int thread, int num_threads, int64_t& begin, int64_t& end) {
  const int64_t grains = (count + grain - 1) / grain;
  begin = std::min(count, grains * thread / num_threads * grain);
  end = std::min(count, grains * (thread + 1) / num_threads * grain);
}

}  // namespace qsparse_moe
