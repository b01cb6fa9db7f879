// Checks and conversions of arguments that the ops of every family have: offsets, dtypes, contents.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/checks.h"
#include "cuda/core/dtypes.cuh"
#include "cuda/core/launch.cuh"

namespace stamp::cuda {

// Whether to check contents. They are on the device, so a check costs a sync, and only STAMP_KERNELS_CHECK=1 asks for
// it, at the time when the library is loaded.
bool contents_are_checked();

// A copy of the offsets in CPU memory, checked: from 0 to at most `total`, never decreasing, with steps of at most
// max_seqlen.
std::vector<int32_t> checked_cu_seqlens(
    const int32_t* cu_seqlens, int64_t num_sequences, int64_t total, int64_t max_seqlen, const Launch& launch);

// x, or a contiguous copy of it. `held` keeps it alive.
Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held);

// The same for cu_seqlens, which must be int32 [num_sequences + 1] on the device of `rows`, the argument `name`.
Tensor held_cu_seqlens(const Tensor& cu_seqlens, const char* name, const Tensor& rows, std::vector<Tensor>& held);

// Calls run with a value of the C++ type of the tensor's dtype, which must be a floating one.
template <typename Run>
void with_number_type(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      return run(double{});
  }
}

}  // namespace stamp::cuda
