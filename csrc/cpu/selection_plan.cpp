#include "selection_plan.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {

namespace {

using torch::headeronly::ScalarType;

int64_t count_protected_items(const uint8_t* protect, int64_t num_items, int64_t item_length) {
  int64_t count = 0;
  for (int64_t item = 0; item < num_items; ++item) {
    uint8_t is_protected = 0;
    for (int64_t token = 0; token < item_length; ++token) {
      is_protected |= *protect++;
    }
    count += is_protected;
  }
  return count;
}

// keep_counts as int64, which are checked.
std::vector<int64_t> counts_of(const Tensor& keep_counts, int64_t batch) {
  STD_TORCH_CHECK(
      keep_counts.dim() == 1 && keep_counts.size(0) == batch, "keep_count must have one entry for each sequence");
  const Tensor counts = torch::stable::contiguous(torch::stable::to(keep_counts, ScalarType::Long));
  const int64_t* count = counts.const_data_ptr<int64_t>();
  if (batch > 0) {
    const int64_t least = *std::min_element(count, count + batch);
    STD_TORCH_CHECK(least >= 0, "keep_count must not be negative, got ", least);
  }
  return std::vector<int64_t>(count, count + batch);
}

}  // namespace

SelectionPlan plan_selection(
    int64_t total, const Tensor& cu_seqlens, int64_t max_seqlen, const BudgetArguments& arguments) {
  SelectionPlan plan = {};
  plan.batch = cu_seqlens.size(0) - 1;
  plan.total = total;
  plan.item_length = arguments.item_length;
  const Tensor offsets = held_contiguous(cu_seqlens, plan.held);
  check_cu_seqlens("cu_seqlens", offsets, total, max_seqlen);
  plan.cu_seqlens = offsets.const_data_ptr<int32_t>();
  plan.longest = longest(plan.cu_seqlens, plan.batch);
  if (arguments.protect.has_value()) {
    const Tensor protect = held_contiguous(*arguments.protect, plan.held);
    STD_TORCH_CHECK(
        protect.dim() == 1 && protect.size(0) == total && protect.element_size() == 1,
        "protect must have one bool for each token");
    plan.protect = static_cast<const uint8_t*>(protect.const_data_ptr());
  }
  const int budgets = arguments.ratio_q32.has_value() + arguments.keep_count.has_value() +
      arguments.keep_counts.has_value();
  STD_TORCH_CHECK(budgets == 1, "exactly one of ratio_q32, keep_count and keep_counts must be given");
  STD_TORCH_CHECK(plan.item_length >= 1, "item_length must be at least 1, got ", plan.item_length);
  const std::vector<int64_t> counts = arguments.keep_counts.has_value()
      ? counts_of(*arguments.keep_counts, plan.batch)
      : std::vector<int64_t>(plan.batch, arguments.keep_count.value_or(0));

  plan.cu_seqlens_kept = torch::stable::new_empty(offsets, {plan.batch + 1});
  int32_t* kept_offsets = plan.cu_seqlens_kept.mutable_data_ptr<int32_t>();
  plan.kept_offsets = kept_offsets;
  int64_t kept = 0;
  for (int64_t s = 0; s < plan.batch; ++s) {
    kept_offsets[s] = static_cast<int32_t>(kept);
    const int64_t length = plan.cu_seqlens[s + 1] - plan.cu_seqlens[s];
    STD_TORCH_CHECK(
        length % plan.item_length == 0, "every sequence must be whole items of item_length ", plan.item_length,
        " tokens, got a sequence of ", length);
    const int64_t num_items = length / plan.item_length;
    const int64_t num_protected = plan.protect == nullptr
        ? 0
        : count_protected_items(plan.protect + plan.cu_seqlens[s], num_items, plan.item_length);
    const int64_t unprotected = num_items - num_protected;
    // The ceiling of the ratio, the same in every backend.
    const int64_t budget = arguments.ratio_q32.has_value()
        ? (*arguments.ratio_q32 * unprotected - unprotected + 0xffffffffLL) >> 32
        : counts[s];
    kept += plan.item_length * (num_protected + std::min(unprotected, std::max(arguments.min_keep, budget)));
  }
  plan.total_kept = arguments.total_kept.value_or(kept);
  STD_TORCH_CHECK(
      kept <= plan.total_kept, "total_kept is ", plan.total_kept, ", but the sequences keep ", kept, " tokens");
  kept_offsets[plan.batch] = static_cast<int32_t>(kept);

  plan.indices = torch::stable::new_empty(offsets, {plan.total_kept}, ScalarType::Long);
  plan.inverse = torch::stable::new_empty(offsets, {total});
  plan.kept_rows = plan.indices.mutable_data_ptr<int64_t>();
  plan.inverse_rows = plan.inverse.mutable_data_ptr<int32_t>();
  std::fill(plan.kept_rows + kept, plan.kept_rows + plan.total_kept, -1);
  std::fill(plan.inverse_rows + plan.cu_seqlens[plan.batch], plan.inverse_rows + total, -1);
  return plan;
}

void for_sequences(
    const SelectionPlan& plan, int64_t least_tokens_per_task, int64_t scratch_bytes,
    const std::function<void(int64_t, int64_t, char*)>& run) {
  const int64_t tokens = plan.cu_seqlens[plan.batch];
  const int64_t num_tasks =
      std::clamp<int64_t>(tokens / least_tokens_per_task, 1, torch::stable::get_num_threads());
  constexpr int64_t kCacheLine = 64;
  const int64_t stride = (scratch_bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  const Tensor scratch =
      torch::stable::new_empty(plan.cu_seqlens_kept, {num_tasks * stride}, torch::headeronly::ScalarType::Byte);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  // Task t begins with the first sequence that begins at or after its share of the tokens.
  const auto first_sequence = [&](int64_t task) {
    return task == num_tasks
        ? plan.batch
        : std::lower_bound(plan.cu_seqlens, plan.cu_seqlens + plan.batch, tokens * task / num_tasks) - plan.cu_seqlens;
  };
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      run(first_sequence(task), first_sequence(task + 1), memory + task * stride);
    }
  });
}

}  // namespace stamp::cpu
