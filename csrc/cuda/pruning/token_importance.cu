// token_importance on CUDA. The kernels are in importance_kernels.cuh.

#include <optional>

#include <torch/csrc/stable/library.h>

#include "cuda/core/arguments.cuh"
#include "cuda/pruning/token_importance.cuh"

namespace stamp::cuda {

ImportanceProblem make_importance_problem(const ImportanceArguments& arguments, std::vector<Tensor>& held) {
  const Tensor& hidden = arguments.hidden;
  const bool rows_are_contiguous = hidden.size(1) <= 1 || hidden.stride(1) == 1;
  const Tensor rows = rows_are_contiguous ? hidden : held_contiguous(hidden, held);
  const int64_t element_bytes = static_cast<int64_t>(rows.element_size());
  ImportanceProblem problem = {};
  problem.hidden = static_cast<const char*>(rows.const_data_ptr());
  problem.row_stride = rows.stride(0) * element_bytes;
  problem.row_bytes = rows.size(1) * element_bytes;
  problem.access_bytes = widest_access(problem, static_cast<int32_t>(element_bytes));
  problem.lanes_per_row = lanes_for_row(problem.row_bytes);
  problem.centrality = held_contiguous(arguments.centrality, held).const_data_ptr();
  problem.total = rows.size(0);
  problem.centrality_is_double = arguments.centrality.scalar_type() == ScalarType::Double;
  problem.per_visible_query = arguments.per_visible_query;
  return problem;
}

Tensor new_importance(const Tensor& hidden) {
  const bool in_double = hidden.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(hidden, {hidden.size(0)}, in_double ? ScalarType::Double : ScalarType::Float);
}

namespace {

Tensor token_importance(
    const Tensor& hidden, const Tensor& centrality, const std::optional<Tensor>& cu_seqlens, int64_t norm_order,
    bool per_visible_query) {
  const ImportanceArguments arguments = {hidden, centrality, norm_order, per_visible_query};
  check_importance_arguments(arguments);
  const Launch launch("token_importance", hidden.get_device_index());
  std::vector<Tensor> held;
  ImportanceProblem problem = make_importance_problem(arguments, held);
  STD_TORCH_CHECK(cu_seqlens.has_value() || !per_visible_query, "per_visible_query needs cu_seqlens");
  if (cu_seqlens.has_value()) {
    const Tensor offsets = held_cu_seqlens(*cu_seqlens, "hidden", hidden, held);
    problem.cu_seqlens = offsets.const_data_ptr<int32_t>();
    problem.num_sequences = offsets.size(0) - 1;
    if (contents_are_checked()) {
      checked_cu_seqlens(problem.cu_seqlens, problem.num_sequences, problem.total, INT32_MAX, launch);
    }
  }
  const Tensor importance = new_importance(hidden);
  problem.importance = importance.mutable_data_ptr();
  with_number_type(
      hidden, [&](auto number) { launch_token_importance<decltype(number)>(problem, norm_order == 2, launch); });
  return importance;
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("token_importance", TORCH_BOX(&stamp::cuda::token_importance));
}
