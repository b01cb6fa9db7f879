// Loads and stores of rows of q, k, v, out and their gradients, from and to the padded matrices in the compute type
// that the products need. Internal linkage, for the reason given in cpu/core/simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/core/arithmetic.h"
#include "cpu/core/dtypes.h"
#include "cpu/core/matrix_product.h"
#include "cpu/core/simd.h"

namespace stamp::cpu {
namespace {

// The row stride of a matrix of one head: whole vectors, and one vector more so that a column does not fall into one
// set of the cache.
template <typename V>
int64_t matrix_row(int64_t columns) {
  return round_up(columns, V::width) + V::width;
}

template <typename V, typename T>
void load_rows_of(
    typename V::scalar* to, const HeadRows& from, int64_t start_row, int64_t num_rows, int64_t head, int64_t head_dim,
    typename V::scalar factor) {
  const T* row = static_cast<const T*>(from.data) + start_row * from.row_stride + head * from.head_stride;
  for (int64_t i = 0; i < num_rows; ++i, row += from.row_stride, to += matrix_row<V>(head_dim)) {
    int64_t d = 0;
    if constexpr (sizeof(T) == sizeof(typename V::scalar)) {
      for (; d + V::width <= head_dim; d += V::width) {
        V::store(to + d, factor * V::load(row + d));
      }
      for (; d < head_dim; ++d) {
        to[d] = factor * row[d];
      }
    } else {
      for (; d < head_dim; ++d) {
        to[d] = factor * to_float(row[d]);
      }
    }
    for (; d < round_up(head_dim, V::width); ++d) {
      to[d] = 0;
    }
  }
}

// to [num_rows, matrix_row(head_dim)] := factor * rows of one head, with zeros up to a whole vector.
template <typename V>
void load_rows(
    typename V::scalar* to, const HeadRows& from, DType dtype, int64_t start_row, int64_t num_rows, int64_t head,
    int64_t head_dim, double factor = 1.0) {
  const auto f = static_cast<typename V::scalar>(factor);
  if constexpr (sizeof(typename V::scalar) == sizeof(double)) {
    load_rows_of<V, double>(to, from, start_row, num_rows, head, head_dim, f);
  } else if (dtype == DType::kFloat32) {
    load_rows_of<V, float>(to, from, start_row, num_rows, head, head_dim, f);
  } else if (dtype == DType::kFloat16) {
    load_rows_of<V, Half>(to, from, start_row, num_rows, head, head_dim, f);
  } else {
    load_rows_of<V, BFloat16>(to, from, start_row, num_rows, head, head_dim, f);
  }
}

// Prefetches rows that will be loaded soon: the rows of one head are strided, so the hardware prefetcher misses them.
inline void prefetch_rows(
    const HeadRows& rows, DType dtype, int64_t start_row, int64_t num_rows, int64_t head, int64_t head_dim) {
  const int64_t size = size_of(dtype);
  const int64_t offset = start_row * rows.row_stride + head * rows.head_stride;
  const char* row = static_cast<const char*>(rows.data) + offset * size;
  for (int64_t i = 0; i < num_rows; ++i, row += rows.row_stride * size) {
    for (int64_t byte = 0; byte < head_dim * size; byte += 64) {
      __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

template <typename T, typename scalar>
void store_row_of(T* to, const scalar* from, int64_t head_dim, scalar factor) {
  for (int64_t d = 0; d < head_dim; ++d) {
    if constexpr (sizeof(T) == sizeof(double)) {
      to[d] = factor * from[d];
    } else {
      from_float(factor * from[d], to[d]);
    }
  }
}

// One row of one head := factor * from, rounded to the dtype; zeros where `from` is null.
template <typename scalar>
void store_row(
    const HeadRows& to, DType dtype, int64_t row, int64_t head, int64_t head_dim, const scalar* from, scalar factor) {
  const int64_t offset = row * to.row_stride + head * to.head_stride;
  if (from == nullptr) {
    const int64_t size = size_of(dtype);
    __builtin_memset(static_cast<char*>(to.data) + offset * size, 0, head_dim * size);
  } else if constexpr (sizeof(scalar) == sizeof(double)) {
    store_row_of(static_cast<double*>(to.data) + offset, from, head_dim, factor);
  } else if (dtype == DType::kFloat32) {
    store_row_of(static_cast<float*>(to.data) + offset, from, head_dim, factor);
  } else if (dtype == DType::kFloat16) {
    store_row_of(static_cast<Half*>(to.data) + offset, from, head_dim, factor);
  } else {
    store_row_of(static_cast<BFloat16*>(to.data) + offset, from, head_dim, factor);
  }
}

// to := the transpose [head_dim, num_rows] of a loaded matrix, in panels as the right factor of a product. Columns past
// num_rows are zeros.
template <typename V>
void pack_transposed(typename V::scalar* to, const typename V::scalar* from, int64_t num_rows, int64_t head_dim) {
  const int64_t from_row = matrix_row<V>(head_dim);
  for (int64_t row = 0; row < num_rows; row += V::width) {
    typename V::scalar* columns = to + row / kPanelWidth<V> * kPanelWidth<V> * head_dim + row % kPanelWidth<V>;
    for (int64_t d = 0; d < head_dim; d += V::width) {
      typename V::vector block[V::width];
#pragma GCC unroll 16
      for (int i = 0; i < V::width; ++i) {
        block[i] = row + i < num_rows ? V::load(from + (row + i) * from_row + d) : typename V::vector{};
      }
      transpose<V>(block);
      const int64_t depth = smaller<int64_t>(V::width, head_dim - d);
      if (depth == V::width) {
#pragma GCC unroll 16
        for (int i = 0; i < V::width; ++i) {
          V::store(columns + (d + i) * kPanelWidth<V>, block[i]);
        }
      } else {
        for (int64_t i = 0; i < depth; ++i) {
          V::store(columns + (d + i) * kPanelWidth<V>, block[i]);
        }
      }
    }
  }
}

// What pack_transposed has written, as a right factor [head_dim, num_rows].
template <typename V>
RightMatrix<typename V::scalar> transposed(const typename V::scalar* packed, int64_t head_dim) {
  return {packed, kPanelWidth<V>, kPanelWidth<V> * head_dim};
}

// A loaded matrix, as a right factor [num_rows, head_dim].
template <typename V>
RightMatrix<typename V::scalar> row_major(const typename V::scalar* data, int64_t head_dim) {
  return {data, matrix_row<V>(head_dim), kPanelWidth<V>};
}

}  // namespace
}  // namespace stamp::cpu
