// The scoring arguments of an op, checked the same on every device.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp {

inline void check_scoring_arguments(
    const torch::stable::Tensor& hidden, const torch::stable::Tensor& centrality, int64_t norm_order) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have shape [total, width], got ", hidden.dim(), " dimensions");
  STD_TORCH_CHECK(
      centrality.dim() == 1 && centrality.size(0) == hidden.size(0),
      "centrality must have one entry for each row of hidden");
  STD_TORCH_CHECK(
      centrality.scalar_type() == ScalarType::Float || centrality.scalar_type() == ScalarType::Double,
      "centrality must be float32 or float64");
  STD_TORCH_CHECK(norm_order == 1 || norm_order == 2, "norm_order must be 1 or 2, got ", norm_order);
}

}  // namespace stamp
