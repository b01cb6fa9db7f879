// Collectives of a warp. All lanes must call them.

#pragma once

#include <cstdint>

namespace stamp::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

// The lanes below this one, as a mask.
__device__ inline unsigned lanes_below() {
  return (1u << lane_index()) - 1u;
}

__device__ inline int32_t warp_sum(int32_t x) {
  return static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(x)));
}

template <typename Key>
__device__ inline Key warp_min(Key x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = min(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

template <typename Key>
__device__ inline Key warp_max(Key x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

// The sum of x over the lanes up to and including this one.
template <typename T>
__device__ inline T warp_running_sum(T x) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, distance);
    x += lane_index() >= distance ? below : T{0};
  }
  return x;
}

}  // namespace stamp::cuda
