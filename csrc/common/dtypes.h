// The 16-bit dtypes, and the type that each dtype is computed in, the same on every device. Functions have internal
// linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/arithmetic.h"

namespace stamp {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// float, or double for double.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

template <typename To, typename From>
STAMP_HOST_DEVICE static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "both types must have the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

STAMP_HOST_DEVICE static inline float to_float(float x) {
  return x;
}

STAMP_HOST_DEVICE static inline float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

STAMP_HOST_DEVICE static inline float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and fraction move into place. The product corrects the exponent's bias and makes subnormals normal.
  const float finite = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity or NaN
  return bits_as<float>(sign | (magnitude >= 0x7c00u ? special : bits_as<uint32_t>(finite)));
}

}  // namespace stamp
