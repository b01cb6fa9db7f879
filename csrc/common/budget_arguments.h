// From the budget arguments of an op to the budget that the kernels of every device read.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/budget.h"

namespace stamp {

using torch::stable::Tensor;

// Exactly one of ratio_q32, keep_count and keep_counts is given.
struct BudgetArguments {
  std::optional<int64_t> ratio_q32;
  std::optional<int64_t> keep_count;
  std::optional<Tensor> keep_counts;  // int32 or int64 [num_sequences]
  int64_t min_keep;
  std::optional<Tensor> protect;  // bool [total]
  int64_t codes_per_item;
  std::optional<int64_t> total_kept;
};

// The budget may point into a tensor, which `held` keeps alive.
inline Budget budget_of(const BudgetArguments& arguments, int64_t num_sequences, std::vector<Tensor>& held) {
  STD_TORCH_CHECK(
      arguments.ratio_q32.has_value() + arguments.keep_count.has_value() + arguments.keep_counts.has_value() == 1,
      "exactly one of ratio_q32, keep_count and keep_counts must be given");
  STD_TORCH_CHECK(arguments.codes_per_item >= 1, "codes_per_item must be at least 1, got ", arguments.codes_per_item);
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
    using torch::headeronly::ScalarType;
    const Tensor counts = torch::stable::contiguous(*arguments.keep_counts);
    held.push_back(counts);
    STD_TORCH_CHECK(
        counts.dim() == 1 && counts.size(0) == num_sequences, "keep_count must have one entry for each sequence");
    STD_TORCH_CHECK(
        counts.scalar_type() == ScalarType::Int || counts.scalar_type() == ScalarType::Long,
        "keep_count must be int32 or int64");
    budget.kind = counts.scalar_type() == ScalarType::Int ? BudgetKind::kCounts32 : BudgetKind::kCounts64;
    budget.keep_counts = counts.const_data_ptr();
  }
  return budget;
}

// The mask [total] of protected tokens, or null.
inline const uint8_t* protect_of(const BudgetArguments& arguments, int64_t total, std::vector<Tensor>& held) {
  if (!arguments.protect.has_value()) {
    return nullptr;
  }
  held.push_back(torch::stable::contiguous(*arguments.protect));
  const Tensor& protect = held.back();
  STD_TORCH_CHECK(
      protect.dim() == 1 && protect.size(0) == total && protect.element_size() == 1,
      "protect must have one bool for each token");
  return static_cast<const uint8_t*>(protect.const_data_ptr());
}

}  // namespace stamp
