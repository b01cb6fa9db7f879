// Token importance: the norm of a token's hidden state times its centrality.
//
//     importance_i = ||h_i|| * centrality_i
//     importance_i = ||h_i|| * centrality_i / (n - i)     per visible query: n - i queries see token i of n
//
// The order of the additions depends only on the width of a row and the instruction set, so token_importance and prune
// give the same bits. Internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/core/simd.h"
#include "cpu/pruning/kernels.h"

namespace stamp::cpu {
namespace {

template <typename V, typename T>
typename V::vector load_vector(const T* from) {
  if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
    return V::load(from);
  } else {
    typename V::scalar values[V::width];
    for (int i = 0; i < V::width; ++i) {
      values[i] = to_float(from[i]);
    }
    return V::load(values);
  }
}

template <bool kIsL2, typename X>
X magnitude(X x) {
  return kIsL2 ? x * x : (x < 0 ? -x : x);
}

template <typename V, typename T, bool kIsL2>
typename V::scalar norm_of_row(const T* row, int64_t width) {
  constexpr int kSums = 4;  // independent sums, so that an addition does not wait for the one before
  typename V::vector sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * V::width <= width; d += kSums * V::width) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      sums[i] += magnitude<kIsL2>(load_vector<V>(row + d + i * V::width));
    }
  }
  for (; d + V::width <= width; d += V::width) {
    sums[0] += magnitude<kIsL2>(load_vector<V>(row + d));
  }
  typename V::scalar sum = V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < width; ++d) {
    if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
      sum += magnitude<kIsL2>(row[d]);
    } else {
      sum += magnitude<kIsL2>(to_float(row[d]));
    }
  }
  return kIsL2 ? static_cast<typename V::scalar>(__builtin_sqrt(sum)) : sum;
}

template <typename V, typename T, bool kIsL2>
void importance_of_rows_with(
    const ImportanceProblem& problem, int64_t first_row, int64_t end_row, int64_t end_sequence,
    typename V::scalar* importance) {
  using scalar = typename V::scalar;
  const T* row = static_cast<const T*>(problem.hidden) + first_row * problem.row_stride;
  for (int64_t i = first_row; i < end_row; ++i, row += problem.row_stride) {
    const scalar centrality = problem.centrality_is_double
        ? static_cast<scalar>(static_cast<const double*>(problem.centrality)[i])
        : static_cast<scalar>(static_cast<const float*>(problem.centrality)[i]);
    const scalar weighted_norm = norm_of_row<V, T, kIsL2>(row, problem.width) * centrality;
    *importance++ = problem.per_visible_query ? weighted_norm / static_cast<scalar>(end_sequence - i) : weighted_norm;
  }
}

template <typename V, typename T>
void importance_of_rows_as(
    const ImportanceProblem& problem, int64_t first_row, int64_t end_row, int64_t end_sequence,
    typename V::scalar* importance) {
  if (problem.norm_order == 2) {
    importance_of_rows_with<V, T, true>(problem, first_row, end_row, end_sequence, importance);
  } else {
    importance_of_rows_with<V, T, false>(problem, first_row, end_row, end_sequence, importance);
  }
}

template <typename V>
void importance_of_rows(
    const ImportanceProblem& problem, int64_t first_row, int64_t end_row, int64_t end_sequence,
    typename V::scalar* importance) {
  if constexpr (sizeof(typename V::scalar) == sizeof(double)) {
    importance_of_rows_as<V, double>(problem, first_row, end_row, end_sequence, importance);
  } else if (problem.dtype == DType::kFloat16) {
    importance_of_rows_as<V, Half>(problem, first_row, end_row, end_sequence, importance);
  } else if (problem.dtype == DType::kBFloat16) {
    importance_of_rows_as<V, BFloat16>(problem, first_row, end_row, end_sequence, importance);
  } else {
    importance_of_rows_as<V, float>(problem, first_row, end_row, end_sequence, importance);
  }
}

}  // namespace
}  // namespace stamp::cpu
