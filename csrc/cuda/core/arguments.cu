#include "cuda/core/arguments.cuh"

#include <cstdlib>
#include <cstring>

#include "common/contents.h"

namespace stamp::cuda {

bool contents_are_checked() {
  const char* value = std::getenv("STAMP_KERNELS_CHECK");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

std::vector<int32_t> checked_cu_seqlens(
    const int32_t* cu_seqlens, int64_t num_sequences, int64_t total, int64_t max_seqlen, const Launch& launch) {
  const std::vector<int32_t> offsets = launch.copy_to_cpu(cu_seqlens, num_sequences + 1, "cu_seqlens");
  check_cu_seqlens("cu_seqlens", offsets.data(), num_sequences, total, max_seqlen);
  return offsets;
}

Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(torch::stable::contiguous(x));
  return held.back();
}

Tensor held_cu_seqlens(const Tensor& cu_seqlens, std::vector<Tensor>& held) {
  STD_TORCH_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.scalar_type() == ScalarType::Int,
      "cu_seqlens must be int32 of shape [num_sequences + 1]");
  return held_contiguous(cu_seqlens, held);
}

}  // namespace stamp::cuda
