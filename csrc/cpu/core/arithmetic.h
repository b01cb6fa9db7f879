// Integer helpers. Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

namespace stamp::cpu {

template <typename T>
static constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
static constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

static constexpr int64_t divide_up(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}

static constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return divide_up(n, multiple) * multiple;
}

}  // namespace stamp::cpu
