// Cross-entropy by chunks of classes. With logits l = x W^T + b and, if asked for, l := cap * tanh(l / cap):
//
//   lse_i    = log sum_c exp(l_ic)                       from the maxima and sums of the chunks
//   dl_ic    = scale_i * exp(l_ic - lse_i) - offset_i - sum of label_weights at the labels, times 1 - (l / cap)^2
//   dx_i     = sum_c dl_ic W_c      dW_c = sum_i dl_ic x_i      db_c = sum_i dl_ic
//
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cross_entropy_kernels.h"
#include "matrix_product.h"
#include "simd.h"

namespace stamp::cpu {
namespace {

// Classes of a product, so that their part of the weight stays in the first cache while the rows pass.
constexpr int64_t kClassesAtOnce = 64;

template <typename scalar>
scalar* numbers(const void* data) {
  return static_cast<scalar*>(const_cast<void*>(data));
}

// to [num_rows, to_row] := rows of a matrix, in the compute type, zeros past the width. `rows` names them; null: they
// are 0, 1, ... Rows past `num_given` are 0.
template <typename T, typename scalar>
void widen_rows_of(
    scalar* to, int64_t to_row, const T* from, int64_t from_row, const int64_t* rows, int64_t num_given,
    int64_t num_rows, int64_t width) {
  for (int64_t i = 0; i < num_rows; ++i, to += to_row) {
    int64_t d = 0;
    if (i < num_given) {
      const T* row = from + (rows == nullptr ? i : rows[i]) * from_row;
      for (; d < width; ++d) {
        if constexpr (sizeof(T) == sizeof(scalar)) {
          to[d] = row[d];
        } else {
          to[d] = to_float(row[d]);
        }
      }
    }
    for (; d < to_row; ++d) {
      to[d] = 0;
    }
  }
}

template <typename scalar>
void widen_rows(
    scalar* to, int64_t to_row, const MatrixRows& from, const int64_t* rows, int64_t num_given, int64_t num_rows,
    int64_t width) {
  if constexpr (sizeof(scalar) == sizeof(double)) {
    widen_rows_of(to, to_row, static_cast<const double*>(from.data), from.row_stride, rows, num_given, num_rows, width);
  } else if (from.dtype == DType::kFloat16) {
    widen_rows_of(to, to_row, static_cast<const Half*>(from.data), from.row_stride, rows, num_given, num_rows, width);
  } else if (from.dtype == DType::kBFloat16) {
    widen_rows_of(
        to, to_row, static_cast<const BFloat16*>(from.data), from.row_stride, rows, num_given, num_rows, width);
  } else {
    widen_rows_of(to, to_row, static_cast<const float*>(from.data), from.row_stride, rows, num_given, num_rows, width);
  }
}

template <typename V>
void load_x(
    const CrossEntropyBlock& block, const MatrixRows& hidden, const int64_t* rows, int64_t num_given, int64_t begin,
    int64_t end) {
  using scalar = typename V::scalar;
  scalar* x = numbers<scalar>(block.x);
  const int64_t given = num_given < end ? num_given - begin : end - begin;
  widen_rows(x + begin * block.row, block.row, hidden, rows + begin, given, end - begin, block.width);
  scalar* transposed = numbers<scalar>(block.x_transposed);
  for (int64_t i = begin; i < end; i += V::width) {
    for (int64_t d = 0; d < block.width; d += V::width) {
      typename V::vector tile[V::width];
      for (int r = 0; r < V::width; ++r) {
        tile[r] = V::load(x + (i + r) * block.row + d);
      }
      transpose<V>(tile);
      for (int r = 0; r < V::width && d + r < block.width; ++r) {
        V::store(transposed + (d + r) * block.num_rows + i, tile[r]);
      }
    }
  }
}

// A chunk of classes: its first one, and how many there are.
struct Chunk {
  int64_t first;
  int64_t size;
};

inline Chunk chunk_of(const CrossEntropyBlock& block, int64_t chunk) {
  const int64_t first = chunk * block.chunk_classes, left = block.num_classes - first;
  return {first, left < block.chunk_classes ? left : block.chunk_classes};
}

template <typename scalar>
int64_t weight_scratch(const CrossEntropyBlock& block) {
  return block.chunk_classes * block.row * static_cast<int64_t>(sizeof(scalar));
}

template <typename V>
int64_t cross_entropy_scratch_bytes(const CrossEntropyBlock& block) {
  return weight_scratch<typename V::scalar>(block);
}

// The weight of some classes in the compute type, in rows of whole vectors: as it lies there, or in scratch memory.
template <typename V>
MatrixRows weight_rows(const CrossEntropyBlock& block, Chunk chunk, char* scratch) {
  using scalar = typename V::scalar;
  const bool is_float = block.weight.dtype == DType::kFloat32 || block.weight.dtype == DType::kFloat64;
  const int64_t size = is_float ? static_cast<int64_t>(sizeof(scalar)) : 2;
  const char* data = static_cast<const char*>(block.weight.data) + chunk.first * block.weight.row_stride * size;
  if (is_float && block.width == block.row) {
    return {data, block.weight.dtype, block.weight.row_stride};
  }
  scalar* rows = reinterpret_cast<scalar*>(scratch);
  const MatrixRows from = {data, block.weight.dtype, block.weight.row_stride};
  widen_rows(rows, block.row, from, nullptr, chunk.size, chunk.size, block.width);
  return {rows, block.weight.dtype, block.row};
}

template <typename scalar>
scalar capped(scalar logit, scalar cap) {
  return cap * static_cast<scalar>(sizeof(scalar) == sizeof(float) ? __builtin_tanhf(logit / cap)
                                                                   : __builtin_tanh(logit / cap));
}

template <typename V>
void logits_of_chunk(const CrossEntropyBlock& block, int64_t chunk_index, char* scratch) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const Chunk chunk = chunk_of(block, chunk_index);
  const int64_t num_rows = block.num_rows;
  const MatrixRows weight = weight_rows<V>(block, chunk, scratch);
  scalar* logits = numbers<scalar>(block.logits) + chunk.first * num_rows;
  for (int64_t c = 0; c < chunk.size; c += kClassesAtOnce) {
    const int64_t classes = chunk.size - c < kClassesAtOnce ? chunk.size - c : kClassesAtOnce;
    product<V>(
        classes, num_rows, block.width,
        LeftMatrix<scalar>{numbers<scalar>(weight.data) + c * weight.row_stride, weight.row_stride, 1},
        RightMatrix<scalar>{numbers<scalar>(block.x_transposed), num_rows, kPanelWidth<V>},
        ResultMatrix<scalar>{logits + c * num_rows, num_rows}, false);
  }
  if (block.bias != nullptr || block.softcap > 0) {
    const scalar cap = static_cast<scalar>(block.softcap);
    for (int64_t c = 0; c < chunk.size; ++c) {
      const scalar bias = block.bias == nullptr ? scalar{0} : numbers<scalar>(block.bias)[chunk.first + c];
      scalar* of_class = logits + c * num_rows;
      for (int64_t i = 0; i < num_rows; ++i) {
        of_class[i] = cap > 0 ? capped(of_class[i] + bias, cap) : of_class[i] + bias;
      }
    }
  }
  const int64_t of_chunk = chunk_index * num_rows;
  for (int64_t i = 0; i < num_rows; i += V::width) {
    vector largest = V::load(logits + i), all{};
    for (int64_t c = 0; c < chunk.size; ++c) {
      const vector logit = V::load(logits + c * num_rows + i);
      largest = V::max(largest, logit);
      if (block.sum_logits) {
        all += logit;
      }
    }
    // Where all logits are -inf the sum is 0, not the NaN of a difference of infinities.
    const vector finite_largest = largest == V::broadcast(-__builtin_inff()) ? vector{} : largest;
    vector sum{};
    for (int64_t c = 0; c < chunk.size; ++c) {
      sum += V::exp(V::load(logits + c * num_rows + i) - finite_largest);
    }
    V::store(numbers<scalar>(block.chunk_max) + of_chunk + i, largest);
    V::store(numbers<scalar>(block.chunk_sum) + of_chunk + i, sum);
    if (block.sum_logits) {
      V::store(numbers<scalar>(block.chunk_sum_logits) + of_chunk + i, all);
    }
  }
}

template <typename V>
void gradients_of_chunk(const CrossEntropyBlock& block, int64_t chunk_index) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const Chunk chunk = chunk_of(block, chunk_index);
  const int64_t num_rows = block.num_rows;
  scalar* logits = numbers<scalar>(block.logits) + chunk.first * num_rows;
  const scalar cap = static_cast<scalar>(block.softcap);
  const auto slope = [&](auto logit) { return 1 - (logit / cap) * (logit / cap); };

  // What the labels' logits are before they become probabilities, where their slope is wanted afterwards.
  const scalar* label_weights = numbers<scalar>(block.label_weights);
  const auto for_labels = [&](const auto& visit) {
    for (int64_t entry = 0; entry < block.num_labels * num_rows; ++entry) {
      const int64_t c = block.labels[entry] - chunk.first;
      if (c >= 0 && c < chunk.size) {
        visit(entry, logits[c * num_rows + entry % num_rows]);
      }
    }
  };
  scalar* slopes = numbers<scalar>(block.label_slopes);
  if (cap > 0) {
    for_labels([&](int64_t entry, scalar& logit) { slopes[entry] = slope(logit); });
  }
  for (int64_t i = 0; i < num_rows; i += V::width) {
    const vector lse = V::load(numbers<scalar>(block.lse) + i);
    const vector scale = V::load(numbers<scalar>(block.probability_scale) + i);
    const vector offset = V::load(numbers<scalar>(block.offset) + i);
    for (int64_t c = 0; c < chunk.size; ++c) {
      scalar* at = logits + c * num_rows + i;
      const vector logit = V::load(at);
      vector gradient = V::exp(logit - lse) * scale - offset;
      if (cap > 0) {
        gradient *= slope(logit);
      }
      V::store(at, gradient);
    }
  }
  for_labels([&](int64_t entry, scalar& gradient) {
    gradient -= label_weights[entry] * (cap > 0 ? slopes[entry] : scalar{1});
  });

  if (block.grad_bias != nullptr) {
    scalar* grad_bias = numbers<scalar>(block.grad_bias) + chunk.first;
    for (int64_t c = 0; c < chunk.size; ++c) {
      vector sum{};
      for (int64_t i = 0; i < num_rows; i += V::width) {
        sum += V::load(logits + c * num_rows + i);
      }
      grad_bias[c] += V::sum(sum);
    }
  }
  if (block.grad_weight != nullptr) {
    product<V>(
        chunk.size, block.row, num_rows, LeftMatrix<scalar>{logits, num_rows, 1},
        RightMatrix<scalar>{numbers<scalar>(block.x), block.row, kPanelWidth<V>},
        ResultMatrix<scalar>{numbers<scalar>(block.grad_weight) + chunk.first * block.row, block.row}, true);
  }
}

template <typename V>
void gradient_of_rows(const CrossEntropyBlock& block, int64_t begin, int64_t end, char* scratch) {
  using scalar = typename V::scalar;
  const int64_t num_chunks = (block.num_classes + block.chunk_classes - 1) / block.chunk_classes;
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk chunk = chunk_of(block, i);
    const MatrixRows weight = weight_rows<V>(block, chunk, scratch);
    product<V>(
        end - begin, block.row, chunk.size,
        LeftMatrix<scalar>{numbers<scalar>(block.logits) + chunk.first * block.num_rows + begin, 1, block.num_rows},
        RightMatrix<scalar>{numbers<scalar>(weight.data), weight.row_stride, kPanelWidth<V>},
        ResultMatrix<scalar>{numbers<scalar>(block.grad_x) + begin * block.row, block.row}, i > 0);
  }
}

template <typename V>
constexpr CrossEntropyKernels cross_entropy_kernels_of() {
  return {V::width, &cross_entropy_scratch_bytes<V>, &load_x<V>, &logits_of_chunk<V>, &gradients_of_chunk<V>,
          &gradient_of_rows<V>};
}

}  // namespace
}  // namespace stamp::cpu
