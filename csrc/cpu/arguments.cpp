#include "arguments.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../contents.h"

namespace stamp::cpu {

using torch::headeronly::ScalarType;

void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  stamp::check_cu_seqlens(name, cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.size(0) - 1, total, max_seqlen);
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
