#include "cpu/core/arguments.h"

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "common/contents.h"

namespace stamp::cpu {

using torch::headeronly::ScalarType;

void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  stamp::check_cu_seqlens(name, cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.size(0) - 1, total, max_seqlen);
}

int64_t longest(const int32_t* cu_seqlens, int64_t num_sequences) {
  int64_t length = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    length = std::max<int64_t>(length, cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  return length;
}

Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(torch::stable::contiguous(x));
  return held.back();
}

void zero_tail(const Tensor& x, int64_t first_tail_row) {
  const int64_t total = x.size(0);
  if (first_tail_row < total) {
    const int64_t row_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
    std::memset(
        static_cast<char*>(x.mutable_data_ptr()) + first_tail_row * row_bytes, 0, (total - first_tail_row) * row_bytes);
  }
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

ScalarType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace stamp::cpu
