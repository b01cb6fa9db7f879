// token_importance: see importance_kernels.cuh.

#include <optional>

#include <torch/csrc/stable/library.h>

#include "common/importance_arguments.h"
#include "cuda/core/arguments.cuh"
#include "cuda/pruning/importance.h"

namespace stamp::cuda {

Scoring scoring_of(
    const Tensor& hidden, const Tensor& centrality, int64_t norm_order, bool per_visible_query,
    std::vector<Tensor>& held) {
  check_scoring_arguments(hidden, centrality, norm_order);
  const bool rows_are_contiguous = hidden.size(1) <= 1 || hidden.stride(1) == 1;
  const Tensor rows = rows_are_contiguous ? hidden : held_contiguous(hidden, held);
  const int64_t element_bytes = static_cast<int64_t>(rows.element_size());
  Scoring scoring = {};
  scoring.hidden = static_cast<const char*>(rows.const_data_ptr());
  scoring.row_stride = rows.stride(0) * element_bytes;
  scoring.row_bytes = rows.size(1) * element_bytes;
  scoring.access_bytes = widest_access(scoring, static_cast<int32_t>(element_bytes));
  scoring.lanes_per_row = lanes_for_row(scoring.row_bytes);
  scoring.centrality = held_contiguous(centrality, held).const_data_ptr();
  scoring.total = rows.size(0);
  scoring.centrality_is_double = centrality.scalar_type() == ScalarType::Double;
  scoring.per_visible_query = per_visible_query;
  return scoring;
}

Tensor new_scores(const Tensor& hidden) {
  const bool in_double = hidden.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(hidden, {hidden.size(0)}, in_double ? ScalarType::Double : ScalarType::Float);
}

namespace {

Tensor token_importance(
    const Tensor& hidden, const Tensor& centrality, const std::optional<Tensor>& cu_seqlens, int64_t norm_order,
    bool per_visible_query) {
  const Launch launch("token_importance", hidden.get_device_index());
  std::vector<Tensor> held;
  Scoring scoring = scoring_of(hidden, centrality, norm_order, per_visible_query, held);
  STD_TORCH_CHECK(cu_seqlens.has_value() || !per_visible_query, "per_visible_query needs cu_seqlens");
  if (cu_seqlens.has_value()) {
    const Tensor offsets = held_cu_seqlens(*cu_seqlens, held);
    scoring.cu_seqlens = offsets.const_data_ptr<int32_t>();
    scoring.batch = offsets.size(0) - 1;
    if (contents_are_checked()) {
      checked_cu_seqlens(scoring.cu_seqlens, scoring.batch, scoring.total, INT32_MAX, launch);
    }
  }
  const Tensor importance = new_scores(hidden);
  scoring.importance = importance.mutable_data_ptr();
  with_number_type("hidden", hidden, [&](auto number) {
    launch_token_importance<decltype(number)>(scoring, norm_order == 2, launch);
  });
  return importance;
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("token_importance", TORCH_BOX(&stamp::cuda::token_importance));
}
