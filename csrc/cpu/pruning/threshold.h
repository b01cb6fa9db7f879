// The threshold that keeps the best k of n keys, without sorting: the largest key that at least k keys reach, found by
// bisection. Each step counts the keys that reach the middle. For random keys exactly k reach it after about log2(n)
// steps.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/core/simd.h"
#include "cpu/pruning/kernels.h"

namespace stamp::cpu {
namespace {

// How many keys reach a threshold above the lowest key.
template <typename V>
int64_t count_reaching(const typename V::integer* keys, int64_t n, typename V::integer threshold) {
  constexpr int kCounts = kKeysPerVector / V::width;
  typename V::integers counts[kCounts] = {};
  for (int64_t i = 0; i < n; i += kKeysPerVector) {
#pragma GCC unroll 8
    for (int j = 0; j < kCounts; ++j) {
      typename V::integers vector;
      __builtin_memcpy(&vector, keys + i + j * V::width, sizeof(vector));
      counts[j] -= vector >= threshold;  // a comparison that holds is -1
    }
  }
  int64_t count = 0;
#pragma GCC unroll 8
  for (int j = 0; j < kCounts; ++j) {
    for (int lane = 0; lane < V::width; ++lane) {
      count += counts[j][lane];
    }
  }
  return count;
}

template <typename V>
Threshold<typename V::integer> find_threshold(const typename V::integer* keys, int64_t n, int64_t k) {
  using Key = typename V::integer;
  using Unsigned = std::make_unsigned_t<Key>;
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  // At least k keys reach `low`, and fewer than k reach any key above `high`.
  while (low < high) {
    const Unsigned distance = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const Key middle = static_cast<Key>(static_cast<Unsigned>(low) + (distance / 2 + distance % 2));
    const int64_t count = count_reaching<V>(keys, n, middle);
    if (count == k) {
      return {middle, n};
    }
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t above = low == KeyOf<typename V::scalar>::highest ? 0 : count_reaching<V>(keys, n, low + 1);
  return {low, k - above};
}

}  // namespace
}  // namespace stamp::cpu
