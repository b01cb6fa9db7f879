// C = A B or C += A B, with tiles of C in registers. Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cpu/core/simd.h"

namespace stamp::cpu {
namespace {

// The left factor A: element (m, k) is data[m * row + k * column]. Elements are broadcast one by one, so a transposed
// matrix costs nothing.
template <typename scalar>
struct LeftMatrix {
  const scalar* data;
  int64_t row;
  int64_t column;
};

// The right factor B, row-major in panels of w = kPanelWidth columns: element (k, n) is
// data[n / w * panel + k * row + n % w]. A plain row-major matrix has panel == w.
template <typename scalar>
struct RightMatrix {
  const scalar* data;
  int64_t row;
  int64_t panel;
};

template <typename scalar>
struct ResultMatrix {
  scalar* data;
  int64_t row;
};

// A register tile has two vectors in each row, and as many rows as leave registers for the operands.
template <int kLanes, typename scalar>
constexpr int kTileRows = kLanes * sizeof(scalar) == 64 ? 8
    : kLanes * sizeof(scalar) == 32                     ? 6
                                                        : 4;
constexpr int kTileVectors = 2;
template <typename V>
constexpr int kPanelWidth = kTileVectors * V::width;

// One register tile of C [rows, vectors * width]. Each element is one chain of multiply-adds in the order of k, so its
// bits do not depend on the tile that it falls into.
template <typename V, int rows, int vectors>
void product_tile(
    int64_t depth, LeftMatrix<typename V::scalar> a, const typename V::scalar* b, int64_t b_row,
    ResultMatrix<typename V::scalar> c, bool accumulate) {
  using vector = typename V::vector;
  vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) {
      sum[m][n] = accumulate ? V::load(c.data + m * c.row + n * V::width) : vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vector b_k[vectors];
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) {
      b_k[n] = V::load(b + k * b_row + n * V::width);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const vector a_mk = V::broadcast(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 2
      for (int n = 0; n < vectors; ++n) {
        sum[m][n] += a_mk * b_k[n];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) {
      V::store(c.data + m * c.row + n * V::width, sum[m][n]);
    }
  }
}

// A tile of `rows` rows or, by recursion, of the rows that are left.
template <typename V, int vectors, int rows>
void product_tile_of(
    int rows_left, int64_t depth, LeftMatrix<typename V::scalar> a, const typename V::scalar* b, int64_t b_row,
    ResultMatrix<typename V::scalar> c, bool accumulate) {
  if constexpr (rows > 0) {
    if (rows_left >= rows) {
      product_tile<V, rows, vectors>(depth, a, b, b_row, c, accumulate);
    } else {
      product_tile_of<V, vectors, rows - 1>(rows_left, depth, a, b, b_row, c, accumulate);
    }
  }
}

template <typename V, int vectors>
void product_panel(
    int64_t num_rows, int64_t depth, LeftMatrix<typename V::scalar> a, const typename V::scalar* b, int64_t b_row,
    ResultMatrix<typename V::scalar> c, bool accumulate) {
  constexpr int rows = kTileRows<V::width, typename V::scalar>;
  for (int64_t m = 0; m < num_rows; m += rows) {
    const int rows_left = static_cast<int>(num_rows - m);
    product_tile_of<V, vectors, rows>(
        rows_left, depth, {a.data + m * a.row, a.row, a.column}, b, b_row, {c.data + m * c.row, c.row}, accumulate);
  }
}

// C [num_rows, num_columns] = A [num_rows, depth] B [depth, num_columns], or C += A B. Columns are computed in whole
// vectors, so the rows of B and C must have memory up to a multiple of the width.
template <typename V>
void product(
    int64_t num_rows, int64_t num_columns, int64_t depth, LeftMatrix<typename V::scalar> a,
    RightMatrix<typename V::scalar> b, ResultMatrix<typename V::scalar> c, bool accumulate) {
  for (int64_t n = 0; n < num_columns; n += kPanelWidth<V>) {
    const typename V::scalar* panel = b.data + n / kPanelWidth<V> * b.panel;
    const ResultMatrix<typename V::scalar> c_n = {c.data + n, c.row};
    if (num_columns - n > V::width) {
      product_panel<V, 2>(num_rows, depth, a, panel, b.row, c_n, accumulate);
    } else {
      product_panel<V, 1>(num_rows, depth, a, panel, b.row, c_n, accumulate);
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
