// The gather of rows, of several tensors in one launch: y[j] = x[map[j]], zeros where the map says -1.
//
// Every output row is written once, so there is no zero-fill pass and no atomic addition.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/arithmetic.h"
#include "common/rows.h"

namespace stamp::cuda {

constexpr int kGatherThreads = 256;
// Kernel parameters are limited to 4 KiB, so a longer list takes one launch for every kMaxTensors tensors.
constexpr int kMaxTensors = 64;
// A block makes this many accesses: each thread has four loads in flight, which hide their latency.
constexpr int64_t kAccessesPerBlock = 4 * kGatherThreads;

struct AlignedRows {
  Rows rows;
  int32_t access_bytes;  // the widest access (16, 8, 4, 2 or 1 bytes) to which addresses and row sizes are aligned
};

struct TensorList {
  AlignedRows tensors[kMaxTensors];
};

inline int32_t widest_access(const Rows& rows) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.destination) |
      static_cast<uint64_t>(rows.source_stride) | static_cast<uint64_t>(rows.row_bytes);
  int32_t bytes = 16;
  while (bits % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

__host__ __device__ inline int64_t rows_per_gather_block(const AlignedRows& tensor) {
  const int64_t bytes_per_block = kAccessesPerBlock * tensor.access_bytes;
  return tensor.rows.row_bytes < bytes_per_block ? bytes_per_block / tensor.rows.row_bytes : 1;
}

template <typename access_t, typename index_t>
__device__ void copy_rows(const Rows& rows, const index_t* map, int64_t start_row, int64_t end_row) {
  // 32 bits are enough: a block has at most kAccessesPerBlock accesses, or one row.
  const uint32_t accesses_per_row = static_cast<uint32_t>(rows.row_bytes / sizeof(access_t));
  const uint32_t num_accesses = static_cast<uint32_t>(end_row - start_row) * accesses_per_row;
  auto* destination = reinterpret_cast<access_t*>(rows.destination + start_row * rows.row_bytes);
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < num_accesses; i += kGatherThreads) {
    const uint32_t row = i / accesses_per_row;
    const uint32_t column = i - row * accesses_per_row;
    const int64_t source_row = static_cast<int64_t>(map[start_row + row]);
    access_t value{};
    if (source_row >= 0) {
      value = __ldg(reinterpret_cast<const access_t*>(rows.source + source_row * rows.source_stride) + column);
    }
    destination[i] = value;
  }
}

// One block copies a run of consecutive output rows of one tensor.
//   grid  (row runs of the widest tensor, tensors); blocks past a tensor's last row return at once
//   map   [num_rows], the source row of each output row, or -1
template <typename index_t>
__global__ void __launch_bounds__(kGatherThreads)
    gather_rows_kernel(const __grid_constant__ TensorList list, const index_t* __restrict__ map, int64_t num_rows) {
  const AlignedRows& tensor = list.tensors[blockIdx.y];
  const Rows& rows = tensor.rows;
  const int64_t start_row = blockIdx.x * rows_per_gather_block(tensor);
  const int64_t end_row = min(num_rows, start_row + rows_per_gather_block(tensor));
  if (start_row >= end_row) {
    return;
  }
  switch (tensor.access_bytes) {
    case 16:
      return copy_rows<uint4>(rows, map, start_row, end_row);
    case 8:
      return copy_rows<uint2>(rows, map, start_row, end_row);
    case 4:
      return copy_rows<uint32_t>(rows, map, start_row, end_row);
    case 2:
      return copy_rows<uint16_t>(rows, map, start_row, end_row);
    default:
      return copy_rows<uint8_t>(rows, map, start_row, end_row);
  }
}

template <typename index_t, typename Launch>
void launch_gather(const std::vector<Rows>& copies, const index_t* map, int64_t num_rows, const Launch& launch) {
  std::vector<AlignedRows> tensors;
  for (const Rows& rows : copies) {
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
      const int64_t per_block = rows_per_gather_block(list.tensors[i]);
      num_blocks = std::max(num_blocks, divide_up(num_rows, per_block));
    }
    const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(count));
    launch(&gather_rows_kernel<index_t>, grid, kGatherThreads, list, map, num_rows);
  }
}

}  // namespace stamp::cuda
