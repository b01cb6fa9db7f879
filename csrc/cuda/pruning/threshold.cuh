// The threshold that keeps the best k of n keys of a sequence, without sorting.

#pragma once

#include <cstdint>

#include "cuda/core/warp.cuh"
#include "cuda/pruning/keys.cuh"

namespace stamp::cuda {

// What is kept of some keys: those above `key`, and the first `num_ties` of those that equal it.
template <typename Key>
struct Threshold {
  Key key;
  int32_t num_ties;
};

template <typename Key>
__device__ inline Threshold<Key> threshold_of_nothing() {
  return {kHighestKey<Key>, 0};
}

// The threshold that keeps k of n keys, 0 <= k <= n, by one warp: lane l has the keys of items l, l + 32, ... Bisection
// until exactly k keys reach the middle, for random keys after about log2(n) counts, or until one key is left.
template <typename Key, int kKeysPerLane>
__device__ inline Threshold<Key> find_threshold_by_warp(const Key (&keys)[kKeysPerLane], int32_t n, int32_t k) {
  if (k == n) {
    return {Key{0}, n};
  }
  if (k == 0) {
    return threshold_of_nothing<Key>();
  }
  Key low = kHighestKey<Key>, high = 0;
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) {
    const bool exists = j * kWarpSize + lane_index() < n;
    low = exists ? min(low, keys[j]) : low;
    high = max(high, keys[j]);  // where there is no item the key is 0
  }
  low = warp_min(low);
  high = warp_max(high);
  const auto count_from = [&](Key threshold) {  // threshold >= 1: the key 0 of lanes without an item does not reach it
    int32_t count = 0;
#pragma unroll
    for (int j = 0; j < kKeysPerLane; ++j) {
      count += keys[j] >= threshold;
    }
    return warp_sum(count);
  };
  // At least k keys reach `low`, and fewer than k reach any key above `high`.
  while (low < high) {
    const Key distance = high - low;
    const Key middle = low + (distance / 2 + distance % 2);
    const int32_t count = count_from(middle);
    if (count == k) {
      return {middle, n};
    }
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, low == kHighestKey<Key> ? k : k - count_from(low + 1)};
}

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
// A thread loads this many keys of a long sequence at a time.
constexpr int kKeysInFlight = 4;

// Calls visit(item, key) for the items first, first + stride, ... below end_items. fetch(first, stride, end_items,
// keys) loads kKeysInFlight keys at a time.
template <typename Key, typename Fetch, typename Visit>
__device__ inline void for_keys(
    int32_t first, int32_t stride, int32_t end_items, const Fetch& fetch, const Visit& visit) {
#pragma unroll 1
  for (int32_t item = first; item < end_items; item += kKeysInFlight * stride) {
    Key keys[kKeysInFlight];
    fetch(item, stride, end_items, keys);
#pragma unroll
    for (int j = 0; j < kKeysInFlight; ++j) {
      if (item + j * stride < end_items) {
        visit(item + j * stride, keys[j]);
      }
    }
  }
}

// The shared memory of find_threshold_by_block.
struct DigitScratch {
  int32_t histogram[kDigits];
  int32_t digit;            // the next digit of the threshold
  int32_t keys_above;       // the number of keys with a higher digit
  int32_t keys_with_digit;  // the number of keys with this digit
};

// Finds the digit of the `rank`-th highest of the counted keys. Called by one warp: lane l has the digits that are
// 8 l-th, ..., 8 l + 7-th from the top.
__device__ inline void find_digit(DigitScratch& scratch, int32_t rank) {
  constexpr int kDigitsPerLane = kDigits / kWarpSize;
  const int highest_digit = kDigits - 1 - lane_index() * kDigitsPerLane;
  int32_t count_of_lane = 0;
#pragma unroll
  for (int i = 0; i < kDigitsPerLane; ++i) {
    count_of_lane += scratch.histogram[highest_digit - i];
  }
  int32_t above = warp_running_sum(count_of_lane) - count_of_lane;
  if (above >= rank || above + count_of_lane < rank) {
    return;
  }
  for (int digit = highest_digit;; --digit) {
    const int32_t count = scratch.histogram[digit];
    if (above + count >= rank) {
      scratch.digit = digit;
      scratch.keys_above = above;
      scratch.keys_with_digit = count;
      return;
    }
    above += count;
  }
}

// The threshold that keeps k of n keys, 0 <= k <= n, by one block, one digit at a time from the highest (radix select):
// among the keys that share the digits found so far, a histogram of their next digit gives the threshold's.
template <typename Key, int kThreads, typename Fetch>
__device__ inline Threshold<Key> find_threshold_by_block(
    int32_t n, int32_t k, const Fetch& fetch, DigitScratch& scratch) {
  if (k == n) {
    return {Key{0}, n};
  }
  if (k == 0) {
    return threshold_of_nothing<Key>();
  }
  const int thread = static_cast<int>(threadIdx.x);
  Key prefix = 0;
  int32_t rank = k;  // the threshold is the rank-th highest of the keys that share the digits so far
  for (int shift = kKeyBits<Key> - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = thread; digit < kDigits; digit += kThreads) {
      scratch.histogram[digit] = 0;
    }
    __syncthreads();
    for_keys<Key>(thread, kThreads, n, fetch, [&](int32_t, Key key) {
      const Key digits = key >> shift;
      if (digits >> kDigitBits == prefix) {
        atomicAdd(&scratch.histogram[static_cast<int>(digits % kDigits)], 1);
      }
    });
    __syncthreads();
    if (warp_index() == 0) {
      find_digit(scratch, rank);
    }
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<Key>(scratch.digit);
    rank -= scratch.keys_above;
    if (rank == scratch.keys_with_digit) {  // all keys that share the digits so far are kept
      return {prefix << shift, n};
    }
  }
  return {prefix, rank};
}

}  // namespace stamp::cuda
