// Token importance: the norm of a token's hidden state times its centrality.
//
//     importance_i = ||h_i|| * centrality_i
//     importance_i = ||h_i|| * centrality_i / (n - i)     per visible query: n - i queries see token i of n
//
// One pass over the hidden states, bound by memory. A row is a run of 16-byte chunks, and chunk c belongs to lane c mod
// L of the L lanes of its row. So the order of the additions depends only on the width and dtype of a row, not on its
// neighbours or its alignment, and token_importance and prune give the same bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/arithmetic.h"
#include "common/dtypes.h"
#include "cuda/core/warp.cuh"

namespace stamp::cuda {

constexpr int kImportanceThreads = 256;
// A thread has this many 16-byte loads in flight, each from another row.
constexpr int kRowsInFlight = 4;
constexpr int64_t kChunkBytes = 16;

struct ImportanceProblem {
  const char* hidden;  // [total, width]
  int64_t row_stride;  // bytes from one row to the next
  int64_t row_bytes;
  int32_t access_bytes;       // the widest access, 16 bytes down to one number, to which rows are aligned
  int32_t lanes_per_row;      // a power of two up to a warp
  const void* centrality;     // [total] float, or double where centrality_is_double
  const int32_t* cu_seqlens;  // [num_sequences + 1]; null: no tail rows
  int64_t num_sequences;
  int64_t total;
  bool centrality_is_double;
  bool per_visible_query;  // needs cu_seqlens
  void* importance;        // [total] in the compute type
};

// A narrow row has about one lane for each chunk, so that no lane is idle.
inline int32_t lanes_for_row(int64_t row_bytes) {
  int32_t lanes = 1;
  while (lanes < kWarpSize && lanes * kChunkBytes < row_bytes) {
    lanes *= 2;
  }
  return lanes;
}

inline int32_t widest_access(const ImportanceProblem& problem, int32_t element_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(problem.hidden) | static_cast<uint64_t>(problem.row_stride) |
      static_cast<uint64_t>(problem.row_bytes);
  int32_t bytes = kChunkBytes;
  while (bytes > element_bytes && bits % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

__host__ __device__ inline int64_t rows_per_importance_block(const ImportanceProblem& problem) {
  return kRowsInFlight * (kImportanceThreads / problem.lanes_per_row);
}

inline int64_t num_importance_blocks(const ImportanceProblem& problem) {
  return divide_up(problem.total, rows_per_importance_block(problem));
}

// 16 bytes of a row in registers, zeros beyond its end.
struct Chunk {
  uint32_t words[kChunkBytes / 4];
};

// Loads the first `bytes_left` bytes of a chunk, where the row ends.
template <typename Access>
__device__ inline Chunk load_chunk(const char* from, int bytes_left) {
  constexpr int kAccessBytes = sizeof(Access);
  Chunk chunk = {};
#pragma unroll
  for (int offset = 0; offset < kChunkBytes; offset += kAccessBytes) {
    if (offset < bytes_left) {
      const Access access = __ldg(reinterpret_cast<const Access*>(from + offset));
      if constexpr (kAccessBytes < 4) {
        chunk.words[offset / 4] |= static_cast<uint32_t>(access) << (8 * (offset % 4));
      } else {
        memcpy(&chunk.words[offset / 4], &access, kAccessBytes);
      }
    }
  }
  return chunk;
}

// Number `index` of a chunk of numbers of type T.
template <typename T>
__device__ inline Compute<T> number_of_chunk(const Chunk& chunk, int index) {
  if constexpr (sizeof(T) == 2) {
    return to_float(T{static_cast<uint16_t>(chunk.words[index / 2] >> (16 * (index % 2)))});
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<float>(chunk.words[index]);
  } else {
    const uint64_t high = chunk.words[2 * index + 1];
    return bits_as<double>(high << 32 | chunk.words[2 * index]);
  }
}

// sum + x * x in one instruction, so that the bits do not depend on whether a compiler contracts the two operations.
__device__ inline float add_square(float sum, float x) {
  return fmaf(x, x, sum);
}

__device__ inline double add_square(double sum, double x) {
  return fma(x, x, sum);
}

// The end of the sequence that a row belongs to. The row is not a tail row.
__device__ inline int64_t end_of_sequence(const int32_t* cu_seqlens, int64_t num_sequences, int64_t row) {
  int64_t low = 1, high = num_sequences;  // the first offset above row is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (__ldg(cu_seqlens + middle) > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return __ldg(cu_seqlens + low);
}

template <typename T, bool kIsL2, typename Access>
__device__ inline void importance_of_rows_by(const ImportanceProblem& problem, int64_t block) {
  using scalar = Compute<T>;
  constexpr int kNumbers = kChunkBytes / sizeof(T);
  constexpr int kSums = 2;  // independent sums, so that few additions wait for the one before
  auto* importance = static_cast<scalar*>(problem.importance);
  const int lanes = problem.lanes_per_row;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int rows_at_once = kImportanceThreads / lanes;
  const int64_t start_row_of_block = block * rows_per_importance_block(problem);
  const int64_t start_row = start_row_of_block + threadIdx.x / lanes;
  const int64_t end_rows =
      problem.cu_seqlens == nullptr ? problem.total : __ldg(problem.cu_seqlens + problem.num_sequences);
  if (start_row_of_block >= end_rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows_per_importance_block(problem); i += kImportanceThreads) {
      if (start_row_of_block + i < problem.total) {
        importance[start_row_of_block + i] = 0;
      }
    }
    return;
  }

  // The lanes of the rows share the last step: lane l multiplies the norms of rows l, l + lanes, ... by their factors.
  scalar factors[kRowsInFlight];
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int64_t row = start_row + (lane + i * lanes) * rows_at_once;
    factors[i] = 0;
    if (lane + i * lanes < kRowsInFlight && row < end_rows) {
      factors[i] = problem.centrality_is_double
          ? static_cast<scalar>(__ldg(static_cast<const double*>(problem.centrality) + row))
          : static_cast<scalar>(__ldg(static_cast<const float*>(problem.centrality) + row));
      if (problem.per_visible_query) {
        factors[i] /= static_cast<scalar>(end_of_sequence(problem.cu_seqlens, problem.num_sequences, row) - row);
      }
    }
  }

  const char* rows[kRowsInFlight];
#pragma unroll
  for (int r = 0; r < kRowsInFlight; ++r) {
    // Past the end the last row is read again, which costs less than a condition at every load.
    rows[r] = problem.hidden + min(start_row + r * rows_at_once, end_rows - 1) * problem.row_stride;
  }

  scalar sums[kRowsInFlight][kSums] = {};
#pragma unroll 1  // enough rows are in flight; unrolling would take registers from other threads
  for (int64_t offset = lane * kChunkBytes; offset < problem.row_bytes; offset += lanes * kChunkBytes) {
    const int bytes_left = static_cast<int>(min(problem.row_bytes - offset, kChunkBytes));
    Chunk chunks[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      chunks[r] = load_chunk<Access>(rows[r] + offset, bytes_left);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        const scalar number = number_of_chunk<T>(chunks[r], i);
        scalar& sum = sums[r][i % kSums];
        sum = kIsL2 ? add_square(sum, number) : sum + fabs(number);
      }
    }
  }

  scalar norms[kRowsInFlight];
#pragma unroll
  for (int r = 0; r < kRowsInFlight; ++r) {
    norms[r] = sums[r][0] + sums[r][1];
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      norms[r] += __shfl_xor_sync(kAllLanes, norms[r], distance);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int mine = lane + i * lanes;
    scalar norm = norms[0];
#pragma unroll
    for (int r = 1; r < kRowsInFlight; ++r) {
      norm = r == mine ? norms[r] : norm;
    }
    const int64_t row = start_row + mine * rows_at_once;
    if (mine < kRowsInFlight && row < problem.total) {
      importance[row] = row < end_rows ? (kIsL2 ? sqrt(norm) : norm) * factors[i] : scalar{0};
    }
  }
}

// The importance of a run of consecutive rows, by one block. 32 / lanes_per_row rows share a warp. Aligned rows have
// kernels of their own, since narrower accesses take twice the registers.
template <typename T, bool kIsL2, bool kIsAligned>
__device__ inline void importance_of_rows(const ImportanceProblem& problem, int64_t block) {
  if constexpr (kIsAligned) {
    importance_of_rows_by<T, kIsL2, uint4>(problem, block);
  } else if (problem.access_bytes == 8) {
    importance_of_rows_by<T, kIsL2, uint2>(problem, block);
  } else if constexpr (sizeof(T) <= 4) {
    if (sizeof(T) == 4 || problem.access_bytes == 4) {
      importance_of_rows_by<T, kIsL2, uint32_t>(problem, block);
    } else if constexpr (sizeof(T) == 2) {
      importance_of_rows_by<T, kIsL2, uint16_t>(problem, block);
    }
  }
}

// As many blocks as leave each thread the registers that it needs.
constexpr int importance_blocks_per_multiprocessor(bool is_aligned) {
  return is_aligned ? 3 : 2;
}

// importance [total] from hidden [total, width] and centrality [total]. It is 0 on tail rows, which are not read.
//   grid  num_importance_blocks
template <typename T, bool kIsL2, bool kIsAligned>
__global__ void __launch_bounds__(kImportanceThreads, importance_blocks_per_multiprocessor(kIsAligned))
    token_importance_kernel(const ImportanceProblem problem) {
  importance_of_rows<T, kIsL2, kIsAligned>(problem, blockIdx.x);
}

// Calls run(is_l2, is_aligned) with std::true_type or std::false_type for each.
template <typename Run>
void with_importance_kernel(const ImportanceProblem& problem, bool is_l2, const Run& run) {
  const bool is_aligned = problem.access_bytes == kChunkBytes;
  if (is_l2) {
    is_aligned ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  } else {
    is_aligned ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
  }
}

template <typename T, typename Launch>
void launch_token_importance(const ImportanceProblem& problem, bool is_l2, const Launch& launch) {
  if (problem.total == 0) {
    return;
  }
  with_importance_kernel(problem, is_l2, [&](auto is_l2, auto is_aligned) {
    launch(
        &token_importance_kernel<T, decltype(is_l2)::value, decltype(is_aligned)::value>,
        num_importance_blocks(problem), kImportanceThreads, problem);
  });
}

}  // namespace stamp::cuda
