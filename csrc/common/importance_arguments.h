// The importance arguments of an op and their checks, the same on every device.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp {

using torch::stable::Tensor;

struct ImportanceArguments {
  Tensor hidden;      // [total, width]
  Tensor centrality;  // [total]
  int64_t norm_order;
  bool per_visible_query;
};

inline void check_importance_arguments(const ImportanceArguments& arguments) {
  using torch::headeronly::ScalarType;
  const Tensor& hidden = arguments.hidden;
  const Tensor& centrality = arguments.centrality;
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have shape [total, width], got ", hidden.dim(), " dimensions");
  STD_TORCH_CHECK(
      centrality.dim() == 1 && centrality.size(0) == hidden.size(0),
      "centrality must have one entry for each row of hidden");
  STD_TORCH_CHECK(
      centrality.scalar_type() == ScalarType::Float || centrality.scalar_type() == ScalarType::Double,
      "centrality must be float32 or float64");
  STD_TORCH_CHECK(
      arguments.norm_order == 1 || arguments.norm_order == 2, "norm_order must be 1 or 2, got ", arguments.norm_order);
}

}  // namespace stamp
