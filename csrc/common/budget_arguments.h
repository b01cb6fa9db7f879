// The budget arguments of an op, as every device's kernels read them.

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

struct BudgetArguments {
  std::optional<int64_t> ratio_q32;
  std::optional<int64_t> keep_count;
  std::optional<Tensor> keep_counts;  // [batch] int32 or int64
  int64_t min_keep;
  std::optional<Tensor> protect;  // [total] bool
  int64_t codes_per_item;
  std::optional<int64_t> total_kept;
};

// `held` keeps alive what the budget points into.
inline Budget budget_of(const BudgetArguments& arguments, int64_t batch, std::vector<Tensor>& held) {
  STD_TORCH_CHECK(
      arguments.ratio_q32.has_value() + arguments.keep_count.has_value() + arguments.keep_counts.has_value() == 1,
      "exactly one of ratio_q32, keep_count and keep_counts must be given");
  STD_TORCH_CHECK(arguments.codes_per_item >= 1, "codes_per_item must be at least 1, got ", arguments.codes_per_item);
  Budget budget = {BudgetKind::kRatio, 0, 0, nullptr, arguments.min_keep, arguments.codes_per_item};
  if (arguments.ratio_q32.has_value()) {
    budget.ratio_q32 = *arguments.ratio_q32;
  } else if (arguments.keep_count.has_value()) {
    budget.kind = BudgetKind::kCount;
    budget.keep_count = *arguments.keep_count;
  } else {
    using torch::headeronly::ScalarType;
    const Tensor counts = torch::stable::contiguous(*arguments.keep_counts);
    held.push_back(counts);
    STD_TORCH_CHECK(
        counts.dim() == 1 && counts.size(0) == batch, "keep_count must have one entry for each sequence");
    STD_TORCH_CHECK(
        counts.scalar_type() == ScalarType::Int || counts.scalar_type() == ScalarType::Long,
        "keep_count must be int32 or int64");
    budget.kind = counts.scalar_type() == ScalarType::Int ? BudgetKind::kCounts32 : BudgetKind::kCounts64;
    budget.keep_counts = counts.const_data_ptr();
  }
  return budget;
}

// The mask of protected tokens, null where there is none.
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
