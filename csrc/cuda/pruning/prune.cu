// prune, scoring, selection and gather in one op: see pruning_kernels.cuh.

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/rows.h"
#include "cuda/pruning/prune_kernels.cuh"
#include "cuda/pruning/importance.h"
#include "cuda/pruning/selection_plan.cuh"

namespace stamp::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> prune(
    const std::vector<Tensor>& x, const Tensor& centrality, const OptionalTensor& positions, const Tensor& cu_seqlens,
    int64_t max_seqlen, int64_t norm_order, bool per_visible_query, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  STD_TORCH_CHECK(!x.empty(), "prune needs at least the hidden states");
  const Tensor& hidden = x[0];
  check_row_map_tensor(x, cu_seqlens, "cu_seqlens");
  const Launch launch("prune", hidden.get_device_index());
  std::vector<Tensor> held;
  Scoring scoring = scoring_of(hidden, centrality, norm_order, per_visible_query, held);
  SelectionPlan plan = plan_selection(
      scoring.total, cu_seqlens, max_seqlen,
      {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept}, launch);
  SelectionProblem& problem = plan.problem;
  const Tensor scores = new_scores(hidden);
  scoring.importance = scores.mutable_data_ptr();
  scoring.cu_seqlens = problem.cu_seqlens;
  scoring.batch = problem.batch;
  const Tensor kept_positions = torch::stable::new_empty(plan.inverse, {problem.total_kept});
  int32_t* kept_position = kept_positions.mutable_data_ptr<int32_t>();
  RowCopies copies(x, problem.total_kept);
  if (positions.has_value()) {
    STD_TORCH_CHECK(
        positions->dim() == 1 && positions->size(0) == scoring.total,
        "positions must have one entry for each token");
    copies.rows.push_back(
        rows_of_positions(held_contiguous(*positions, held).const_data_ptr<int32_t>(), kept_position));
  } else {
    problem.index_in_sequence = kept_position;
  }
  with_number_type("hidden", hidden, [&](auto number) {
    using T = decltype(number);
    using Score = Compute<T>;
    launch_prune<ShortTiling<Score>, LongTiling<Score>, T>(
        scoring, norm_order == 2, problem, max_seqlen, copies.rows, launch);
  });
  return {copies.outputs, kept_positions, plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("prune", TORCH_BOX(&stamp::cuda::prune));
}
