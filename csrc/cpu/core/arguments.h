// Arguments that the ops of every family have: offsets of the sequences, dtypes.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/core/numbers.h"

namespace stamp::cpu {

using torch::stable::Tensor;

// int32 [batch + 1], contiguous: a rising sequence from 0 to at most `total`, no step longer than max_seqlen.
void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen);

// The length of the longest sequence.
int64_t longest(const int32_t* cu_seqlens, int64_t batch);

// x, or a contiguous copy of it; `held` keeps it alive.
Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held);

// Rows [cu_seqlens[-1], total) of a contiguous [total, ...] tensor := 0.
void zero_tail(const Tensor& x, int64_t first_tail_row);

DType dtype_of(const char* name, const Tensor& x);

}  // namespace stamp::cpu
