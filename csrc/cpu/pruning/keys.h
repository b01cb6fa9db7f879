// Importance as integer keys of the same order: NaN is the lowest key, and -0.0 has the key of 0.0. Functions have
// internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/core/dtypes.h"

namespace stamp::cpu {

template <typename scalar>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  static constexpr type lowest = INT32_MIN, highest = INT32_MAX;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  static constexpr type lowest = INT64_MIN, highest = INT64_MAX;
};

namespace {

// No importance has the highest key: it marks protected items.
template <typename scalar>
typename KeyOf<scalar>::type key_of(scalar importance) {
  using Key = typename KeyOf<scalar>::type;
  const Key bits = bits_as<Key>(importance + scalar{0});  // -0.0 + 0.0 is 0.0
  // A negative number has the sign bit, and its magnitude falls as the number rises: flip the magnitude.
  const Key ordered = bits ^ ((bits >> (8 * sizeof(Key) - 1)) & KeyOf<scalar>::highest);
  return importance == importance ? ordered : KeyOf<scalar>::lowest;
}

}  // namespace
}  // namespace stamp::cpu
