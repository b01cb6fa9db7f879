// The number types of tensors as kernels compute with them, and the order of scores as that of unsigned keys.

#pragma once

#include <cstdint>
#include <cstring>

namespace stamp::cuda {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one type as those of another of its size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// float for all but double.
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

__device__ inline float to_compute(float x) {
  return x;
}

__device__ inline double to_compute(double x) {
  return x;
}

__device__ inline float to_compute(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

__device__ inline float to_compute(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and fraction moved into place, the exponent rebased by a product, which makes subnormals normal too.
  const float finite = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity or NaN
  return bits_as<float>(sign | (magnitude >= 0x7c00u ? special : bits_as<uint32_t>(finite)));
}

// One number by the cache for data that no kernel running now writes.
__device__ inline float load_number(const float* from) {
  return __ldg(from);
}

__device__ inline double load_number(const double* from) {
  return __ldg(from);
}

template <typename T>
__device__ inline float load_number(const T* from) {
  return to_compute(T{__ldg(&from->bits)});
}

// The place of a score in the order of scores, as an unsigned integer.
template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = unsigned long long;  // the 64 bits that shuffles know
};

template <typename Key>
constexpr Key kHighestKey = static_cast<Key>(~Key{0});  // no score has it: left for protected items
template <typename Key>
constexpr int kKeyBits = 8 * sizeof(Key);

// NaN is the lowest key, 0, and -0.0 has that of 0.0.
template <typename Score>
__device__ inline typename KeyOf<Score>::type key_of(Score score) {
  using Key = typename KeyOf<Score>::type;
  const Key sign = Key{1} << (kKeyBits<Key> - 1);
  const Key bits = bits_as<Key>(score + Score{0});  // -0.0 + 0.0 is 0.0
  // Negative numbers have the sign bit and a magnitude that falls as they rise.
  const Key ordered = (bits & sign) != 0 ? ~bits : bits | sign;
  return score == score ? ordered : Key{0};
}

}  // namespace stamp::cuda
