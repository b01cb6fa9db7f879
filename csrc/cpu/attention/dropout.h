// The dropout mask of a tile of weights, from Philox4x32-7 (Salmon et al. 2011). For query i and key j
//
//     D_ij = 0 if word < threshold else 1 / (1 - p)
//     word = philox(seed, (group(i), group(j), head, sequence))[2 * bit 3 of i + bit 3 of j]
//     group(n) = n / 16 * 8 + n % 8, the place of n among the indices whose bit 3 is 0
//
// so that the four words of a counter belong to two queries and two keys, 8 apart: on a GPU one thread holds them. i
// and j are local indices, so the mask does not depend on the tiles. Internal linkage, for the reason given in
// cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/arithmetic.h"
#include "cpu/core/scratch.h"

namespace stamp::cpu {
namespace {

constexpr int64_t kPhiloxLanes = 16;

// words[w][i] := word w of the counter (c0, first + i, c2, c3). The compiler turns the loop over i into vector code.
inline void philox4x32(
    uint32_t c0, uint32_t first, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1,
    uint32_t (&words)[4][kPhiloxLanes]) {
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    uint32_t x0 = c0, x1 = first + static_cast<uint32_t>(i), x2 = c2, x3 = c3;
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
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

// D of kQueries queries, a row each. A row is as long as the lanes of a Philox call need.
template <typename scalar>
struct DropoutFactors {
  static constexpr int64_t kQueries = 16;
  static constexpr int64_t kKeysPerCall = 2 * kPhiloxLanes;
  static_assert(
      kQueriesPerTile % kQueries == 0 && kKeysPerBlock % 16 == 0 && kKeysPerForwardBlock % 16 == 0,
      "the pairs of a counter must be in one tile");

  scalar* data;
  int64_t row;

  static DropoutFactors take(Scratch& scratch, const AttentionProblem& problem, int64_t num_keys) {
    const int64_t row = round_up(num_keys, kKeysPerCall);
    return {problem.dropout.is_active ? scratch.take<scalar>(kQueries * row) : nullptr, row};
  }

  // D of query i of a tile, counted from the tile's first. Draws when i reaches the first of kQueries queries.
  const scalar* of_query(const AttentionProblem& problem, const TilePlace& tile, int64_t i) const {
    if (i % kQueries == 0) {
      draw(problem, tile, i);
    }
    return data + i % kQueries * row;
  }

  void draw(const AttentionProblem& problem, const TilePlace& tile, int64_t first) const {
    const uint32_t threshold = problem.dropout.threshold;
    const scalar keep_scale = static_cast<scalar>(problem.dropout.keep_scale);
    for (int64_t i = 0; i < smaller<int64_t>(8, tile.num_queries() - first); ++i) {
      for (int64_t j = 0; j < tile.num_keys(); j += kKeysPerCall) {
        uint32_t words[4][kPhiloxLanes];
        philox4x32(
            static_cast<uint32_t>((tile.start_query + first) / 2 + i), static_cast<uint32_t>((tile.start_key + j) / 2),
            static_cast<uint32_t>(tile.head), static_cast<uint32_t>(tile.sequence.index), problem.dropout.seed_low,
            problem.dropout.seed_high, words);
        for (int64_t word = 0; word < 4; ++word) {
          scalar* factors = data + (i + word / 2 * 8) * row + j + word % 2 * 8;
          for (int64_t lane = 0; lane < 8; ++lane) {
            factors[lane] = words[word][lane] < threshold ? 0 : keep_scale;
            factors[16 + lane] = words[word][8 + lane] < threshold ? 0 : keep_scale;
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace stamp::cpu
