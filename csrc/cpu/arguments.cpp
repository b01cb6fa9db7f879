#include "arguments.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {

using torch::headeronly::ScalarType;

void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t batch = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(offsets[0] == 0, name, "[0] must be 0, got ", offsets[0]);
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(
        offsets[i] <= offsets[i + 1], name, " must never decrease, got ", offsets[i], " then ", offsets[i + 1],
        " at index ", i);
  }
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(
        offsets[i + 1] - offsets[i] <= max_seqlen, name, ": sequence ", i, " has length ", offsets[i + 1] - offsets[i],
        ", more than the given max_seqlen ", max_seqlen);
  }
  STD_TORCH_CHECK(
      offsets[batch] <= total, name, "[-1] must be at most the number of rows ", total, ", got ", offsets[batch]);
}

int64_t longest(const int32_t* offsets, int64_t batch) {
  int64_t length = 0;
  for (int64_t i = 0; i < batch; ++i) {
    length = std::max<int64_t>(length, offsets[i + 1] - offsets[i]);
  }
  return length;
}

Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(torch::stable::contiguous(x));
  return held.back();
}

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace stamp::cpu
