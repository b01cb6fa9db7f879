// Selection on the device: which items each sequence keeps, in their original order.
//
// Importance becomes unsigned keys of the same order (keys.cuh). The best k items are those with a key above a
// threshold, and the first ones of those that equal it (threshold.cuh). Counts find the threshold, and ballots compact
// the items (placement.cuh): nothing is sorted, and the result does not depend on the order of execution. Only the
// device reads lengths; the CPU knows an upper bound of them.
//
//   count_protected_kernel   num_protected [num_sequences], if tokens are protected (protected_items.cuh)
//   kept_offsets_kernel      cu_seqlens_kept [num_sequences + 1] (kept_offsets.cuh)
//   select_tokens_kernel     indices, inverse, index_in_sequence

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/arithmetic.h"
#include "cuda/core/warp.cuh"
#include "cuda/pruning/kept_offsets.cuh"
#include "cuda/pruning/keys.cuh"
#include "cuda/pruning/protected_items.cuh"
#include "cuda/pruning/select_sequence.cuh"
#include "cuda/pruning/selection_problem.cuh"

namespace stamp::cuda {

// Fills the tail rows: the result past the last kept row, and inverse past the last row. Called by the whole grid.
template <int kThreads>
__device__ inline void fill_tails(const SelectionProblem& problem) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + problem.num_sequences);
  const int64_t first_row = __ldg(problem.cu_seqlens + problem.num_sequences);
  for (int64_t row = first_kept_row + thread; row < problem.total_kept; row += num_threads) {
    problem.indices[row] = -1;
    if (problem.index_in_sequence != nullptr) {
      problem.index_in_sequence[row] = 0;
    }
  }
  for (int64_t row = first_row + thread; row < problem.total; row += num_threads) {
    problem.inverse[row] = -1;
  }
}

// Who selects in a sequence: a warp up to 32 * kKeysPerLane items, otherwise a block of kThreads. A block keeps up to
// kSharedKeys keys in shared memory, and reads those of a longer sequence again in every pass. kBlocksPerMultiprocessor
// is large enough to hide the latency of loads, and small enough for the registers that a thread needs.
template <int threads, int blocks_per_multiprocessor, int keys_per_lane, int shared_keys>
struct Tiling {
  static_assert(keys_per_lane % 8 == 0, "select_tokens_kernel serves shorter sequences with 1, 4 or 8 keys in a lane");
  static constexpr int kThreads = threads;
  static constexpr int kBlocksPerMultiprocessor = blocks_per_multiprocessor;
  static constexpr int kKeysPerLane = keys_per_lane;
  static constexpr int kItemsPerWarp = kWarpSize * keys_per_lane;
  static constexpr int kSharedKeys = shared_keys;
  static constexpr int kSequencesPerBlock = threads / kWarpSize;
};

// Without long sequences: small blocks, so that few sequences reach many multiprocessors.
template <typename T>
using ShortTiling = Tiling<128, 6, sizeof(ItemKey<T>) == 4 ? 32 : 16, 0>;
// With long sequences.
template <typename T>
using LongTiling = Tiling<512, 2, sizeof(ItemKey<T>) == 4 ? 16 : 8, 32 * 1024 / sizeof(ItemKey<T>)>;

// Selects in the long ones of the sequences first, first + stride, ... Called by the whole block.
template <typename Tiling, typename T>
__device__ inline void select_in_long_sequences(
    const SelectionProblem& problem, const T* importance, int32_t first, int32_t stride) {
  using Key = ItemKey<T>;
  __shared__ SelectionScratch<Key, Tiling::kThreads, Tiling::kSharedKeys> scratch;
  for (int32_t start_sequence = first; start_sequence < problem.num_sequences; start_sequence += stride * kWarpSize) {
    const int32_t sequence_of_lane = start_sequence + lane_index() * stride;
    const bool is_long = sequence_of_lane < problem.num_sequences &&
        items_of_sequence(problem, sequence_of_lane).num_items > Tiling::kItemsPerWarp;
    for (unsigned left = __ballot_sync(kAllLanes, is_long); left != 0; left &= left - 1) {
      const int32_t sequence = start_sequence + (__ffs(static_cast<int>(left)) - 1) * stride;
      const SequenceItems items = items_of_sequence(problem, sequence);
      const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + sequence);
      const auto from_memory = [&](int32_t first, int32_t stride, int32_t end_items, Key(&keys)[kKeysInFlight]) {
        load_keys(problem, importance, items.first_row, first, stride, end_items, keys);
      };
      const auto from_scratch = [&](int32_t first, int32_t stride, int32_t end_items, Key(&keys)[kKeysInFlight]) {
#pragma unroll
        for (int j = 0; j < kKeysInFlight; ++j) {
          keys[j] = first + j * stride < end_items ? scratch.keys[first + j * stride] : Key{0};
        }
      };
      __syncthreads();  // all threads have read the shared memory of the last sequence
      if (items.num_items <= Tiling::kSharedKeys) {
        for_keys<Key>(
            static_cast<int32_t>(threadIdx.x), Tiling::kThreads, items.num_items, from_memory,
            [&](int32_t item, Key key) { scratch.keys[item] = key; });
        __syncthreads();
        select_by_block<Key, Tiling::kThreads>(problem, items, first_kept_row, from_scratch, scratch);
      } else {
        select_by_block<Key, Tiling::kThreads>(problem, items, first_kept_row, from_memory, scratch);
      }
    }
  }
}

// indices [total_kept], inverse [total] and index_in_sequence [total_kept] from importance [total]. The first
// num_long_blocks blocks select in the long sequences. Each warp of the other blocks has one sequence, which it skips
// if it is long.
//   grid  num_long_blocks (0 if no sequence can be long) + ceil(num_sequences / kSequencesPerBlock), or as many blocks
//   as
//         the tails need
template <typename T, typename Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocksPerMultiprocessor)
    select_tokens_kernel(const SelectionProblem problem, const T* __restrict__ importance, int32_t num_long_blocks) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < num_long_blocks) {
    if constexpr (Tiling::kSharedKeys > 0) {
      select_in_long_sequences<Tiling>(problem, importance, block, num_long_blocks);
    }
  } else {
    const int32_t sequence = (block - num_long_blocks) * Tiling::kSequencesPerBlock + warp_index();
    if (sequence < problem.num_sequences) {
      const SequenceItems items = items_of_sequence(problem, sequence);
      const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + sequence);
      if (items.num_items <= kWarpSize) {
        select_by_warp<1>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= 4 * kWarpSize) {
        select_by_warp<4>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= 8 * kWarpSize) {
        select_by_warp<8>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= Tiling::kItemsPerWarp) {
        select_by_warp<Tiling::kKeysPerLane>(problem, items, first_kept_row, importance);
      }
    }
  }
  fill_tails<Tiling::kThreads>(problem);
}

template <typename Tiling, typename T, typename Launch>
void launch_select_tokens_kernel(
    const SelectionProblem& problem, int64_t num_long_blocks, const T* importance, const Launch& launch) {
  constexpr int64_t kSequences = Tiling::kSequencesPerBlock;
  // The tail may be all rows, so there are enough blocks to fill it at the speed of memory.
  constexpr int64_t kTailRowsPerThread = 8, kMaxTailBlocks = 1024;
  const int64_t tail_rows = problem.total + problem.total_kept;
  const int64_t tail_blocks = std::min(kMaxTailBlocks, tail_rows / (kTailRowsPerThread * Tiling::kThreads) + 1);
  const int64_t sequence_blocks = num_long_blocks + divide_up(problem.num_sequences, kSequences);
  launch(
      &select_tokens_kernel<T, Tiling>, std::max(sequence_blocks, tail_blocks), Tiling::kThreads, problem, importance,
      static_cast<int32_t>(num_long_blocks));
}

template <typename Short, typename Long, typename T, typename Launch>
void launch_select_tokens(
    const SelectionProblem& problem, int64_t max_seqlen, const T* importance, const Launch& launch) {
  if (max_seqlen / problem.codes_per_item <= Short::kItemsPerWarp) {
    return launch_select_tokens_kernel<Short>(problem, 0, importance, launch);
  }
  // A block for each long sequence that is possible, and at least enough blocks to look for them with the whole GPU.
  constexpr int64_t kMinLongBlocks = 128;
  const int64_t max_long_sequences = problem.total / problem.codes_per_item / Long::kItemsPerWarp;
  launch_select_tokens_kernel<Long>(
      problem, std::min<int64_t>(problem.num_sequences, std::max(kMinLongBlocks, max_long_sequences)), importance,
      launch);
}

}  // namespace stamp::cuda
