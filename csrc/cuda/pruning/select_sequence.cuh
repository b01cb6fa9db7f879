// The selection in one sequence, by a warp or by a block: load its keys, find their threshold, place its items.

#pragma once

#include <cstdint>

#include "cuda/core/warp.cuh"
#include "cuda/pruning/keys.cuh"
#include "cuda/pruning/placement.cuh"
#include "cuda/pruning/selection_problem.cuh"
#include "cuda/pruning/threshold.cuh"

namespace stamp::cuda {

// A sequence of at most 32 * kKeysPerLane items, by one warp with all keys in registers.
template <int kKeysPerLane, typename T>
__device__ inline void select_by_warp(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, const T* importance) {
  ItemKey<T> keys[kKeysPerLane];
  constexpr int kLoads = kKeysPerLane < 8 ? kKeysPerLane : 8;  // in flight, with their addresses in registers
#pragma unroll
  for (int first = 0; first < kKeysPerLane; first += kLoads) {
    ItemKey<T> loaded[kLoads];
    load_keys(
        problem, importance, items.first_row, first * kWarpSize + lane_index(), kWarpSize, items.num_items, loaded);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      keys[first + j] = loaded[j];
    }
  }
  const Threshold<ItemKey<T>> threshold = find_threshold_by_warp(keys, items.num_items, items.num_kept);
  Placed placed = {};
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) {
    if (j * kWarpSize < items.num_items) {
      const int32_t item = j * kWarpSize + lane_index();
      place_items_of_warp(problem, items, first_kept_row, threshold, item, item < items.num_items, keys[j], placed);
    }
  }
  drop_incomplete_item(problem, items, lane_index(), kWarpSize);
}

// The shared memory of select_by_block.
template <typename Key, int kThreads, int kSharedKeys>
struct SelectionScratch {
  DigitScratch digits;
  Placed placed_by_warp[kThreads / kWarpSize];
  Key keys[kSharedKeys > 0 ? kSharedKeys : 1];
};

// A sequence of any length, by the whole block. Each warp has a run of consecutive items: all warps count the kept
// items of theirs, then each places its own.
template <typename Key, int kThreads, typename Fetch, typename Scratch>
__device__ inline void select_by_block(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, const Fetch& fetch,
    Scratch& scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  const Threshold<Key> threshold =
      find_threshold_by_block<Key, kThreads>(items.num_items, items.num_kept, fetch, scratch.digits);
  const int32_t items_per_warp = (items.num_items + kThreads - 1) / kThreads * kWarpSize;
  const int32_t start_item = min(items.num_items, warp_index() * items_per_warp);
  const int32_t end_items = min(items.num_items, start_item + items_per_warp);

  Placed counted = {};
  for_keys<Key>(start_item + lane_index(), kWarpSize, end_items, fetch, [&](int32_t, Key key) {
    counted.above += key > threshold.key;
    counted.ties += key == threshold.key;
  });
  counted.above = warp_sum(counted.above);
  counted.ties = warp_sum(counted.ties);
  if (lane_index() == 0) {
    scratch.placed_by_warp[warp_index()] = counted;
  }
  __syncthreads();
  Placed placed = {};
  for (int warp = 0; warp < kWarps; ++warp) {
    placed.above += warp < warp_index() ? scratch.placed_by_warp[warp].above : 0;
    placed.ties += warp < warp_index() ? scratch.placed_by_warp[warp].ties : 0;
  }

  for (int32_t first = start_item; first < end_items; first += kKeysInFlight * kWarpSize) {
    Key keys[kKeysInFlight];
    fetch(first + lane_index(), kWarpSize, end_items, keys);
#pragma unroll
    for (int j = 0; j < kKeysInFlight; ++j) {
      if (first + j * kWarpSize < end_items) {
        const int32_t item = first + j * kWarpSize + lane_index();
        place_items_of_warp(problem, items, first_kept_row, threshold, item, item < end_items, keys[j], placed);
      }
    }
  }
  drop_incomplete_item(problem, items, static_cast<int>(threadIdx.x), kThreads);
}

}  // namespace stamp::cuda
