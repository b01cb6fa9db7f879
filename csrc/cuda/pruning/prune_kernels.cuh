// Pruning in three launches: importance and kept offsets, selection, gather. If tokens are protected, the launch of
// count_protected_kernel comes first.

#pragma once

#include <cstdint>
#include <vector>

#include "common/rows.h"
#include "cuda/pruning/gather_kernels.cuh"
#include "cuda/pruning/importance_kernels.cuh"
#include "cuda/pruning/selection_kernels.cuh"

namespace stamp::cuda {

// Block 0 writes cu_seqlens_kept, which does not depend on the importance. The other blocks compute the importance.
//   grid  1 + num_importance_blocks
template <typename T, bool kIsL2, bool kIsAligned>
__global__ void __launch_bounds__(kImportanceThreads, importance_blocks_per_multiprocessor(kIsAligned))
    importance_and_offsets_kernel(const ImportanceProblem importance_problem, const SelectionProblem selection) {
  if (blockIdx.x == 0) {
    write_kept_offsets<kImportanceThreads>(selection);
  } else {
    importance_of_rows<T, kIsL2, kIsAligned>(importance_problem, static_cast<int64_t>(blockIdx.x) - 1);
  }
}

template <typename T, typename Launch>
void launch_importance_and_offsets(
    const ImportanceProblem& importance_problem, bool is_l2, const SelectionProblem& selection, const Launch& launch) {
  with_importance_kernel(importance_problem, is_l2, [&](auto is_l2, auto is_aligned) {
    launch(
        &importance_and_offsets_kernel<T, decltype(is_l2)::value, decltype(is_aligned)::value>,
        1 + num_importance_blocks(importance_problem), kImportanceThreads, importance_problem, selection);
  });
}

// positions [total], gathered with the tensors. In the selection, threads would have to wait for them.
inline Rows rows_of_positions(const int32_t* positions, int32_t* kept_positions) {
  Rows rows;
  rows.source = reinterpret_cast<const char*>(positions);
  rows.destination = reinterpret_cast<char*>(kept_positions);
  rows.source_stride = sizeof(int32_t);
  rows.row_bytes = sizeof(int32_t);
  return rows;
}

// All launches after count_protected_kernel. importance_problem.importance is memory for the importance.
template <typename Short, typename Long, typename T, typename Launch>
void launch_prune(
    const ImportanceProblem& importance_problem, bool is_l2, const SelectionProblem& selection, int64_t max_seqlen,
    const std::vector<Rows>& copies, const Launch& launch) {
  launch_importance_and_offsets<T>(importance_problem, is_l2, selection, launch);
  const auto* importance = static_cast<const Compute<T>*>(importance_problem.importance);
  launch_select_tokens<Short, Long>(selection, max_seqlen, importance, launch);
  launch_gather<int64_t>(copies, selection.indices, selection.total_kept, launch);
}

}  // namespace stamp::cuda
