// Pruning in three launches: scores and kept offsets, selection, gather; one more before them where tokens are
// protected.

#pragma once

#include <cstdint>
#include <vector>

#include "cuda/pruning/gather_kernels.cuh"
#include "cuda/pruning/importance_kernels.cuh"
#include "cuda/pruning/selection_kernels.cuh"

namespace stamp::cuda {

// Block 0 writes cu_seqlens_kept, which needs no score; the others score the rows.
//   grid  1 + scoring_blocks
template <typename T, bool kSquares, bool kIsAligned>
__global__ void __launch_bounds__(kScoringThreads, scoring_blocks_at_once(kIsAligned))
    scores_and_offsets_kernel(const Scoring scoring, const SelectionProblem problem) {
  if (blockIdx.x == 0) {
    write_kept_offsets<kScoringThreads>(problem);
  } else {
    score_rows<T, kSquares, kIsAligned>(scoring, static_cast<int64_t>(blockIdx.x) - 1);
  }
}

template <typename T, typename Launch>
void launch_scores_and_offsets(
    const Scoring& scoring, bool squares, const SelectionProblem& problem, const Launch& launch) {
  with_kind_of_scoring(scoring, squares, [&](auto squares, auto is_aligned) {
    launch(
        &scores_and_offsets_kernel<T, decltype(squares)::value, decltype(is_aligned)::value>,
        1 + scoring_blocks(scoring), kScoringThreads, scoring, problem);
  });
}

// Positions [total] gathered along with the tensors: the selection would have to wait for them.
inline Rows rows_of_positions(const int32_t* positions, int32_t* kept_positions) {
  return {
      reinterpret_cast<const char*>(positions), reinterpret_cast<char*>(kept_positions), sizeof(int32_t),
      sizeof(int32_t)};
}

// All of it after the protected items have been counted. scoring.importance is memory for the scores.
template <typename Short, typename Long, typename T, typename Launch>
void launch_prune(
    const Scoring& scoring, bool squares, const SelectionProblem& problem, int64_t max_seqlen,
    const std::vector<Rows>& copies, const Launch& launch) {
  launch_scores_and_offsets<T>(scoring, squares, problem, launch);
  const auto* importance = static_cast<const Compute<T>*>(scoring.importance);
  launch_select_tokens<Short, Long>(problem, max_seqlen, importance, launch);
  launch_gather<int64_t>(copies, problem.indices, problem.total_kept, launch);
}

}  // namespace stamp::cuda
