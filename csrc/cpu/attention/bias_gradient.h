// The gradient of the bias table, from the score gradients of a tile:
//
//     dbias[head, bucket] += sum of dS_ij over the pairs (i, j) of the tile in the bucket
//
// The sum over a tile is in the compute type, the sum over tiles in double. Internal linkage, for the reason given in
// cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/bias.h"

namespace stamp::cpu {
namespace {

// dbias [num_buckets] of the tile's head.
template <typename V>
void add_dbias(
    const AttentionProblem& problem, const TilePlace& tile, ScoreTile<V> dscores, const BiasScratch<V>& scratch,
    double* dbias) {
  using scalar = typename V::scalar;
  if (!positions_are_indices(problem)) {
    // Neighbouring keys often share a bucket. Four sums for each bucket keep an addition from waiting for the one
    // before.
    scalar* lanes = scratch.lanes;
    for (int64_t b = 0; b < 4 * problem.bias.num_buckets; ++b) {
      lanes[b] = 0;
    }
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      entries_of_row(problem, tile, i, scratch.entries);
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        lanes[4 * problem.bias.bucket_of_entry[scratch.entries[j]] + j % 4] += dscores[i][j];
      }
    }
    for (int64_t b = 0; b < problem.bias.num_buckets; ++b) {
      dbias[b] += (static_cast<double>(lanes[4 * b]) + lanes[4 * b + 1]) + (lanes[4 * b + 2] + lanes[4 * b + 3]);
    }
    return;
  }
  for (int64_t x = 0; x < num_diagonals(tile) + V::width; ++x) {
    scratch.diagonals[x] = 0;
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    scalar* diagonals = scratch.diagonals + tile.num_queries() - 1 - i;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(diagonals + j, V::load(diagonals + j) + V::load(dscores[i] + j));
    }
  }
  for (int64_t x = 0; x < num_diagonals(tile); ++x) {
    dbias[problem.bias.bucket_of_entry[entry_of_diagonal(problem, tile, x)]] += scratch.diagonals[x];
  }
}

}  // namespace
}  // namespace stamp::cpu
