// Philox4x32-10 (Salmon et al. 2011), the generator of attention's dropout mask. Internal linkage, as in simd.h.

#pragma once

#include <cstdint>

namespace stamp::cpu {
namespace {

constexpr int64_t kPhiloxLanes = 16;

// The words of the counters (first + i, c1, c2, c3), i < kPhiloxLanes, one array for each of the four. The loop over i
// is what the compiler turns into vectors.
inline void philox4x32(
    uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1,
    uint32_t (&words)[4][kPhiloxLanes]) {
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    uint32_t x0 = first + static_cast<uint32_t>(i), x1 = c1, x2 = c2, x3 = c3;
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = 0xD2511F53ull * x0, product1 = 0xCD9E8D57ull * x2;
      x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ k0;
      x1 = static_cast<uint32_t>(product1);
      x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ k1;
      x3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][i] = x0;
    words[1][i] = x1;
    words[2][i] = x2;
    words[3][i] = x3;
  }
}

}  // namespace
}  // namespace stamp::cpu
