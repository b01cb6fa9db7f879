#include "cpu/core/arguments.h"

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/ops.h>

namespace stamp::cpu {
namespace {

// Offsets [num_sequences + 1]: from 0 to at most `total`, never decreasing, with steps of at most max_seqlen.
void check_cu_seqlens(
    const char* name, const int32_t* offsets, int64_t num_sequences, int64_t total, int64_t max_seqlen) {
  STD_TORCH_CHECK(offsets[0] == 0, name, "[0] must be 0, got ", offsets[0]);
  for (int64_t i = 0; i < num_sequences; ++i) {
    STD_TORCH_CHECK(
        offsets[i] <= offsets[i + 1], name, " must never decrease, got ", offsets[i], " then ", offsets[i + 1],
        " at index ", i);
  }
  for (int64_t i = 0; i < num_sequences; ++i) {
    STD_TORCH_CHECK(
        offsets[i + 1] - offsets[i] <= max_seqlen, name, ": sequence ", i, " has length ", offsets[i + 1] - offsets[i],
        ", more than the given max_seqlen ", max_seqlen);
  }
  STD_TORCH_CHECK(
      offsets[num_sequences] <= total, name, "[-1] must be at most the number of rows ", total, ", got ",
      offsets[num_sequences]);
}

}  // namespace

Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(torch::stable::contiguous(x));
  return held.back();
}

Tensor checked_cu_seqlens(
    const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen, std::vector<Tensor>& held) {
  check_cu_seqlens_tensor(name, cu_seqlens);
  const Tensor offsets = held_contiguous(cu_seqlens, held);
  check_cu_seqlens(name, offsets.const_data_ptr<int32_t>(), offsets.size(0) - 1, total, max_seqlen);
  return offsets;
}

int64_t longest(const int32_t* cu_seqlens, int64_t num_sequences) {
  int64_t length = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    length = std::max<int64_t>(length, cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  return length;
}

void zero_tail(const Tensor& x, int64_t first_tail_row) {
  const int64_t total = x.size(0);
  if (first_tail_row < total) {
    const int64_t row_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
    std::memset(
        static_cast<char*>(x.mutable_data_ptr()) + first_tail_row * row_bytes, 0, (total - first_tail_row) * row_bytes);
  }
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat64;
  }
}

ScalarType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

double in_compute_type(DType dtype, double x) {
  return dtype == DType::kFloat64 ? x : static_cast<double>(static_cast<float>(x));
}

}  // namespace stamp::cpu
