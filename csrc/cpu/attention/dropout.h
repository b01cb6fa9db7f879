// The dropout mask of a tile of weights, from Philox4x32-10 (Salmon et al. 2011):
//
//     D_ij = 0 if word < threshold else 1 / (1 - p),     word = philox(seed, (j / 4, i, head, sequence))[j % 4]
//
// i and j are local indices, so the mask does not depend on the tiles. Internal linkage, for the reason given in
// cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/attention/tiles.h"

namespace stamp::cpu {
namespace {

constexpr int64_t kPhiloxLanes = 16;

// words[w][i] := word w of the counter (first + i, c1, c2, c3). The compiler turns the loop over i into vector code.
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

constexpr int64_t kKeysPerPhiloxCall = 4 * kPhiloxLanes;

// factors [num_keys, rounded up to kKeysPerPhiloxCall] := D_ij of one query i, given by its local index.
template <typename scalar>
void dropout_factors(const AttentionProblem& problem, const TilePlace& tile, int64_t query, scalar* factors) {
  static_assert(
      kKeysPerBlock % 4 == 0 && kKeysPerForwardBlock % 4 == 0, "the four keys of a counter must be in one block");
  const scalar keep_scale = static_cast<scalar>(problem.dropout.keep_scale);
  for (int64_t j = 0; j < tile.num_keys(); j += kKeysPerPhiloxCall) {
    uint32_t words[4][kPhiloxLanes];
    philox4x32(
        static_cast<uint32_t>((tile.start_key + j) / 4), static_cast<uint32_t>(query), static_cast<uint32_t>(tile.head),
        static_cast<uint32_t>(tile.sequence.index), problem.dropout.seed_low, problem.dropout.seed_high, words);
    for (int64_t i = 0; i < kPhiloxLanes; ++i) {
      factors[j + 4 * i] = words[0][i] < problem.dropout.threshold ? 0 : keep_scale;
      factors[j + 4 * i + 1] = words[1][i] < problem.dropout.threshold ? 0 : keep_scale;
      factors[j + 4 * i + 2] = words[2][i] < problem.dropout.threshold ? 0 : keep_scale;
      factors[j + 4 * i + 3] = words[3][i] < problem.dropout.threshold ? 0 : keep_scale;
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
