// select_tokens on CUDA. The kernels are in selection_kernels.cuh.

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cuda/pruning/selection_plan.cuh"

namespace stamp::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> select_tokens(
    const Tensor& importance, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  check_tensor("importance", importance, {"total"}, kFloatingDTypes);
  const Launch launch("select_tokens", importance.get_device_index());
  const BudgetArguments budget = {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept};
  const SelectionPlan plan = plan_selection("importance", importance, cu_seqlens, max_seqlen, budget, launch);
  const Tensor importance_contiguous = torch::stable::contiguous(importance);
  launch_kept_offsets(plan.problem, launch);
  with_number_type(importance_contiguous, [&](auto number) {
    using T = decltype(number);
    launch_select_tokens<ShortTiling<T>, LongTiling<T>>(
        plan.problem, max_seqlen, static_cast<const T*>(importance_contiguous.const_data_ptr()), launch);
  });
  return {plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&stamp::cuda::select_tokens));
}
