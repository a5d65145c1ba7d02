// Sums and functions over rows of fp32, in vectors. The remaining values of a row are processed one by one.

#pragma once

#include <cmath>
#include <cstdint>

#include "../row_product/row_product.h"

namespace qsparse_moe {

// e^x as 2^n e^r with |r| <= ln(2)/2, the polynomial being that of Cephes' expf.
inline Floats exponential(Floats x) {
  const Floats low = broadcast(-87.3f), high = broadcast(88.3f), rounder = broadcast(12582912.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats n = (x * 1.44269504f + rounder) - rounder;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Floats)exponent;
}

inline float dot(const float* a, const float* b, int64_t length) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    sums[0] += load<Floats>(a + i) * load<Floats>(b + i);
    sums[1] += load<Floats>(a + i + kLanes) * load<Floats>(b + i + kLanes);
  }
  float total = 0;
  for (; i < length; ++i) total += a[i] * b[i];
  return total + sum(sums[0] + sums[1]);
}

// `to` = the sum over `count` rows of weights[i] * row i. Four vectors of columns at a time are summed in registers.
inline void weighted_sum(const float* rows, const float* weights, int64_t count, int64_t length, float* to) {
  int64_t begin = 0;
  for (; begin + 4 * kLanes <= length; begin += 4 * kLanes) {
    Floats sums[4] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int part = 0; part < 4; ++part)
        sums[part] += load<Floats>(rows + i * length + begin + part * kLanes) * weights[i];
    for (int part = 0; part < 4; ++part) store(to + begin + part * kLanes, sums[part]);
  }
  for (; begin + kLanes <= length; begin += kLanes) {
    Floats total = {};
    for (int64_t i = 0; i < count; ++i) total += load<Floats>(rows + i * length + begin) * weights[i];
    store(to + begin, total);
  }
  for (; begin < length; ++begin) {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += rows[i * length + begin] * weights[i];
    to[begin] = total;
  }
}

// `to` = x / sqrt(mean(x^2) + epsilon) * weight
inline void rms_norm(const float* x, const float* weight, float epsilon, float* to, int64_t length) {
  const float scale = 1.0f / std::sqrt(dot(x, x, length) / float(length) + epsilon);
  for (int64_t i = 0; i < length; ++i) to[i] = x[i] * scale * weight[i];
}

enum class Activation : int64_t { swiglu = 0, relu2glu = 1, reglu = 2, drelu = 3, relu2 = 4 };

inline Floats relu(Floats x) { return x < Floats{} ? Floats{} : x; }

inline Floats activate(Activation activation, Floats gate, Floats up) {
  switch (activation) {
    case Activation::swiglu: return gate / (1.0f + exponential(-gate)) * up;
    case Activation::relu2glu: return relu(gate) * relu(gate) * up;
    case Activation::reglu: return relu(gate) * up;
    case Activation::drelu: return relu(gate) * relu(up);
    case Activation::relu2: return relu(up) * relu(up);
  }
  return up;
}

// `hidden` = activation(gate, up); all three are padded to whole vectors, and `gate` may be `hidden`, or null without one.
inline void activate_row(Activation activation, const float* gate, const float* up, float* hidden, int64_t length) {
  for (int64_t i = 0; i < length; i += kLanes) {
    const Floats up_lanes = load<Floats>(up + i);
    const Floats gate_lanes = gate ? load<Floats>(gate + i) : up_lanes;
    store(hidden + i, activate(activation, gate_lanes, up_lanes));
  }
}

}  // namespace qsparse_moe
