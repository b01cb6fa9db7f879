// select_tokens on the CPU, one sequence after the other. The selection is in cpu/pruning/select_items.h.

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cpu/pruning/select_items.h"
#include "cpu/pruning/selection_plan.h"

namespace stamp::cpu {
namespace {

// No thread is started for fewer tokens than this.
constexpr int64_t kMinTokensPerTask = 2048;

using OptionalTensor = std::optional<Tensor>;

template <typename T, typename scalar>
void select_all(const SelectionPlan& plan, const T* importance) {
  using Selector = ItemSelector<scalar>;
  const PruningKernels<scalar>& kernels = pruning_kernels<scalar>();
  const auto select = [&](int64_t begin, int64_t end, char* scratch) {
    Selector selector(plan, kernels, scratch);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const T* token_importance = importance + plan.cu_seqlens[sequence];
      if constexpr (sizeof(T) == sizeof(scalar)) {
        selector.select(plan, sequence, token_importance);
      } else {
        const int64_t num_tokens = plan.cu_seqlens[sequence + 1] - plan.cu_seqlens[sequence];
        for (int64_t i = 0; i < num_tokens; ++i) {
          selector.importance[i] = to_float(token_importance[i]);
        }
        selector.select(plan, sequence, selector.importance);
      }
    }
  };
  for_sequences(plan, kMinTokensPerTask, Selector(plan, kernels, nullptr).bytes, select);
}

std::tuple<Tensor, Tensor, Tensor> select_tokens(
    const Tensor& importance, const Tensor& cu_seqlens, int64_t max_seqlen, std::optional<int64_t> ratio_q32,
    std::optional<int64_t> keep_count, const OptionalTensor& keep_counts, int64_t min_keep,
    const OptionalTensor& protect, int64_t codes_per_item, std::optional<int64_t> total_kept) {
  check_tensor("importance", importance, {"total"}, kFloatingDTypes);
  check_int32_rows("importance", importance.size(0));
  const BudgetArguments budget = {ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept};
  SelectionPlan plan = plan_selection(importance.size(0), cu_seqlens, max_seqlen, budget);
  const Tensor importance_contiguous = held_contiguous(importance, plan.held);
  const void* data = importance_contiguous.const_data_ptr();
  switch (dtype_of(importance_contiguous)) {
    case DType::kFloat32:
      select_all<float, float>(plan, static_cast<const float*>(data));
      break;
    case DType::kFloat16:
      select_all<Half, float>(plan, static_cast<const Half*>(data));
      break;
    case DType::kBFloat16:
      select_all<BFloat16, float>(plan, static_cast<const BFloat16*>(data));
      break;
    case DType::kFloat64:
      select_all<double, double>(plan, static_cast<const double*>(data));
      break;
  }
  return {plan.indices, plan.cu_seqlens_kept, plan.inverse};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&stamp::cpu::select_tokens));
}
