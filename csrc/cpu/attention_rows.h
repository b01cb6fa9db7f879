// Rows of q, k, v, out and gradients in memory, as the padded matrices in the compute type that the products want.
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "matrix_product.h"
#include "simd.h"

namespace stamp::cpu {
namespace {

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

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

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and fraction moved into place, the exponent rebased by a product, which makes subnormals normal too.
  const float finite = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity or NaN
  return bits_as<float>(sign | (magnitude >= 0x7c00u ? special : bits_as<uint32_t>(finite)));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

inline void from_float(float x, Half& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 2^(e + 13) to a number with exponent e leaves the ten bits of its fraction, rounded by the hardware; the
  // exponent is at least that of the smallest normal number, so subnormals get fewer bits.
  const uint32_t exponent = larger<uint32_t>(magnitude & 0x7f800000u, 113u << 23);
  const float anchor = bits_as<float>(exponent + (13u << 23));
  const uint32_t fraction = bits_as<uint32_t>(bits_as<float>(magnitude) + anchor) - bits_as<uint32_t>(anchor);
  const uint32_t finite = (((exponent >> 23) - 113u) << 10) + fraction;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : smaller<uint32_t>(finite, 0x7c00u)));
}

inline float to_float(float x) {
  return x;
}

inline void from_float(float x, float& to) {
  to = x;
}

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
