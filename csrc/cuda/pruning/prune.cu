// prune on CUDA: importance, selection and gather in one op. The kernels are in prune_kernels.cuh.

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/row_copies.h"
#include "cuda/pruning/prune_kernels.cuh"
#include "cuda/pruning/selection_plan.cuh"
#include "cuda/pruning/token_importance.cuh"

namespace stamp::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> prune(
    const std::vector<Tensor>& x, const Tensor& centrality, const OptionalTensor& positions, const Tensor& cu_seqlens,
    int64_t max_seqlen, int64_t norm_order, bool per_visible_query, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  check_row_sources("x", x, "cu_seqlens", cu_seqlens);
  const Tensor& hidden = x[0];
  const ImportanceArguments arguments = {hidden, centrality, norm_order, per_visible_query};
  check_importance_arguments(arguments);
  const Launch launch("prune", hidden.get_device_index());
  std::vector<Tensor> held;
  ImportanceProblem importance_problem = make_importance_problem(arguments, held);
  const BudgetArguments budget = {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept};
  SelectionPlan plan = plan_selection("x", hidden, cu_seqlens, max_seqlen, budget, launch);
  SelectionProblem& selection = plan.problem;
  const Tensor importance = new_importance(hidden);
  importance_problem.importance = importance.mutable_data_ptr();
  importance_problem.cu_seqlens = selection.cu_seqlens;
  importance_problem.num_sequences = selection.num_sequences;
  const Tensor kept_positions = torch::stable::new_empty(plan.inverse, {selection.total_kept});
  int32_t* kept_positions_data = kept_positions.mutable_data_ptr<int32_t>();
  RowCopies copies(x, selection.total_kept);
  if (positions.has_value()) {
    check_positions(*positions, hidden);
    copies.rows.push_back(
        rows_of_positions(held_contiguous(*positions, held).const_data_ptr<int32_t>(), kept_positions_data));
  } else {
    selection.index_in_sequence = kept_positions_data;
  }
  with_number_type(hidden, [&](auto number) {
    using T = decltype(number);
    using Importance = Compute<T>;
    launch_prune<ShortTiling<Importance>, LongTiling<Importance>, T>(
        importance_problem, norm_order == 2, selection, max_seqlen, copies.rows, launch);
  });
  return {copies.outputs, kept_positions, plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("prune", TORCH_BOX(&stamp::cuda::prune));
}
