// Token importance: the norm of a token's hidden state times the attention it receives.
//
//   importance_i = ||h_i|| * centrality_i     divided, if asked for, by the n - i queries that see token i of n
//
// One pass over the hidden states, bound by memory. A row is a run of 16-byte chunks; chunk c belongs to lane
// c mod L of the L lanes of its row. How a row is summed up thus depends on its width and type alone, neither on its
// neighbours nor on its alignment, and token_importance and prune give the same bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/core/numbers.cuh"
#include "cuda/core/warp.cuh"

namespace stamp::cuda {

constexpr int kScoringThreads = 256;
// Loads of 16 bytes that a thread has in flight, each of another row.
constexpr int kRowsInFlight = 4;
constexpr int64_t kChunkBytes = 16;

// What to score, and how.
struct Scoring {
  const char* hidden;         // [total, width]
  int64_t row_stride;         // bytes from one row to the next
  int64_t row_bytes;
  int32_t access_bytes;       // the widest access (16 bytes down to one number) that rows are aligned to
  int32_t lanes_per_row;      // a power of two up to a warp
  const void* centrality;     // [total] float, or double where centrality_is_double
  const int32_t* cu_seqlens;  // [batch + 1]; null: no tail rows
  int64_t batch;
  int64_t total;
  bool centrality_is_double;
  bool per_visible_query;     // needs cu_seqlens
  void* importance;           // [total] in the compute type
};

// The chunks that a lane of a row adds up become about one a lane for narrow rows, so that no lane idles.
inline int32_t lanes_for_row(int64_t row_bytes) {
  int32_t lanes = 1;
  while (lanes < kWarpSize && lanes * kChunkBytes < row_bytes) {
    lanes *= 2;
  }
  return lanes;
}

inline int32_t widest_access(const Scoring& scoring, int32_t element_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(scoring.hidden) | static_cast<uint64_t>(scoring.row_stride) |
      static_cast<uint64_t>(scoring.row_bytes);
  int32_t bytes = kChunkBytes;
  while (bytes > element_bytes && bits % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

__host__ __device__ inline int64_t rows_per_scoring_block(const Scoring& scoring) {
  return kRowsInFlight * (kScoringThreads / scoring.lanes_per_row);
}

inline int64_t scoring_blocks(const Scoring& scoring) {
  const int64_t rows = rows_per_scoring_block(scoring);
  return (scoring.total + rows - 1) / rows;
}

// 16 bytes of a row in registers, zeros beyond its end.
struct Chunk {
  uint32_t words[kChunkBytes / 4];
};

// Reads the first `bytes_left` bytes of a chunk, all that the row has.
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

template <typename T>
__device__ inline Compute<T> number_of_chunk(const Chunk& chunk, int index) {
  if constexpr (sizeof(T) == 2) {
    return to_compute(T{static_cast<uint16_t>(chunk.words[index / 2] >> (16 * (index % 2)))});
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<float>(chunk.words[index]);
  } else {
    const uint64_t high = chunk.words[2 * index + 1];
    return bits_as<double>(high << 32 | chunk.words[2 * index]);
  }
}

// The multiplication and addition of a square are one instruction wherever they are compiled: the bits must not
// depend on what a compiler contracts.
__device__ inline float add_square(float sum, float x) {
  return fmaf(x, x, sum);
}

__device__ inline double add_square(double sum, double x) {
  return fma(x, x, sum);
}

// Where the sequence of a row ends that is not a tail row.
__device__ inline int64_t end_of_sequence(const int32_t* cu_seqlens, int64_t batch, int64_t row) {
  int64_t low = 1, high = batch;  // the first offset above row is among these
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

template <typename T, bool kSquares, typename Access>
__device__ inline void score_rows_by(const Scoring& scoring, int64_t block) {
  using Score = Compute<T>;
  constexpr int kNumbers = kChunkBytes / sizeof(T);
  constexpr int kSums = 2;  // independent of each other, as rows are, so that few additions wait for one before
  auto* importance = static_cast<Score*>(scoring.importance);
  const int lanes = scoring.lanes_per_row;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int rows_at_once = kScoringThreads / lanes;
  const int64_t first_row_of_block = block * rows_per_scoring_block(scoring);
  const int64_t first_row = first_row_of_block + threadIdx.x / lanes;
  const int64_t end_rows = scoring.cu_seqlens == nullptr ? scoring.total : __ldg(scoring.cu_seqlens + scoring.batch);
  if (first_row_of_block >= end_rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows_per_scoring_block(scoring); i += kScoringThreads) {
      if (first_row_of_block + i < scoring.total) {
        importance[first_row_of_block + i] = 0;
      }
    }
    return;
  }

  // What becomes of the norms is shared out among the lanes of the rows: lane l finishes rows l, l + lanes, ...
  Score factors[kRowsInFlight];
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int64_t row = first_row + (lane + i * lanes) * rows_at_once;
    factors[i] = 0;
    if (lane + i * lanes < kRowsInFlight && row < end_rows) {
      factors[i] = scoring.centrality_is_double
          ? static_cast<Score>(__ldg(static_cast<const double*>(scoring.centrality) + row))
          : static_cast<Score>(__ldg(static_cast<const float*>(scoring.centrality) + row));
      if (scoring.per_visible_query) {
        factors[i] /= static_cast<Score>(end_of_sequence(scoring.cu_seqlens, scoring.batch, row) - row);
      }
    }
  }

  const char* rows[kRowsInFlight];
#pragma unroll
  for (int r = 0; r < kRowsInFlight; ++r) {
    // Beyond the end the last row is read once more, which costs less than to ask at every load.
    rows[r] = scoring.hidden + min(first_row + r * rows_at_once, end_rows - 1) * scoring.row_stride;
  }

  Score sums[kRowsInFlight][kSums] = {};
#pragma unroll 1  // the rows in flight are enough, and registers for more threads worth more
  for (int64_t offset = lane * kChunkBytes; offset < scoring.row_bytes; offset += lanes * kChunkBytes) {
    const int bytes_left = static_cast<int>(min(scoring.row_bytes - offset, kChunkBytes));
    Chunk chunks[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      chunks[r] = load_chunk<Access>(rows[r] + offset, bytes_left);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        const Score number = number_of_chunk<T>(chunks[r], i);
        Score& sum = sums[r][i % kSums];
        sum = kSquares ? add_square(sum, number) : sum + fabs(number);
      }
    }
  }

  Score norms[kRowsInFlight];
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
    Score norm = norms[0];
#pragma unroll
    for (int r = 1; r < kRowsInFlight; ++r) {
      norm = r == mine ? norms[r] : norm;
    }
    const int64_t row = first_row + mine * rows_at_once;
    if (mine < kRowsInFlight && row < scoring.total) {
      importance[row] = row < end_rows ? (kSquares ? sqrt(norm) : norm) * factors[i] : Score{0};
    }
  }
}

// One block scores a run of consecutive rows, the lanes of a warp shared out among `32 / lanes_per_row` rows. Aligned
// rows have kernels of their own: narrower accesses take twice the registers.
template <typename T, bool kSquares, bool kIsAligned>
__device__ inline void score_rows(const Scoring& scoring, int64_t block) {
  if constexpr (kIsAligned) {
    score_rows_by<T, kSquares, uint4>(scoring, block);
  } else if (scoring.access_bytes == 8) {
    score_rows_by<T, kSquares, uint2>(scoring, block);
  } else if constexpr (sizeof(T) <= 4) {
    if (sizeof(T) == 4 || scoring.access_bytes == 4) {
      score_rows_by<T, kSquares, uint32_t>(scoring, block);
    } else if constexpr (sizeof(T) == 2) {
      score_rows_by<T, kSquares, uint16_t>(scoring, block);
    }
  }
}

// Of a multiprocessor: what leaves each kind of kernel the registers that it needs.
constexpr int scoring_blocks_at_once(bool is_aligned) {
  return is_aligned ? 3 : 2;
}

// importance [total] from hidden [total, width] and centrality [total]; 0 on tail rows, of which nothing is read.
//   grid  scoring_blocks
template <typename T, bool kSquares, bool kIsAligned>
__global__ void __launch_bounds__(kScoringThreads, scoring_blocks_at_once(kIsAligned))
    token_importance_kernel(const Scoring scoring) {
  score_rows<T, kSquares, kIsAligned>(scoring, blockIdx.x);
}

// Calls run(squares, is_aligned) with std::true_type or std::false_type for each.
template <typename Run>
void with_kind_of_scoring(const Scoring& scoring, bool squares, const Run& run) {
  const bool is_aligned = scoring.access_bytes == kChunkBytes;
  if (squares) {
    is_aligned ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  } else {
    is_aligned ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
  }
}

template <typename T, typename Launch>
void launch_token_importance(const Scoring& scoring, bool squares, const Launch& launch) {
  if (scoring.total == 0) {
    return;
  }
  with_kind_of_scoring(scoring, squares, [&](auto squares, auto is_aligned) {
    launch(
        &token_importance_kernel<T, decltype(squares)::value, decltype(is_aligned)::value>, scoring_blocks(scoring),
        kScoringThreads, scoring);
  });
}

}  // namespace stamp::cuda
