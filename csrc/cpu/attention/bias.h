// The relative position bias of a tile of scores:
//
//     S_ij += bias[head, bucket(position_k[j] - position_q[i])]
//
// Without positions, the distances of a tile are constant along its diagonals, so a row of the tile adds a run of
// consecutive table entries. With positions, each pair has an entry of its own: its distance or, where positions lie
// too far apart for a table of distances, its bucket. Internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/attention/tiles.h"
#include "cpu/core/arithmetic.h"
#include "cpu/core/scratch.h"

namespace stamp::cpu {
namespace {

// The entry of a distance, where entries are distances.
inline int64_t entry_of_distance(const AttentionProblem& problem, int64_t distance) {
  return larger(-problem.bias.max_distance, smaller(distance, problem.bias.max_distance)) + problem.bias.max_distance;
}

inline bool positions_are_indices(const AttentionProblem& problem) {
  return problem.bias.positions_q == nullptr && problem.bias.positions_k == nullptr;
}

// Diagonal x holds the pairs (i, j) with x = j - i + num_queries - 1.
inline int64_t num_diagonals(const TilePlace& tile) {
  return tile.num_queries() + tile.num_keys() - 1;
}

inline int64_t entry_of_diagonal(const AttentionProblem& problem, const TilePlace& tile, int64_t x) {
  return entry_of_distance(problem, x + tile.start_key - (tile.end_query - 1));
}

// The bucket of a distance: in its direction, the last one that begins at or before it. A distance that has no buckets
// (of a later key in a causal decoder) is in bucket 0.
inline int32_t bucket_of_distance(const RelativeBias& bias, int32_t distance) {
  const bool is_later = distance > 0;
  if (is_later && !bias.is_bidirectional) {
    return 0;
  }
  const int32_t in_direction = is_later ? distance : -distance;
  int32_t first = 0, end = static_cast<int32_t>(bias.num_buckets_of_direction);
  while (end - first > 1) {
    const int32_t middle = (first + end) / 2;
    (bias.first_distance_of_bucket[middle] <= in_direction ? first : end) = middle;
  }
  return is_later ? static_cast<int32_t>(bias.num_buckets_of_direction) + first : first;
}

// entries [num_keys] := the entries of row i. Distances fit 32 bits, which set_relative_bias has checked.
inline void entries_of_row(const AttentionProblem& problem, const TilePlace& tile, int64_t i, int32_t* entries) {
  const int32_t max_distance = static_cast<int32_t>(problem.bias.max_distance);
  const int32_t query = static_cast<int32_t>(tile.start_query + i);
  const int32_t position_q =
      problem.bias.positions_q == nullptr ? query : problem.bias.positions_q[tile.sequence.first_q + query];
  if (problem.bias.first_distance_of_bucket != nullptr) {
    const int32_t* positions_k = problem.bias.positions_k;
    for (int32_t j = 0; j < tile.num_keys(); ++j) {
      const int32_t key = static_cast<int32_t>(tile.start_key) + j;
      const int32_t position_k = positions_k == nullptr ? key : positions_k[tile.sequence.first_k + key];
      entries[j] = bucket_of_distance(problem.bias, position_k - position_q);
    }
    return;
  }
  if (problem.bias.positions_k == nullptr) {
    for (int32_t j = 0; j < tile.num_keys(); ++j) {
      entries[j] = static_cast<int32_t>(entry_of_distance(problem, tile.start_key + j - position_q));
    }
    return;
  }
  const int32_t* positions_k = problem.bias.positions_k + tile.sequence.first_k + tile.start_key;
  for (int64_t j = 0; j < tile.num_keys(); ++j) {
    const int32_t distance = positions_k[j] - position_q;
    entries[j] = larger(-max_distance, smaller(distance, max_distance)) + max_distance;
  }
}

template <typename V>
struct BiasScratch {
  typename V::scalar* diagonals;  // [diagonals of a tile, and one vector]
  typename V::scalar* lanes;      // [num_buckets, 4], for the gradient
  int32_t* entries;               // [keys of a block]

  static BiasScratch take(Scratch& scratch, const AttentionProblem& problem, int64_t num_queries, int64_t num_keys) {
    using scalar = typename V::scalar;
    BiasScratch bias;
    bias.diagonals = scratch.take<scalar>(num_queries + num_keys + V::width);
    bias.lanes = scratch.take<scalar>(4 * problem.bias.num_buckets);
    bias.entries = scratch.take<int32_t>(num_keys);
    return bias;
  }
};

// S += bias.
template <typename V>
void add_bias(
    const AttentionProblem& problem, const TilePlace& tile, ScoreTile<V> scores, const BiasScratch<V>& scratch) {
  using scalar = typename V::scalar;
  const scalar* bias = static_cast<const scalar*>(problem.bias.of_entry) + tile.head * problem.bias.num_entries;
  if (!positions_are_indices(problem)) {
    for (int64_t i = 0; i < tile.num_queries(); ++i) {
      entries_of_row(problem, tile, i, scratch.entries);
      scalar* row = scores[i];
      for (int64_t j = 0; j < tile.num_keys(); ++j) {
        row[j] += bias[scratch.entries[j]];
      }
    }
    return;
  }
  for (int64_t x = 0; x < num_diagonals(tile); ++x) {
    scratch.diagonals[x] = bias[entry_of_diagonal(problem, tile, x)];
  }
  for (int64_t x = num_diagonals(tile); x < num_diagonals(tile) + V::width; ++x) {
    scratch.diagonals[x] = 0;  // the last vector of a row reads past its keys
  }
  for (int64_t i = 0; i < tile.num_queries(); ++i) {
    const scalar* diagonals = scratch.diagonals + tile.num_queries() - 1 - i;
    for (int64_t j = 0; j < tile.num_keys(); j += V::width) {
      V::store(scores[i] + j, V::load(scores[i] + j) + V::load(diagonals + j));
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
