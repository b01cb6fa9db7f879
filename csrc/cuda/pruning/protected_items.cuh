// The number of protected items of each sequence.

#pragma once

#include <cstdint>

#include "cuda/core/warp.cuh"
#include "cuda/pruning/selection_problem.cuh"

namespace stamp::cuda {

constexpr int kCountingThreads = 256;
constexpr int64_t kMaxLengthCountedByWarp = 2048;

// num_protected [num_sequences] := the number of protected items. A warp or a whole block counts one sequence.
//   grid  ceil(num_sequences / sequences of a block)
template <int kThreadsPerSequence>
__global__ void __launch_bounds__(kCountingThreads)
    count_protected_kernel(const SelectionProblem problem, int32_t* num_protected) {
  constexpr int kWarpsPerSequence = kThreadsPerSequence / kWarpSize;
  __shared__ int32_t count_of_warp[kCountingThreads / kWarpSize];
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerSequence;
  const int64_t sequence =
      static_cast<int64_t>(blockIdx.x) * (kCountingThreads / kThreadsPerSequence) + threadIdx.x / kThreadsPerSequence;
  int32_t count = 0;
  if (sequence < problem.num_sequences) {
    const int64_t first_row = __ldg(problem.cu_seqlens + sequence);
    const int64_t num_items = (__ldg(problem.cu_seqlens + sequence + 1) - first_row) / problem.codes_per_item;
#pragma unroll 4
    for (int64_t item = thread; item < num_items; item += kThreadsPerSequence) {
      count += item_is_protected(problem, first_row + item * problem.codes_per_item);
    }
  }
  count = warp_sum(count);
  if (kWarpsPerSequence > 1) {
    if (lane_index() == 0) {
      count_of_warp[warp_index()] = count;
    }
    __syncthreads();
    count = 0;
    for (int warp = 0; warp < kWarpsPerSequence; ++warp) {
      count += count_of_warp[warp];
    }
  }
  if (thread == 0 && sequence < problem.num_sequences) {
    num_protected[sequence] = count;
  }
}

template <typename Launch>
void launch_count_protected(
    const SelectionProblem& problem, int64_t max_seqlen, int32_t* num_protected, const Launch& launch) {
  constexpr int kSequences = kCountingThreads / kWarpSize;
  if (problem.num_sequences == 0) {
    return;
  }
  if (max_seqlen <= kMaxLengthCountedByWarp) {
    launch(
        &count_protected_kernel<kWarpSize>, divide_up(problem.num_sequences, kSequences), kCountingThreads, problem,
        num_protected);
  } else {
    launch(&count_protected_kernel<kCountingThreads>, problem.num_sequences, kCountingThreads, problem, num_protected);
  }
}

}  // namespace stamp::cuda
