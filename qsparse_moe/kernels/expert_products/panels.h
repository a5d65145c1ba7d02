// Blocks of a matrix product in registers, and the packing of the matrix that they share.
//
// Everything is made of 32-bit units: one fp32 value, or two bf16 values that follow each other in depth. So fp32 and
// bf16 share all loops, and only one instruction differs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../storage_types.h"

namespace qsparse_moe {

// 24 of the 32 registers of AVX-512, and 12 of the 16 of AVX2, hold sums. GCC keeps vectors wider than a register in
// memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24;
#else
constexpr int kLanes = 8, kSums = 12;
#endif
constexpr int kMostVectors = 4, kMostRows = 8;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float LooseLanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t UnitLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t LooseUnits __attribute__((vector_size(4 * kLanes), aligned(4)));

constexpr int rows_for(int vectors) { return std::min(kMostRows, kSums / vectors); }

inline uint32_t load_unit(const uint32_t* unit) {
  // bf16 rows begin at any even address.
  uint32_t bits;
  std::memcpy(&bits, unit, sizeof bits);
  return bits;
}

struct SingleUnit {
  using Storage = Float32;
  static Lanes add_product(Lanes sum, uint32_t a, Lanes b) { return sum + bits_as<float>(a) * b; }
};

#if defined(__AVX512BF16__)
struct PairUnit {
  using Storage = BFloat16;
  static Lanes add_product(Lanes sum, uint32_t a, Lanes b) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

// Add a product to `rows` x `vectors` sums. The left matrix is read through one pointer per row of the result
// (`left[row][depth]`), or through one per step in depth (`left[depth][row]`), so that its rows may lie anywhere.
template <typename Unit, int rows, int vectors, bool left_by_depth>
inline __attribute__((always_inline)) void add_block(const uint32_t* const* left, int64_t first_row,
                                                     const uint32_t* panel, int64_t depth,
                                                     Lanes (&sums)[rows][vectors]) {
  const uint32_t* left_rows[rows];
  if constexpr (!left_by_depth)
    for (int row = 0; row < rows; ++row) left_rows[row] = left[first_row + row];
  for (int64_t step = 0; step < depth; ++step) {
    Lanes right[vectors];
#pragma GCC unroll 4
    for (int vector = 0; vector < vectors; ++vector)
      right[vector] = *reinterpret_cast<const LooseLanes*>(panel + (step * vectors + vector) * kLanes);
    const uint32_t* at_depth = left_by_depth ? left[step] + first_row : nullptr;
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const uint32_t unit = load_unit(left_by_depth ? at_depth + row : left_rows[row] + step);
#pragma GCC unroll 4
      for (int vector = 0; vector < vectors; ++vector)
        sums[row][vector] = Unit::add_product(sums[row][vector], unit, right[vector]);
    }
  }
}

inline void store_lanes(Lanes sums, Float32::Bits* out) { *reinterpret_cast<LooseLanes*>(out) = sums; }

#if defined(__AVX512BF16__)
inline void store_lanes(Lanes sums, BFloat16::Bits* out) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)sums);
  std::memcpy(out, &rounded, sizeof rounded);
}
#endif

// Store the sums of a row of which only the first `columns` belong to the result.
template <typename Storage>
__attribute__((noinline)) void store_part(const float* sums, typename Storage::Bits* out, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) out[i] = Storage::narrow(sums[i]);
}

// One part of a sum of products: the pointers of the left matrix and the packed panel of the right one.
struct Term {
  const uint32_t* const* left;
  const uint32_t* panel;
};

// Compute `rows` rows of a panel's columns: the sum over `num_terms` products, rounded once.
template <typename Unit, int rows, int vectors, bool left_by_depth>
void block(const Term* terms, int num_terms, int64_t first_row, int64_t depth, typename Unit::Storage::Bits* out,
           int64_t stride, int64_t columns) {
  Lanes sums[rows][vectors] = {};
  for (int term = 0; term < num_terms; ++term)
    add_block<Unit, rows, vectors, left_by_depth>(terms[term].left, first_row, terms[term].panel, depth, sums);
  out += first_row * stride;
  if (columns == vectors * kLanes) {
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int vector = 0; vector < vectors; ++vector)
        store_lanes(sums[row][vector], out + row * stride + vector * kLanes);
    return;
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
    alignas(64) float values[vectors * kLanes];
#pragma GCC unroll 4
    for (int vector = 0; vector < vectors; ++vector)
      std::memcpy(values + vector * kLanes, &sums[row][vector], sizeof(Lanes));
    store_part<typename Unit::Storage>(values, out + row * stride, columns);
  }
}

// Compute all rows of a panel's columns, in blocks of the most rows, of half of them, and of one. The last block may
// begin at a row that has been computed: an element has the same value in every block.
template <typename Unit, int vectors, bool left_by_depth>
void all_blocks(const Term* terms, int num_terms, int64_t num_rows, int64_t depth, typename Unit::Storage::Bits* out,
                int64_t stride, int64_t columns) {
  constexpr int most = rows_for(vectors), half = most / 2;
  int64_t row = 0;
  while (num_rows - row > half && num_rows >= most) {
    row = std::min(row, num_rows - most);
    block<Unit, most, vectors, left_by_depth>(terms, num_terms, row, depth, out, stride, columns);
    row += most;
  }
  while (row < num_rows && num_rows >= half) {
    row = std::min(row, num_rows - half);
    block<Unit, half, vectors, left_by_depth>(terms, num_terms, row, depth, out, stride, columns);
    row += half;
  }
  for (; row < num_rows; ++row)
    block<Unit, 1, vectors, left_by_depth>(terms, num_terms, row, depth, out, stride, columns);
}

template <typename Unit, bool left_by_depth>
void all_blocks(int vectors, const Term* terms, int num_terms, int64_t num_rows, int64_t depth,
                typename Unit::Storage::Bits* out, int64_t stride, int64_t columns) {
  constexpr decltype(&all_blocks<Unit, 1, left_by_depth>) by_vectors[] = {
      all_blocks<Unit, 1, left_by_depth>, all_blocks<Unit, 2, left_by_depth>, all_blocks<Unit, 3, left_by_depth>,
      all_blocks<Unit, 4, left_by_depth>};
  by_vectors[vectors - 1](terms, num_terms, num_rows, depth, out, stride, columns);
}

// Panels of three vectors leave the most sums per value read; four divide the widths that are powers of two.
inline int vectors_per_panel(int64_t columns) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  if (vectors % 3 == 0) return 3;
  return vectors % 4 == 0 ? 4 : (vectors < 3 ? int(vectors) : 3);
}

// Rows of a panel lie far apart, so that the processor's own prefetcher does not find the next ones.
constexpr int64_t kRowsAhead = 16, kLineBytes = 64;

inline void prefetch(const void* first, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += kLineBytes)
    __builtin_prefetch(static_cast<const char*>(first) + offset);
}

// The units of an fp32 matrix (depth, columns).
inline void pack_rows(const uint32_t* matrix, int64_t stride, int64_t depth, int64_t columns, int64_t width,
                      uint32_t* panel) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t step = 0; step < depth; ++step, matrix += stride, panel += width) {
    prefetch(matrix + kRowsAhead * stride, columns * sizeof(uint32_t));
    // Vectors and no memcpy, which would be a call for every row of 200 bytes.
    for (int64_t i = 0; i < whole; i += kLanes)
      *reinterpret_cast<LooseUnits*>(panel + i) = *reinterpret_cast<const LooseUnits*>(matrix + i);
    for (int64_t i = whole; i < width; ++i) panel[i] = i < columns ? matrix[i] : 0;
  }
}

// The units of a bf16 matrix (depth, columns): two rows interleaved, with zeros behind an odd last one.
inline void pack_row_pairs(const uint16_t* const* rows, int64_t depth, int64_t first, int64_t columns, int64_t width,
                           uint32_t* panel) {
  for (int64_t step = 0; step < depth; step += 2, panel += width) {
    const uint16_t *even = rows[step] + first, *odd = step + 1 < depth ? rows[step + 1] + first : nullptr;
    for (int64_t ahead = step + kRowsAhead; ahead < std::min(step + kRowsAhead + 2, depth); ++ahead)
      prefetch(rows[ahead] + first, columns * sizeof(uint16_t));
    if (odd)
      for (int64_t i = 0; i < columns; ++i) panel[i] = uint32_t(even[i]) | uint32_t(odd[i]) << 16;
    else
      for (int64_t i = 0; i < columns; ++i) panel[i] = even[i];
    for (int64_t i = columns; i < width; ++i) panel[i] = 0;
  }
}

// Of the exchange below: which lanes of two vectors make the first result, and which the second.
template <int distance>
struct Exchanged {
  alignas(64) uint32_t low[kLanes], high[kLanes];
  constexpr Exchanged() : low(), high() {
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & distance ? kLanes + lane - distance : lane;
      high[lane] = lane & distance ? kLanes + lane : lane + distance;
    }
  }
};

template <int distance>
inline __attribute__((always_inline)) void exchange(UnitLanes (&v)[kLanes]) {
  static constexpr Exchanged<distance> lanes;
  const UnitLanes low = *reinterpret_cast<const UnitLanes*>(lanes.low);
  const UnitLanes high = *reinterpret_cast<const UnitLanes*>(lanes.high);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & distance) continue;
    const UnitLanes a = v[i], b = v[i + distance];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + distance] = __builtin_shuffle(a, b, high);
  }
}

// Transpose a square of units: out[i][j] = in[j][i]. Each exchange swaps the off-diagonal halves of smaller squares.
inline void transpose_square(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
  UnitLanes v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = *reinterpret_cast<const LooseUnits*>(in + i * stride);
  exchange<1>(v);
  exchange<2>(v);
  exchange<4>(v);
  if constexpr (kLanes > 8) exchange<8>(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) *reinterpret_cast<LooseUnits*>(out + i * out_stride) = v[i];
}

// The units of a matrix that is stored transposed, (columns, depth).
inline void pack_columns(const uint32_t* matrix, int64_t stride, int64_t depth, int64_t columns, int64_t width,
                         uint32_t* panel) {
  const int64_t whole_columns = columns / kLanes * kLanes, whole_depth = depth / kLanes * kLanes;
  for (int64_t column = 0; column < whole_columns; column += kLanes)
    for (int64_t step = 0; step < whole_depth; step += kLanes) {
      for (int64_t row = column + kLanes; row < column + 2 * kLanes; ++row) prefetch(matrix + row * stride + step, 1);
      transpose_square(matrix + column * stride + step, stride, panel + step * width + column, width);
    }
  for (int64_t step = 0; step < depth; ++step) {
    const int64_t first = step < whole_depth ? whole_columns : 0;
    for (int64_t column = first; column < columns; ++column)
      panel[step * width + column] = load_unit(matrix + column * stride + step);
    for (int64_t column = columns; column < width; ++column) panel[step * width + column] = 0;
  }
}

}  // namespace qsparse_moe
