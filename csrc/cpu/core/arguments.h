// Checks and conversions of arguments that the ops of every family have: offsets, dtypes, contiguous tensors.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/core/checks.h"
#include "cpu/core/dtypes.h"

namespace stamp::cpu {

// x, or a contiguous copy of it. `held` keeps it alive.
Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held);

// The same for offsets, which must be int32 [num_sequences + 1], from 0 to at most `total`, never decreasing, with
// steps of at most max_seqlen.
Tensor checked_cu_seqlens(
    const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen, std::vector<Tensor>& held);

// The length of the longest sequence.
int64_t longest(const int32_t* cu_seqlens, int64_t num_sequences);

// Fills the rows [first_tail_row, total) of a contiguous [total, ...] tensor with zeros.
void zero_tail(const Tensor& x, int64_t first_tail_row);

// The dtype of a tensor of floating dtype.
DType dtype_of(const Tensor& x);

// float32, or float64 for float64.
ScalarType compute_type(DType dtype);

// A number as kernels compute with it: rounded to float32, or as it is for float64.
double in_compute_type(DType dtype, double x);

}  // namespace stamp::cpu
