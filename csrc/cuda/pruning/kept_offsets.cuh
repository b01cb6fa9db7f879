// The offsets of the kept tokens:
//
//     cu_seqlens_kept[s + 1] = min(total_kept, sum over sequences up to s of codes_per_item * kept items)

#pragma once

#include <cstdint>

#include "cuda/core/warp.cuh"
#include "cuda/pruning/selection_problem.cuh"

namespace stamp::cuda {

// Writes cu_seqlens_kept. Called by one block, which scans rounds of consecutive sequences, kSequencesPerThread in each
// thread: shuffles sum over the threads of a warp, shared memory over the warps.
template <int kThreads>
__device__ inline void write_kept_offsets(const SelectionProblem& problem) {
  constexpr int kSequencesPerThread = 4;
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ int64_t sum_of_warp[kWarps];
  int64_t kept_before = 0;  // the sum of earlier rounds
  for (int64_t first = 0; first < problem.num_sequences; first += kThreads * kSequencesPerThread) {
    const int64_t first_of_thread = first + static_cast<int64_t>(threadIdx.x) * kSequencesPerThread;
    int64_t kept[kSequencesPerThread], kept_of_thread = 0;
#pragma unroll
    for (int i = 0; i < kSequencesPerThread; ++i) {
      const int64_t sequence = first_of_thread + i;
      kept[i] = sequence < problem.num_sequences
          ? static_cast<int64_t>(items_of_sequence(problem, sequence).num_kept) * problem.codes_per_item
          : 0;
      kept_of_thread += kept[i];
    }
    const int64_t kept_of_warp_so_far = warp_running_sum(kept_of_thread);
    __syncthreads();  // the sums of the last round have been read
    if (lane_index() == kWarpSize - 1) {
      sum_of_warp[warp_index()] = kept_of_warp_so_far;
    }
    __syncthreads();
    int64_t offset = kept_before + kept_of_warp_so_far - kept_of_thread;
    for (int warp = 0; warp < kWarps; ++warp) {
      offset += warp < warp_index() ? sum_of_warp[warp] : 0;
      kept_before += sum_of_warp[warp];
    }
#pragma unroll
    for (int i = 0; i < kSequencesPerThread; ++i) {
      offset += kept[i];
      if (first_of_thread + i < problem.num_sequences) {
        problem.cu_seqlens_kept[first_of_thread + i + 1] = static_cast<int32_t>(min(offset, problem.total_kept));
      }
    }
  }
  if (threadIdx.x == 0) {
    problem.cu_seqlens_kept[0] = 0;
  }
}

//   grid  1
template <int kThreads>
__global__ void __launch_bounds__(kThreads) kept_offsets_kernel(const SelectionProblem problem) {
  write_kept_offsets<kThreads>(problem);
}

template <typename Launch>
void launch_kept_offsets(const SelectionProblem& problem, const Launch& launch) {
  constexpr int kThreads = 1024;
  launch(&kept_offsets_kernel<kThreads>, 1, kThreads, problem);
}

}  // namespace stamp::cuda
