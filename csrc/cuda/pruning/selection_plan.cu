#include "cuda/pruning/selection_plan.cuh"

#include <algorithm>

#include "common/contents.h"
#include "common/kept_offsets.h"

namespace stamp::cuda {
namespace {

// The checks that the CPU's ops always make.
void check_contents(const SelectionProblem& problem, int64_t max_seqlen, const Launch& launch) {
  const int64_t num_sequences = problem.num_sequences;
  const std::vector<int32_t> offsets =
      checked_cu_seqlens(problem.cu_seqlens, num_sequences, problem.total, max_seqlen, launch);
  // Copies of keep_counts and protect in CPU memory.
  Budget budget = problem.budget;
  std::vector<char> counts;
  if (budget.keep_counts != nullptr) {
    const int64_t count_bytes = budget.kind == BudgetKind::kCounts64 ? sizeof(int64_t) : sizeof(int32_t);
    counts =
        launch.copy_to_cpu(static_cast<const char*>(budget.keep_counts), num_sequences * count_bytes, "keep_count");
    budget.keep_counts = counts.data();
  }
  std::vector<uint8_t> protect;
  if (problem.protect != nullptr) {
    protect = launch.copy_to_cpu(problem.protect, problem.total, "protect");
  }
  std::vector<int32_t> kept_offsets(num_sequences + 1);
  check_keep_counts(budget, num_sequences);
  const int64_t kept = fill_kept_offsets(
      offsets.data(), num_sequences, problem.protect == nullptr ? nullptr : protect.data(), budget,
      kept_offsets.data());
  check_total_kept(problem.total_kept, kept);
}

}  // namespace

SelectionPlan plan_selection(
    const char* name, const Tensor& rows, const Tensor& cu_seqlens, int64_t max_seqlen,
    const BudgetArguments& arguments, const Launch& launch) {
  SelectionPlan plan = {};
  SelectionProblem& problem = plan.problem;
  const int64_t total = rows.size(0);
  check_int32_rows(name, total);
  check_at_least("max_seqlen", max_seqlen, 0);
  const Tensor offsets = held_cu_seqlens(cu_seqlens, name, rows, plan.held);
  check_budget_arguments(arguments, offsets, total);
  STD_TORCH_CHECK(arguments.total_kept.has_value(), "total_kept must be given on a GPU");
  problem.cu_seqlens = offsets.const_data_ptr<int32_t>();
  problem.num_sequences = static_cast<int32_t>(offsets.size(0) - 1);
  problem.total = total;
  problem.total_kept = *arguments.total_kept;
  problem.budget = budget_of(arguments, plan.held);
  problem.codes_per_item = static_cast<int32_t>(std::min<int64_t>(arguments.codes_per_item, INT32_MAX));
  problem.protect = protect_of(arguments, plan.held);
  if (contents_are_checked()) {
    check_contents(problem, max_seqlen, launch);
  }
  if (problem.protect != nullptr) {
    const Tensor num_protected = torch::stable::new_empty(offsets, {problem.num_sequences});
    plan.held.push_back(num_protected);
    problem.num_protected = num_protected.const_data_ptr<int32_t>();
    launch_count_protected(problem, max_seqlen, num_protected.mutable_data_ptr<int32_t>(), launch);
  }

  plan.cu_seqlens_kept = torch::stable::new_empty(offsets, {problem.num_sequences + 1});
  plan.indices = torch::stable::new_empty(offsets, {problem.total_kept}, ScalarType::Long);
  plan.inverse = torch::stable::new_empty(offsets, {total});
  problem.cu_seqlens_kept = plan.cu_seqlens_kept.mutable_data_ptr<int32_t>();
  problem.indices = plan.indices.mutable_data_ptr<int64_t>();
  problem.inverse = plan.inverse.mutable_data_ptr<int32_t>();
  return plan;
}

}  // namespace stamp::cuda
