// Arguments that the ops of every family have: offsets of the sequences, dtypes, contents that are checked on request.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/core/launch.cuh"
#include "cuda/core/numbers.cuh"

namespace stamp::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Contents are on the device; STAMP_KERNELS_CHECK=1 pays the sync that reading them costs.
bool contents_are_checked();

// The offsets on the host, checked: a rising sequence from 0 to at most `total`, no step longer than max_seqlen.
std::vector<int32_t> checked_cu_seqlens(
    const int32_t* cu_seqlens, int64_t batch, int64_t total, int64_t max_seqlen, const Launch& launch);

// x, or a contiguous copy of it; `held` keeps it alive.
Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held);

// int32 [batch + 1] on the device.
Tensor held_cu_seqlens(const Tensor& cu_seqlens, std::vector<Tensor>& held);

// Calls run with a value of the type that the tensor's numbers have on the device.
template <typename Run>
void with_number_type(const char* name, const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Double:
      return run(double{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace stamp::cuda
