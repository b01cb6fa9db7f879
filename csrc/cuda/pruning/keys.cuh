// Importance as unsigned keys of the same order: NaN has the lowest key, 0, and -0.0 has the key of 0.0.

#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cuda/core/dtypes.cuh"
#include "cuda/pruning/selection_problem.cuh"

namespace stamp::cuda {

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
constexpr Key kHighestKey = static_cast<Key>(~Key{0});  // no importance has it: it marks protected items
template <typename Key>
constexpr int kKeyBits = 8 * sizeof(Key);

template <typename scalar>
__device__ inline typename KeyOf<scalar>::type key_of(scalar importance) {
  using Key = typename KeyOf<scalar>::type;
  const Key sign = Key{1} << (kKeyBits<Key> - 1);
  const Key bits = bits_as<Key>(importance + scalar{0});  // -0.0 + 0.0 is 0.0
  // A negative number has the sign bit, and its magnitude falls as the number rises: flip all bits.
  const Key ordered = (bits & sign) != 0 ? ~bits : bits | sign;
  return importance == importance ? ordered : Key{0};
}

// The key of an item, for importance of type T.
template <typename T>
using ItemKey = typename KeyOf<Compute<T>>::type;

// keys := the keys of the items first, first + stride, ... of a sequence, 0 from end_items on. The importance of an
// item is the sum over its tokens. The first tokens of all items are loaded before the second ones, so that loads
// overlap.
template <typename T, int kCount>
__device__ inline void load_keys(
    const SelectionProblem& problem, const T* importance, int32_t first_row, int32_t first, int32_t stride,
    int32_t end_items, ItemKey<T> (&keys)[kCount]) {
  const int64_t codes_per_item = problem.codes_per_item;
  const auto first_token = [&](int j) {
    return first_row + (first + static_cast<int64_t>(j) * stride) * codes_per_item;
  };
  const auto exists = [&](int j) { return first + j * stride < end_items; };
  Compute<T> sums[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    sums[j] = exists(j) ? load_number(importance + first_token(j)) : 0;
  }
#pragma unroll 1
  for (int32_t token = 1; token < problem.codes_per_item; ++token) {  // in this order, which decides the bits
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sums[j] += exists(j) ? load_number(importance + first_token(j) + token) : 0;
    }
  }
  static_assert(kCount <= 32, "a bit for each item");
  uint32_t protected_items = 0;
  if (problem.protect != nullptr) {
#pragma unroll 1
    for (int32_t token = 0; token < problem.codes_per_item; ++token) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const bool is_protected = exists(j) && __ldg(problem.protect + first_token(j) + token) != 0;
        protected_items |= static_cast<uint32_t>(is_protected) << j;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const ItemKey<T> key = (protected_items >> j & 1u) != 0 ? kHighestKey<ItemKey<T>> : key_of(sums[j]);
    keys[j] = exists(j) ? key : ItemKey<T>{0};
  }
}

}  // namespace stamp::cuda
