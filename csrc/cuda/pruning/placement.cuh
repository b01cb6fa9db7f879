// Where the tokens of the kept items go: indices, inverse, and their index in the sequence, in the original order.

#pragma once

#include <cstdint>

#include "cuda/core/warp.cuh"
#include "cuda/pruning/selection_problem.cuh"
#include "cuda/pruning/threshold.cuh"

namespace stamp::cuda {

// Writes the indices and inverse of an item's tokens. `kept_before` items of the sequence are kept before it.
__device__ inline void place_item(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, int32_t item, bool is_kept,
    int32_t kept_before) {
#pragma unroll 1
  for (int32_t token = 0; token < problem.codes_per_item; ++token) {
    const int32_t index = item * problem.codes_per_item + token;
    const int64_t row = static_cast<int64_t>(items.first_row) + index;
    const int64_t kept_row = first_kept_row + static_cast<int64_t>(kept_before) * problem.codes_per_item + token;
    if (!is_kept || kept_row >= problem.total_kept) {
      problem.inverse[row] = -1;
      continue;
    }
    problem.inverse[row] = static_cast<int32_t>(kept_row);
    problem.indices[kept_row] = row;
    if (problem.index_in_sequence != nullptr) {
      problem.index_in_sequence[kept_row] = index;
    }
  }
}

// How many items of a sequence come before a place in it.
struct Placed {
  int32_t above;  // items above the threshold
  int32_t ties;   // items with the key of the threshold, kept or not
};

// Places 32 consecutive items, one for each lane, and adds them to `placed`. `exists`: the lane has an item.
template <typename Key>
__device__ inline void place_items_of_warp(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row,
    const Threshold<Key>& threshold, int32_t item, bool exists, Key key, Placed& placed) {
  const bool is_above = exists && key > threshold.key;
  const bool is_tie = exists && key == threshold.key;
  const unsigned above = __ballot_sync(kAllLanes, is_above);
  const unsigned ties = __ballot_sync(kAllLanes, is_tie);
  const int32_t above_before = placed.above + __popc(above & lanes_below());
  const int32_t ties_before = placed.ties + __popc(ties & lanes_below());
  if (exists) {
    const bool is_kept = is_above || (is_tie && ties_before < threshold.num_ties);
    place_item(problem, items, first_kept_row, item, is_kept, above_before + min(ties_before, threshold.num_ties));
  }
  placed.above += __popc(above);
  placed.ties += __popc(ties);
}

// Drops the rows after the last whole item. Called by `num_threads` threads.
__device__ inline void drop_incomplete_item(
    const SelectionProblem& problem, const SequenceItems& items, int thread, int num_threads) {
  for (int32_t i = items.num_items * problem.codes_per_item + thread; i < items.num_rows; i += num_threads) {
    problem.inverse[items.first_row + static_cast<int64_t>(i)] = -1;
  }
}

}  // namespace stamp::cuda
