// The dtypes of tensors, the type that each is computed in, and the rounding to the 16-bit ones. Functions have
// internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/core/arithmetic.h"

namespace stamp::cpu {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

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

namespace {

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "both types must have the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float x) {
  return x;
}

inline float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and fraction move into place. The product corrects the exponent's bias and makes subnormals normal.
  const float finite = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity or NaN
  return bits_as<float>(sign | (magnitude >= 0x7c00u ? special : bits_as<uint32_t>(finite)));
}

inline void from_float(float x, float& to) {
  to = x;
}

// Rounds to nearest, ties to even. NaN stays NaN.
inline void from_float(float x, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

inline void from_float(float x, Half& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // A number with exponent e plus 2^(e + 13) keeps the ten bits of its fraction, and the hardware rounds them. The
  // exponent is at least that of the smallest normal number, so subnormal numbers keep fewer bits.
  const uint32_t exponent = larger<uint32_t>(magnitude & 0x7f800000u, 113u << 23);
  const float anchor = bits_as<float>(exponent + (13u << 23));
  const uint32_t fraction = bits_as<uint32_t>(bits_as<float>(magnitude) + anchor) - bits_as<uint32_t>(anchor);
  const uint32_t finite = (((exponent >> 23) - 113u) << 10) + fraction;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : smaller<uint32_t>(finite, 0x7c00u)));
}

}  // namespace
}  // namespace stamp::cpu
