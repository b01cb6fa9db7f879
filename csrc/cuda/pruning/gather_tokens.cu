// gather_tokens on CUDA: one kernel for forward and backward (gather_kernels.cuh).
//
//   forward   y[j] = x[indices[j]]                         indices int64 [total_kept], -1 on tail rows
//   backward  dx[t] = inverse[t] < 0 ? 0 : dy[inverse[t]]  inverse int32 [total], -1 where token t is dropped

#include <torch/csrc/stable/library.h>

#include "common/row_copies.h"
#include "cuda/core/arguments.cuh"
#include "cuda/pruning/gather_kernels.cuh"

namespace stamp::cuda {
namespace {

template <typename index_t>
std::vector<Tensor> gather_rows(
    const char* name, const std::vector<Tensor>& sources, const char* map_name, const Tensor& map_tensor) {
  check_row_map_tensor(map_name, map_tensor, sizeof(index_t) == sizeof(int64_t) ? ScalarType::Long : ScalarType::Int);
  check_row_sources(name, sources, map_name, map_tensor);
  const Launch launch("gather_tokens", map_tensor.get_device_index());
  const Tensor map_contiguous = torch::stable::contiguous(map_tensor);
  const index_t* map = map_contiguous.const_data_ptr<index_t>();
  const int64_t num_rows = map_contiguous.size(0);
  const RowCopies copies(sources, num_rows);
  if (contents_are_checked()) {
    check_row_map(launch.copy_to_cpu(map, num_rows, map_name).data(), num_rows, sources[0].size(0), map_name);
  }
  launch_gather(copies.rows, map, num_rows, launch);
  return copies.outputs;
}

std::vector<Tensor> gather_tokens_forward(const std::vector<Tensor>& x, const Tensor& indices) {
  return gather_rows<int64_t>("x", x, "indices", indices);
}

std::vector<Tensor> gather_tokens_backward(const std::vector<Tensor>& grad, const Tensor& inverse) {
  return gather_rows<int32_t>("grad", grad, "inverse", inverse);
}

}  // namespace
}  // namespace stamp::cuda

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("gather_tokens_forward", TORCH_BOX(&stamp::cuda::gather_tokens_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&stamp::cuda::gather_tokens_backward));
}
