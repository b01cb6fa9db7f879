// From the budget arguments of an op to the budget that the kernels read.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/checks.h"
#include "cpu/pruning/budget.h"

namespace stamp::cpu {

// Exactly one of ratio_q32, keep_count and keep_counts is given.
struct BudgetArguments {
  std::optional<int64_t> ratio_q32;   // in [0, 2^32]
  std::optional<int64_t> keep_count;  // at least 0
  std::optional<Tensor> keep_counts;  // int32 or int64 [num_sequences]
  int64_t min_keep;                   // at least 0
  std::optional<Tensor> protect;      // bool [total]
  int64_t codes_per_item;             // at least 1
  std::optional<int64_t> total_kept;  // at least 0
};

inline void check_budget_arguments(const BudgetArguments& arguments, const Tensor& cu_seqlens, int64_t total) {
  constexpr int64_t kRatioOfOne = int64_t{1} << 32;
  STD_TORCH_CHECK(
      arguments.ratio_q32.has_value() + arguments.keep_count.has_value() + arguments.keep_counts.has_value() == 1,
      "exactly one of ratio_q32, keep_count and keep_counts must be given");
  const int64_t ratio_q32 = arguments.ratio_q32.value_or(0);
  STD_TORCH_CHECK(
      ratio_q32 >= 0 && ratio_q32 <= kRatioOfOne, "ratio_q32 must be in [0, ", kRatioOfOne, "], got ", ratio_q32);
  check_at_least("keep_count", arguments.keep_count.value_or(0), 0);
  check_at_least("min_keep", arguments.min_keep, 0);
  check_at_least("codes_per_item", arguments.codes_per_item, 1);
  check_at_least("total_kept", arguments.total_kept.value_or(0), 0);
  if (arguments.keep_counts.has_value()) {
    check_tensor("keep_counts", *arguments.keep_counts, {cu_seqlens.size(0) - 1}, {ScalarType::Int, ScalarType::Long});
  }
  if (arguments.protect.has_value()) {
    check_tensor("protect", *arguments.protect, {total}, kMaskDTypes);
  }
}

// From checked arguments. The budget may point into a tensor, which `held` keeps alive.
inline Budget budget_of(const BudgetArguments& arguments, std::vector<Tensor>& held) {
  Budget budget;
  budget.min_keep = arguments.min_keep;
  budget.codes_per_item = arguments.codes_per_item;
  if (arguments.ratio_q32.has_value()) {
    budget.kind = BudgetKind::kRatio;
    budget.ratio_q32 = *arguments.ratio_q32;
  } else if (arguments.keep_count.has_value()) {
    budget.kind = BudgetKind::kCount;
    budget.keep_count = *arguments.keep_count;
  } else {
    held.push_back(torch::stable::contiguous(*arguments.keep_counts));
    const Tensor& counts = held.back();
    budget.kind = counts.scalar_type() == ScalarType::Int ? BudgetKind::kCounts32 : BudgetKind::kCounts64;
    budget.keep_counts = counts.const_data_ptr();
  }
  return budget;
}

// The mask [total] of protected tokens, or null, from checked arguments.
inline const uint8_t* protect_of(const BudgetArguments& arguments, std::vector<Tensor>& held) {
  if (!arguments.protect.has_value()) {
    return nullptr;
  }
  held.push_back(torch::stable::contiguous(*arguments.protect));
  return static_cast<const uint8_t*>(held.back().const_data_ptr());
}

}  // namespace stamp::cpu
