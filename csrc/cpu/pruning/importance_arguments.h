// The importance arguments of an op and their checks.

#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/checks.h"

namespace stamp::cpu {

struct ImportanceArguments {
  Tensor hidden;      // [total, width]
  Tensor centrality;  // [total]
  int64_t norm_order;
  bool per_visible_query;
};

inline void check_importance_arguments(const ImportanceArguments& arguments) {
  check_tensor("hidden", arguments.hidden, {"total", "width"}, kFloatingDTypes);
  check_tensor("centrality", arguments.centrality, {arguments.hidden.size(0)}, {ScalarType::Float, ScalarType::Double});
  STD_TORCH_CHECK(
      arguments.norm_order == 1 || arguments.norm_order == 2, "norm_order must be 1 or 2, got ", arguments.norm_order);
}

// The original positions of the tokens that prune takes: int32 [total].
inline void check_positions(const Tensor& positions, const Tensor& hidden) {
  check_tensor("positions", positions, {hidden.size(0)}, {ScalarType::Int});
}

}  // namespace stamp::cpu
