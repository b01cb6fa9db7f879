#include "cpu/pruning/selection_plan.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "cpu/core/tasks.h"
#include "cpu/pruning/kept_offsets.h"

namespace stamp::cpu {
namespace {

void check_keep_counts(const Budget& budget, int64_t num_sequences) {
  int64_t smallest = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    if (budget.kind == BudgetKind::kCounts32) {
      smallest = std::min<int64_t>(smallest, static_cast<const int32_t*>(budget.keep_counts)[i]);
    } else if (budget.kind == BudgetKind::kCounts64) {
      smallest = std::min(smallest, static_cast<const int64_t*>(budget.keep_counts)[i]);
    }
  }
  STD_TORCH_CHECK(smallest >= 0, "keep_count must not be negative, got ", smallest);
}

void check_total_kept(int64_t total_kept, int64_t kept) {
  STD_TORCH_CHECK(kept <= total_kept, "total_kept is ", total_kept, ", but the sequences keep ", kept, " tokens");
}

}  // namespace

SelectionPlan plan_selection(
    int64_t total, const Tensor& cu_seqlens, int64_t max_seqlen, const BudgetArguments& arguments) {
  SelectionPlan plan = {};
  check_at_least("max_seqlen", max_seqlen, 0);
  const Tensor offsets = checked_cu_seqlens("cu_seqlens", cu_seqlens, total, max_seqlen, plan.held);
  check_budget_arguments(arguments, offsets, total);
  plan.num_sequences = offsets.size(0) - 1;
  plan.total = total;
  plan.codes_per_item = arguments.codes_per_item;
  plan.cu_seqlens = offsets.const_data_ptr<int32_t>();
  plan.longest = longest(plan.cu_seqlens, plan.num_sequences);
  const Budget budget = budget_of(arguments, plan.held);
  check_keep_counts(budget, plan.num_sequences);
  plan.protect = protect_of(arguments, plan.held);

  plan.cu_seqlens_kept = torch::stable::new_empty(offsets, {plan.num_sequences + 1});
  int32_t* kept_offsets = plan.cu_seqlens_kept.mutable_data_ptr<int32_t>();
  plan.kept_offsets = kept_offsets;
  const int64_t kept = fill_kept_offsets(plan.cu_seqlens, plan.num_sequences, plan.protect, budget, kept_offsets);
  plan.total_kept = arguments.total_kept.value_or(kept);
  check_total_kept(plan.total_kept, kept);

  plan.indices = torch::stable::new_empty(offsets, {plan.total_kept}, ScalarType::Long);
  plan.inverse = torch::stable::new_empty(offsets, {total});
  plan.kept_rows = plan.indices.mutable_data_ptr<int64_t>();
  plan.inverse_rows = plan.inverse.mutable_data_ptr<int32_t>();
  std::fill(plan.kept_rows + kept, plan.kept_rows + plan.total_kept, -1);
  std::fill(plan.inverse_rows + plan.cu_seqlens[plan.num_sequences], plan.inverse_rows + total, -1);
  return plan;
}

void for_sequences(
    const SelectionPlan& plan, int64_t min_tokens_per_task, int64_t scratch_bytes,
    const std::function<void(int64_t, int64_t, char*)>& run) {
  const int64_t tokens = plan.cu_seqlens[plan.num_sequences];
  const int64_t num_tasks = std::clamp<int64_t>(tokens / min_tokens_per_task, 1, torch::stable::get_num_threads());
  const Tensor scratch =
      torch::stable::new_empty(plan.cu_seqlens_kept, {num_tasks * scratch_of_thread(scratch_bytes)}, ScalarType::Byte);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  // Task t begins with the first sequence that starts at or after token tokens * t / num_tasks.
  const auto first_sequence = [&](int64_t task) {
    return task == num_tasks
        ? plan.num_sequences
        : std::lower_bound(plan.cu_seqlens, plan.cu_seqlens + plan.num_sequences, tokens * task / num_tasks) -
            plan.cu_seqlens;
  };
  for_tasks(num_tasks, num_tasks, memory, scratch_bytes, [&](int64_t task, char* of_thread) {
    run(first_sequence(task), first_sequence(task + 1), of_thread);
  });
}

}  // namespace stamp::cpu
