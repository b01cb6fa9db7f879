// Row gather for pruned sequences, forward and backward, several tensors in one launch.
//
//   forward   y[j] = x[indices[j]]                         indices [T'] int64, -1 on tail rows
//   backward  dx[t] = inverse[t] < 0 ? 0 : dy[inverse[t]]  inverse [T] int32, -1 where token t was dropped
//
// Both are one operation: copy the named row, or write zeros where the map says -1. Every output row is written once,
// so there is neither a zero-fill pass nor an atomic addition, and the kernel fits a CUDA graph (no host sync).

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../rows.h"

namespace {

using stamp::Rows;
using torch::stable::Tensor;

constexpr int kThreads = 256;
// Kernel parameters are limited to 4 KiB; a longer list takes one launch per this many tensors.
constexpr int kMaxTensors = 64;
// What a block moves before it retires: four loads of 16 bytes in flight per thread to cover their latency.
constexpr int64_t kBytesPerBlock = 4 * 16 * kThreads;

struct AlignedRows {
  Rows rows;
  int32_t access_bytes;  // the widest access (16, 8, 4, 2 or 1 bytes) to which addresses and row sizes are aligned
};

struct TensorList {
  AlignedRows tensors[kMaxTensors];
};

__host__ __device__ int64_t rows_per_block(const Rows& rows) {
  return rows.row_bytes < kBytesPerBlock ? kBytesPerBlock / rows.row_bytes : 1;
}

template <typename access_t, typename index_t>
__device__ void copy_rows(const Rows& rows, const index_t* map, int64_t first_row, int64_t end_row) {
  // 32 bits are enough: a block holds kBytesPerBlock or one row.
  const uint32_t accesses_per_row = static_cast<uint32_t>(rows.row_bytes / sizeof(access_t));
  const uint32_t num_accesses = static_cast<uint32_t>(end_row - first_row) * accesses_per_row;
  auto* destination = reinterpret_cast<access_t*>(rows.destination + first_row * rows.row_bytes);
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < num_accesses; i += kThreads) {
    const uint32_t row = i / accesses_per_row;
    const uint32_t column = i - row * accesses_per_row;
    const int64_t source_row = static_cast<int64_t>(map[first_row + row]);
    access_t value{};
    if (source_row >= 0) {
      value = __ldg(reinterpret_cast<const access_t*>(rows.source + source_row * rows.source_stride) + column);
    }
    destination[i] = value;
  }
}

// One program copies a run of consecutive output rows of one tensor.
//   grid  (row runs of the widest tensor, tensors); programs past a tensor's last row leave at once
//   map   [num_rows], the source row of each output row, or -1
template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const __grid_constant__ TensorList list, const index_t* __restrict__ map, int64_t num_rows) {
  const AlignedRows& tensor = list.tensors[blockIdx.y];
  const Rows& rows = tensor.rows;
  const int64_t first_row = blockIdx.x * rows_per_block(rows);
  const int64_t end_row = min(num_rows, first_row + rows_per_block(rows));
  if (first_row >= end_row) {
    return;
  }
  switch (tensor.access_bytes) {
    case 16:
      return copy_rows<uint4>(rows, map, first_row, end_row);
    case 8:
      return copy_rows<uint2>(rows, map, first_row, end_row);
    case 4:
      return copy_rows<uint32_t>(rows, map, first_row, end_row);
    case 2:
      return copy_rows<uint16_t>(rows, map, first_row, end_row);
    default:
      return copy_rows<uint8_t>(rows, map, first_row, end_row);
  }
}

int32_t widest_access(const Rows& rows) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.destination) |
      static_cast<uintptr_t>(rows.source_stride) | static_cast<uintptr_t>(rows.row_bytes);
  int32_t bytes = 16;
  while (bits % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Contents are on the device; STAMP_KERNELS_CHECK=1 pays the sync that reading them costs.
template <typename index_t>
void check_row_map_if_asked(
    const index_t* map, int64_t size, int64_t source_rows, const char* name, cudaStream_t stream) {
  const char* asked = std::getenv("STAMP_KERNELS_CHECK");
  if (asked == nullptr || std::strcmp(asked, "1") != 0) {
    return;
  }
  std::vector<index_t> host(size);
  const cudaError_t copied = cudaMemcpyAsync(host.data(), map, size * sizeof(index_t), cudaMemcpyDeviceToHost, stream);
  STD_TORCH_CHECK(
      copied == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess,
      "reading ", name, " from the device failed");
  stamp::check_row_map(host.data(), size, source_rows, name);
}

template <typename index_t>
std::vector<Tensor> gather_rows(const std::vector<Tensor>& sources, const Tensor& map_tensor, const char* map_name) {
  stamp::check_row_map_tensor(sources, map_tensor, map_name);
  const int32_t device_index = map_tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard device_guard(device_index);
  const cudaStream_t stream = current_stream(device_index);
  const Tensor map_contiguous = torch::stable::contiguous(map_tensor);
  const index_t* map = map_contiguous.const_data_ptr<index_t>();
  const int64_t num_rows = map_contiguous.size(0);
  stamp::RowCopies copies(sources, num_rows);
  check_row_map_if_asked(map, num_rows, sources[0].size(0), map_name, stream);

  std::vector<AlignedRows> tensors;
  for (const Rows& rows : copies.rows) {
    if (num_rows > 0 && rows.row_bytes > 0) {
      tensors.push_back({rows, widest_access(rows)});
    }
  }
  for (size_t first = 0; first < tensors.size(); first += kMaxTensors) {
    const size_t count = std::min<size_t>(kMaxTensors, tensors.size() - first);
    TensorList list{};
    int64_t num_blocks = 1;
    for (size_t i = 0; i < count; ++i) {
      list.tensors[i] = tensors[first + i];
      const int64_t per_block = rows_per_block(list.tensors[i].rows);
      num_blocks = std::max(num_blocks, (num_rows + per_block - 1) / per_block);
    }
    const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(count));
    gather_rows_kernel<index_t><<<grid, kThreads, 0, stream>>>(list, map, num_rows);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "gather_tokens could not be launched: ", cudaGetErrorString(error));
  }
  return copies.outputs;
}

std::vector<Tensor> gather_tokens_forward(const std::vector<Tensor>& x, const Tensor& indices) {
  return gather_rows<int64_t>(x, indices, "indices");
}

std::vector<Tensor> gather_tokens_backward(const std::vector<Tensor>& grad, const Tensor& inverse) {
  return gather_rows<int32_t>(grad, inverse, "inverse");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stamp, CUDA, m) {
  m.impl("gather_tokens_forward", TORCH_BOX(&gather_tokens_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
}
