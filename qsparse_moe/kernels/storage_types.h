// How values are stored, as bit patterns, and what they are computed with: fp32, and fp64 for fp64. The conversions are
// shifts and sums of integers, which the compiler turns into vectors.

#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

namespace qsparse_moe {

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct Float32 {
  using Bits = uint32_t;
  using Wide = float;
  static Wide widen(Bits bits) { return bits_as<float>(bits); }
  static Bits narrow(Wide value) { return bits_as<uint32_t>(value); }
};

struct Float64 {
  using Bits = uint64_t;
  using Wide = double;
  static Wide widen(Bits bits) { return bits_as<double>(bits); }
  static Bits narrow(Wide value) { return bits_as<uint64_t>(value); }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Wide = float;
  static Wide widen(Bits bits) { return bits_as<float>(uint32_t(bits) << 16); }
  // Rounds halves to the even neighbour; rounding a NaN could make it infinite, so it is written out.
  static Bits narrow(Wide value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return Bits((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Wide = float;
  static Wide widen(Bits bits) { return float(c10::Half(bits, c10::Half::from_bits())); }
  static Bits narrow(Wide value) { return c10::Half(value).x; }
};

}  // namespace qsparse_moe
