// The score of a token: the norm of its hidden state times the attention it receives.
//
//   importance_i = ||h_i|| * centrality_i     divided, if asked for, by the n - i queries that see token i of n
//
// What a row's sum adds up in which order depends on its width and the instruction set alone: token_importance and prune
// give the same bits.

#pragma once

#include <cstdint>

#include "cpu/pruning/kernels.h"
#include "cpu/core/simd.h"

namespace stamp::cpu {
namespace {

template <typename V, typename T>
typename V::vector load_numbers(const T* from) {
  if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
    return V::load(from);
  } else {
    typename V::scalar numbers[V::width];
    for (int i = 0; i < V::width; ++i) {
      numbers[i] = to_float(from[i]);
    }
    return V::load(numbers);
  }
}

template <bool kSquares, typename X>
X magnitude(X x) {
  return kSquares ? x * x : (x < 0 ? -x : x);
}

template <typename V, typename T, bool kSquares>
typename V::scalar norm_of_row(const T* row, int64_t width) {
  constexpr int kSums = 4;  // independent of one another, or every addition would wait for the one before
  typename V::vector sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * V::width <= width; d += kSums * V::width) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      sums[i] += magnitude<kSquares>(load_numbers<V>(row + d + i * V::width));
    }
  }
  for (; d + V::width <= width; d += V::width) {
    sums[0] += magnitude<kSquares>(load_numbers<V>(row + d));
  }
  typename V::scalar sum = V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < width; ++d) {
    if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
      sum += magnitude<kSquares>(row[d]);
    } else {
      sum += magnitude<kSquares>(to_float(row[d]));
    }
  }
  return kSquares ? static_cast<typename V::scalar>(__builtin_sqrt(sum)) : sum;
}

template <typename V, typename T, bool kSquares>
void score_rows_of(
    const Scoring& scoring, int64_t first_row, int64_t end_row, int64_t end_sequence, typename V::scalar* scores) {
  using scalar = typename V::scalar;
  const T* row = static_cast<const T*>(scoring.hidden) + first_row * scoring.row_stride;
  for (int64_t i = first_row; i < end_row; ++i, row += scoring.row_stride) {
    const scalar votes = scoring.centrality_is_double
        ? static_cast<scalar>(static_cast<const double*>(scoring.centrality)[i])
        : static_cast<scalar>(static_cast<const float*>(scoring.centrality)[i]);
    const scalar score = norm_of_row<V, T, kSquares>(row, scoring.width) * votes;
    *scores++ = scoring.per_visible_query ? score / static_cast<scalar>(end_sequence - i) : score;
  }
}

template <typename V, typename T>
void score_rows_as(
    const Scoring& scoring, int64_t first_row, int64_t end_row, int64_t end_sequence, typename V::scalar* scores) {
  if (scoring.squares) {
    score_rows_of<V, T, true>(scoring, first_row, end_row, end_sequence, scores);
  } else {
    score_rows_of<V, T, false>(scoring, first_row, end_row, end_sequence, scores);
  }
}

template <typename V>
void score_rows(
    const Scoring& scoring, int64_t first_row, int64_t end_row, int64_t end_sequence, typename V::scalar* scores) {
  if constexpr (sizeof(typename V::scalar) == sizeof(double)) {
    score_rows_as<V, double>(scoring, first_row, end_row, end_sequence, scores);
  } else if (scoring.dtype == DType::kFloat16) {
    score_rows_as<V, Half>(scoring, first_row, end_row, end_sequence, scores);
  } else if (scoring.dtype == DType::kBFloat16) {
    score_rows_as<V, BFloat16>(scoring, first_row, end_row, end_sequence, scores);
  } else {
    score_rows_as<V, float>(scoring, first_row, end_row, end_sequence, scores);
  }
}

}  // namespace
}  // namespace stamp::cpu
