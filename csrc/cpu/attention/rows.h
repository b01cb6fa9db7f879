// Rows of q, k, v, out and gradients in memory, as the padded matrices in the compute type that the products want.
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cpu/attention/kernels.h"
#include "cpu/core/matrix_product.h"
#include "cpu/core/numbers.h"
#include "cpu/core/simd.h"

namespace stamp::cpu {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// One thread's memory, taken piece by piece. Without a base it only counts.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment);
    return piece;
  }

  int64_t size() const {
    return size_;
  }

 private:
  char* base_;
  int64_t size_ = 0;
};

// Head matrices are stored with rows of this many numbers: whole vectors, and one more so that columns do not all fall
// into the same sets of the cache.
template <typename V>
int64_t matrix_row(int64_t columns) {
  return round_up(columns, V::width) + V::width;
}

template <typename V, typename T>
void load_rows_of(
    typename V::scalar* to, const HeadRows& from, int64_t first_row, int64_t num_rows, int64_t head, int64_t head_dim,
    typename V::scalar factor) {
  const T* row = static_cast<const T*>(from.data) + first_row * from.row_stride + head * from.head_stride;
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

// [num_rows, matrix_row(head_dim)]: factor * rows of one head, zeros up to a whole vector.
template <typename V>
void load_rows(
    typename V::scalar* to, const HeadRows& from, DType dtype, int64_t first_row, int64_t num_rows, int64_t head,
    int64_t head_dim, double factor = 1.0) {
  const auto f = static_cast<typename V::scalar>(factor);
  if constexpr (sizeof(typename V::scalar) == sizeof(double)) {
    load_rows_of<V, double>(to, from, first_row, num_rows, head, head_dim, f);
  } else if (dtype == DType::kFloat32) {
    load_rows_of<V, float>(to, from, first_row, num_rows, head, head_dim, f);
  } else if (dtype == DType::kFloat16) {
    load_rows_of<V, Half>(to, from, first_row, num_rows, head, head_dim, f);
  } else {
    load_rows_of<V, BFloat16>(to, from, first_row, num_rows, head, head_dim, f);
  }
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Asks for rows that will be loaded soon: those of another head lie apart, where no hardware sees them coming.
inline void prefetch_rows(
    const HeadRows& rows, DType dtype, int64_t first_row, int64_t num_rows, int64_t head, int64_t head_dim) {
  const int64_t size = size_of(dtype);
  const int64_t offset = first_row * rows.row_stride + head * rows.head_stride;
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

// factor * one row of one head, rounded to the dtype; zeros where `from` is null.
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

template <typename V>
constexpr int64_t transposed_size(int64_t num_rows, int64_t head_dim) {
  return round_up(num_rows, kPanelWidth<V>) * head_dim;
}

// The transpose [head_dim, num_rows] of a loaded matrix, in panels for the right of a product; zeros beyond num_rows.
template <typename V>
void pack_transposed(typename V::scalar* to, const typename V::scalar* from, int64_t num_rows, int64_t head_dim) {
  const int64_t from_row = matrix_row<V>(head_dim);
  for (int64_t row = 0; row < num_rows; row += V::width) {
    typename V::scalar* columns =
        to + row / kPanelWidth<V> * kPanelWidth<V> * head_dim + row % kPanelWidth<V>;
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

template <typename V>
RightMatrix<typename V::scalar> transposed(const typename V::scalar* packed, int64_t head_dim) {
  return {packed, kPanelWidth<V>, kPanelWidth<V> * head_dim};
}

template <typename V>
RightMatrix<typename V::scalar> row_major(const typename V::scalar* data, int64_t head_dim) {
  return {data, matrix_row<V>(head_dim), kPanelWidth<V>};
}

}  // namespace
}  // namespace stamp::cpu
