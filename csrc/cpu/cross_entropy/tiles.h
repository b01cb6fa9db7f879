// Cross-entropy by tiles of logits. With logits l = x W^T + b and, if asked for, l := cap * tanh(l / cap):
//
//   lse_i    = log sum_c exp(l_ic)                       from the maxima and sums of the slices
//   dl_ic    = scale_i * exp(l_ic - lse_i) - offset_i - sum of label_weights at the labels, times 1 - (l / cap)^2
//   dx_i     = sum_c dl_ic W_c      dW_c = sum_i dl_ic x_i      db_c = sum_i dl_ic
//
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cpu/cross_entropy/kernels.h"
#include "cpu/core/matrix_product.h"
#include "cpu/core/simd.h"

namespace stamp::cpu {
namespace {

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

// The panels of columns of a matrix [num_rows, row], `panel` scalars apart.
template <typename V>
void pack_panels(
    typename V::scalar* to, int64_t panel, const typename V::scalar* from, int64_t from_row, int64_t num_rows,
    int64_t row) {
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t d = 0; d < row; d += V::width) {
      typename V::scalar* of_panel = to + d / kPanelWidth<V> * panel + d % kPanelWidth<V>;
      V::store(of_panel + i * kPanelWidth<V>, V::load(from + i * from_row + d));
    }
  }
}

template <typename V>
void load_x(
    const CrossEntropyGroup& group, const MatrixRows& hidden, const int64_t* rows, int64_t num_given, int64_t begin,
    char* scratch) {
  using scalar = typename V::scalar;
  scalar* x = reinterpret_cast<scalar*>(scratch);
  widen_rows(x, group.row, hidden, rows + begin, num_given - begin, kRowsPerVector, group.width);
  const int64_t panel = group.num_rows * kPanelWidth<V>;
  pack_panels<V>(
      numbers<scalar>(group.x) + begin * kPanelWidth<V>, panel, x, group.row, kRowsPerVector, group.row);
  for (int64_t i = 0; i < kRowsPerVector; i += V::width) {
    scalar* transposed = numbers<scalar>(group.x_transposed) +
        (begin + i) / kPanelWidth<V> * kPanelWidth<V> * group.width + (begin + i) % kPanelWidth<V>;
    for (int64_t d = 0; d < group.width; d += V::width) {
      typename V::vector tile[V::width];
      for (int r = 0; r < V::width; ++r) {
        tile[r] = V::load(x + (i + r) * group.row + d);
      }
      transpose<V>(tile);
      for (int r = 0; r < V::width && d + r < group.width; ++r) {
        V::store(transposed + (d + r) * kPanelWidth<V>, tile[r]);
      }
    }
  }
}

// Consecutive rows or classes: the first one, and how many there are.
struct Span {
  int64_t first;
  int64_t size;
};

// Part `index` of `whole`, all but the last of `size`.
inline Span part_of(Span whole, int64_t index, int64_t size) {
  const int64_t left = whole.size - index * size;
  return {whole.first + index * size, left < size ? left : size};
}

// visit(block of rows) for all of the group.
template <typename Visit>
void for_blocks(const CrossEntropyGroup& group, const Visit& visit) {
  for (int64_t i = 0; i * group.block_rows < group.num_rows; ++i) {
    visit(part_of({0, group.num_rows}, i, group.block_rows));
  }
}

// visit(chunk of classes) for all of a slice.
template <typename Visit>
void for_chunks(const CrossEntropyGroup& group, int64_t slice_index, const Visit& visit) {
  const Span slice = part_of({0, group.num_classes}, slice_index, group.slice_classes);
  for (int64_t i = 0; i * group.chunk_classes < slice.size; ++i) {
    visit(part_of(slice, i, group.chunk_classes));
  }
}

// Memory of one thread.
template <typename scalar>
struct Scratch {
  scalar* tile;    // [chunk_classes, block_rows]
  scalar* rows;    // weight of a chunk in the compute type: [chunk_classes, row], or the rows that load_x reads
  scalar* panels;  // the same in panels of columns
  scalar* factors;  // [block_rows]
};

// Columns of whole panels.
template <typename V>
int64_t panels_width(const CrossEntropyGroup& group) {
  return (group.row + kPanelWidth<V> - 1) / kPanelWidth<V> * kPanelWidth<V>;
}

template <typename V>
Scratch<typename V::scalar> scratch_of(const CrossEntropyGroup& group, char* memory) {
  using scalar = typename V::scalar;
  scalar* tile = reinterpret_cast<scalar*>(memory);
  scalar* rows = tile + group.chunk_classes * group.block_rows;
  scalar* panels = rows + group.chunk_classes * group.row;
  return {tile, rows, panels, panels + group.chunk_classes * panels_width<V>(group)};
}

template <typename V>
int64_t cross_entropy_scratch_bytes(const CrossEntropyGroup& group) {
  return (group.chunk_classes * (group.block_rows + group.row + panels_width<V>(group)) + group.block_rows) *
      static_cast<int64_t>(sizeof(typename V::scalar));
}

// The weight of some classes in the compute type, in rows of whole vectors: as it lies there, or in `to`.
template <typename V>
LeftMatrix<typename V::scalar> weight_rows(const CrossEntropyGroup& group, Span chunk, typename V::scalar* to) {
  using scalar = typename V::scalar;
  const bool is_float = group.weight.dtype == DType::kFloat32 || group.weight.dtype == DType::kFloat64;
  const int64_t size = is_float ? static_cast<int64_t>(sizeof(scalar)) : 2;
  const char* data = static_cast<const char*>(group.weight.data) + chunk.first * group.weight.row_stride * size;
  if (is_float && group.width == group.row) {
    return {numbers<scalar>(data), group.weight.row_stride, 1};
  }
  const MatrixRows from = {data, group.weight.dtype, group.weight.row_stride};
  widen_rows(to, group.row, from, nullptr, chunk.size, chunk.size, group.width);
  return {to, group.row, 1};
}

template <typename scalar>
scalar capped(scalar logit, scalar cap) {
  return cap * static_cast<scalar>(sizeof(scalar) == sizeof(float) ? __builtin_tanhf(logit / cap)
                                                                   : __builtin_tanh(logit / cap));
}

// Into the second cache: a product reads rows that lie apart, and would wait for the first lines of each (2 % of the
// time of large vocabularies for the weight, as much for its gradient). To be written if `to_write`.
template <int to_write, typename scalar>
void prefetch(const scalar* from, int64_t size) {
  constexpr int64_t kCacheLine = 64 / sizeof(scalar);
  for (int64_t i = 0; i < size; i += kCacheLine) {
    __builtin_prefetch(from + i, to_write, 2);
  }
}

// Whether exponentials are kept in place of the logits. The slope of a cap wants the logits themselves.
inline bool keeps_exponentials(const CrossEntropyGroup& group) {
  return group.logits != nullptr && group.softcap == 0;
}

// chunk_max of a tile's first row.
template <typename scalar>
scalar* chunk_max_of(const CrossEntropyGroup& group, Span block, Span chunk) {
  return numbers<scalar>(group.chunk_max) + chunk.first / group.chunk_classes * group.num_rows + block.first;
}

// The logits of a tile, where they are kept.
template <typename scalar>
scalar* kept_logits(const CrossEntropyGroup& group, Span block, Span chunk) {
  const int64_t of_block = block.first / group.block_rows * group.num_classes;
  return numbers<scalar>(group.logits) + (of_block + chunk.first) * group.block_rows;
}

template <typename V>
void logits_of_tile(
    const CrossEntropyGroup& group, Span block, Span chunk, LeftMatrix<typename V::scalar> weight,
    typename V::scalar* logits) {
  using scalar = typename V::scalar;
  const scalar* x_transposed = numbers<scalar>(group.x_transposed) + block.first * group.width;
  product<V>(
      chunk.size, block.size, group.width, weight,
      RightMatrix<scalar>{x_transposed, kPanelWidth<V>, group.width * kPanelWidth<V>},
      ResultMatrix<scalar>{logits, group.block_rows}, false);
  if (group.bias == nullptr && group.softcap == 0) {
    return;
  }
  const scalar cap = static_cast<scalar>(group.softcap);
  for (int64_t c = 0; c < chunk.size; ++c) {
    const scalar bias = group.bias == nullptr ? scalar{0} : numbers<scalar>(group.bias)[chunk.first + c];
    scalar* of_class = logits + c * group.block_rows;
    for (int64_t i = 0; i < block.size; ++i) {
      of_class[i] = cap > 0 ? capped(of_class[i] + bias, cap) : of_class[i] + bias;
    }
  }
}

// visit(entry of labels, class in the chunk, row in the block) for the labels in a tile.
template <typename Visit>
void for_labels(const CrossEntropyGroup& group, Span block, Span chunk, const Visit& visit) {
  for (int64_t label = 0; label < group.num_labels; ++label) {
    const int64_t first = label * group.num_rows + block.first;
    for (int64_t i = 0; i < block.size; ++i) {
      const int64_t c = group.labels[first + i] - chunk.first;
      if (c >= 0 && c < chunk.size) {
        visit(first + i, c, i);
      }
    }
  }
}

// Adds the logits of a tile to the maxima and sums of its slice, which `is_first` begins. Their exponentials take their
// place where those are kept.
template <typename V>
void add_to_sums(
    const CrossEntropyGroup& group, int64_t slice, Span block, Span chunk, typename V::scalar* logits, bool is_first) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const int64_t of_block = slice * group.num_rows + block.first;
  for (int64_t i = 0; i < block.size; i += V::width) {
    scalar* max_at = numbers<scalar>(group.slice_max) + of_block + i;
    scalar* sum_at = numbers<scalar>(group.slice_sum) + of_block + i;
    const vector largest_before = is_first ? V::broadcast(-__builtin_inff()) : V::load(max_at);
    vector largest = largest_before, all{};
    for (int64_t c = 0; c < chunk.size; ++c) {
      const vector logit = V::load(logits + c * group.block_rows + i);
      largest = V::max(largest, logit);
      if (group.sum_logits) {
        all += logit;
      }
    }
    // Where all logits are -inf the sum is 0, not the NaN of a difference of infinities.
    const vector finite_largest = largest == V::broadcast(-__builtin_inff()) ? vector{} : largest;
    vector sum = is_first ? vector{} : V::load(sum_at) * V::exp(largest_before - finite_largest);
    if (keeps_exponentials(group)) {
      V::store(chunk_max_of<scalar>(group, block, chunk) + i, finite_largest);
      for (int64_t c = 0; c < chunk.size; ++c) {
        scalar* at = logits + c * group.block_rows + i;
        const vector exponential = V::exp(V::load(at) - finite_largest);
        V::store(at, exponential);
        sum += exponential;
      }
    } else {
      for (int64_t c = 0; c < chunk.size; ++c) {
        sum += V::exp(V::load(logits + c * group.block_rows + i) - finite_largest);
      }
    }
    V::store(max_at, largest);
    V::store(sum_at, sum);
    if (group.sum_logits) {
      scalar* all_at = numbers<scalar>(group.slice_sum_logits) + of_block + i;
      V::store(all_at, is_first ? all : V::load(all_at) + all);
    }
  }
}

template <typename V>
void sums_of_slice(const CrossEntropyGroup& group, int64_t slice, char* memory) {
  using scalar = typename V::scalar;
  const Scratch<scalar> scratch = scratch_of<V>(group, memory);
  for_chunks(group, slice, [&](Span chunk) {
    const LeftMatrix<scalar> weight = weight_rows<V>(group, chunk, scratch.rows);
    for (int64_t c = 0; c < chunk.size; ++c) {
      prefetch<0>(weight.data + c * weight.row, group.width);
    }
    for_blocks(group, [&](Span block) {
      scalar* logits = group.logits == nullptr ? scratch.tile : kept_logits<scalar>(group, block, chunk);
      logits_of_tile<V>(group, block, chunk, weight, logits);
      for_labels(group, block, chunk, [&](int64_t entry, int64_t c, int64_t i) {
        numbers<scalar>(group.label_logits)[entry] = logits[c * group.block_rows + i];
      });
      add_to_sums<V>(group, slice, block, chunk, logits, chunk.first == slice * group.slice_classes);
    });
  });
}

// The gradients of the logits of a tile, from the logits or what is kept of them.
template <typename V>
void gradients_of_tile(
    const CrossEntropyGroup& group, Span block, Span chunk, const typename V::scalar* logits,
    typename V::scalar* gradients, typename V::scalar* factors) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const scalar cap = static_cast<scalar>(group.softcap);
  const auto slope = [&](auto logit) { return 1 - (logit / cap) * (logit / cap); };
  scalar* label_logits = numbers<scalar>(group.label_logits);
  if (cap > 0) {  // gradients may take the place of the logits
    for_labels(group, block, chunk, [&](int64_t entry, int64_t c, int64_t i) {
      label_logits[entry] = logits[c * group.block_rows + i];
    });
  }
  const scalar* lse = numbers<scalar>(group.lse) + block.first;
  const scalar* scale = numbers<scalar>(group.probability_scale) + block.first;
  const scalar* offset = numbers<scalar>(group.offset) + block.first;
  const bool has_exponentials = keeps_exponentials(group);
  if (has_exponentials) {  // exp(logit - lse) = exp(logit - chunk_max) exp(chunk_max - lse)
    const scalar* chunk_max = chunk_max_of<scalar>(group, block, chunk);
    for (int64_t i = 0; i < block.size; i += V::width) {
      V::store(factors + i, V::exp(V::load(chunk_max + i) - V::load(lse + i)) * V::load(scale + i));
    }
  }
  // Class by class: kept logits come from far away, in the order in which they lie there.
  for (int64_t c = 0; c < chunk.size; ++c) {
    if (group.grad_weight != nullptr) {
      prefetch<1>(numbers<scalar>(group.grad_weight) + (chunk.first + c) * group.row, group.row);
    }
    for (int64_t i = 0; i < block.size; i += V::width) {
      const vector logit = V::load(logits + c * group.block_rows + i);
      vector gradient = has_exponentials ? logit * V::load(factors + i)
                                         : V::exp(logit - V::load(lse + i)) * V::load(scale + i);
      gradient -= V::load(offset + i);
      if (cap > 0) {
        gradient *= slope(logit);
      }
      V::store(gradients + c * group.block_rows + i, gradient);
    }
  }
  for_labels(group, block, chunk, [&](int64_t entry, int64_t c, int64_t i) {
    const scalar weight = numbers<scalar>(group.label_weights)[entry];
    gradients[c * group.block_rows + i] -= cap > 0 ? weight * slope(label_logits[entry]) : weight;
  });
}

template <typename V>
void gradients_of_slice(const CrossEntropyGroup& group, int64_t slice, char* memory) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const Scratch<scalar> scratch = scratch_of<V>(group, memory);
  for_chunks(group, slice, [&](Span chunk) {
    const LeftMatrix<scalar> weight = weight_rows<V>(group, chunk, scratch.rows);
    const int64_t panel = chunk.size * kPanelWidth<V>;
    if (group.grad_x != nullptr) {
      pack_panels<V>(scratch.panels, panel, weight.data, weight.row, chunk.size, group.row);
    }
    for_blocks(group, [&](Span block) {
      const scalar* logits = scratch.tile;
      if (group.logits == nullptr) {
        logits_of_tile<V>(group, block, chunk, weight, scratch.tile);
      } else {
        logits = kept_logits<scalar>(group, block, chunk);
      }
      scalar* gradients = scratch.tile;
      gradients_of_tile<V>(group, block, chunk, logits, gradients, scratch.factors);
      if (group.grad_bias != nullptr) {
        for (int64_t c = 0; c < chunk.size; ++c) {
          vector sum{};
          for (int64_t i = 0; i < block.size; i += V::width) {
            sum += V::load(gradients + c * group.block_rows + i);
          }
          numbers<scalar>(group.grad_bias)[chunk.first + c] += V::sum(sum);
        }
      }
      if (group.grad_weight != nullptr) {
        product<V>(
            chunk.size, group.row, block.size, LeftMatrix<scalar>{gradients, group.block_rows, 1},
            RightMatrix<scalar>{
                numbers<scalar>(group.x) + block.first * kPanelWidth<V>, kPanelWidth<V>,
                group.num_rows * kPanelWidth<V>},
            ResultMatrix<scalar>{numbers<scalar>(group.grad_weight) + chunk.first * group.row, group.row}, true);
      }
      if (group.grad_x != nullptr) {
        scalar* grad_x = numbers<scalar>(group.grad_x) + (slice * group.num_rows + block.first) * group.row;
        product<V>(
            block.size, group.row, chunk.size, LeftMatrix<scalar>{gradients, 1, group.block_rows},
            RightMatrix<scalar>{scratch.panels, kPanelWidth<V>, panel}, ResultMatrix<scalar>{grad_x, group.row},
            chunk.first > slice * group.slice_classes);
      }
    });
  });
}

template <typename V>
constexpr CrossEntropyKernels cross_entropy_kernels_of() {
  return {V::width, kPanelWidth<V>, &cross_entropy_scratch_bytes<V>, &load_x<V>, &sums_of_slice<V>,
          &gradients_of_slice<V>};
}

}  // namespace
}  // namespace stamp::cpu
