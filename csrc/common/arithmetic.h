// Integer helpers, the same on every device. Internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define STAMP_HOST_DEVICE __host__ __device__
#else
#define STAMP_HOST_DEVICE
#endif

namespace stamp {

template <typename T>
STAMP_HOST_DEVICE static constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
STAMP_HOST_DEVICE static constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

STAMP_HOST_DEVICE static constexpr int64_t divide_up(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}

STAMP_HOST_DEVICE static constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return divide_up(n, multiple) * multiple;
}

}  // namespace stamp
