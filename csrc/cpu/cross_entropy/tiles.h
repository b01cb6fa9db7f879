// The cross-entropy kernels, tile by tile of the logits. For the hidden states x_i of a row, the class weights W_c and
// the biases b_c
//
//   l_ic   = x_i W_c + b_c, with a softcap then cap tanh(l_ic / cap)
//   lse_i  = log sum_c exp(l_ic), from the maxima and sums of the class splits (worker.cpp)
//   dl_ic  = (probability_scale_i exp(l_ic - lse_i) - offset_i - sum of target_weights of the targets c) t_ic
//            t_ic: 1, with a softcap 1 - (l_ic / cap)^2
//   dx_i   = sum_c dl_ic W_c      dW_c = sum_i dl_ic x_i      db_c = sum_i dl_ic
//
// All products are matrix_product.h's, at every width. Against chunks of logits by BLAS (MKL, two threads, 220 GFLOP/s)
// they are 1.2 to 1.7 times as fast up to width 256, 1.05 times at 512, and from 1,024 on as fast or up to a fifth
// slower, with few classes.
//
// In names and comments of shapes, rows and classes are those of a tile: a row block against a class chunk.
//
// Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "cpu/core/matrix_product.h"
#include "cpu/core/scratch.h"
#include "cpu/core/simd.h"
#include "cpu/cross_entropy/kernels.h"

namespace stamp::cpu {
namespace {

template <typename scalar>
scalar* numbers(const void* data) {
  return static_cast<scalar*>(const_cast<void*>(data));
}

// Rows into the compute type and into the layouts that products read

// to [num_rows, to_row] := rows of a matrix in the compute type, zeros past the width. Row i is row rows[i] of the
// matrix, or row i if `rows` is null; from i = num_given on it is 0.
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
  const auto widen = [&](const auto* data) {
    widen_rows_of(to, to_row, data, from.row_stride, rows, num_given, num_rows, width);
  };
  if constexpr (sizeof(scalar) == sizeof(double)) {
    widen(static_cast<const double*>(from.data));
  } else if (from.dtype == DType::kFloat16) {
    widen(static_cast<const Half*>(from.data));
  } else if (from.dtype == DType::kBFloat16) {
    widen(static_cast<const BFloat16*>(from.data));
  } else {
    widen(static_cast<const float*>(from.data));
  }
}

// The panels of columns of a matrix [num_rows, width], `panel` scalars apart; the width is of whole vectors.
template <typename V>
void pack_panels(
    typename V::scalar* to, int64_t panel, const typename V::scalar* from, int64_t from_row, int64_t num_rows,
    int64_t width) {
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t d = 0; d < width; d += V::width) {
      typename V::scalar* of_panel = to + d / kPanelWidth<V> * panel + d % kPanelWidth<V>;
      V::store(of_panel + i * kPanelWidth<V>, V::load(from + i * from_row + d));
    }
  }
}

// The columns [start, start + kRowMultiple) of hidden_transposed, from rows x [kRowMultiple, padded_width].
template <typename V>
void pack_transposed(const CrossEntropyRowChunk& row_chunk, const typename V::scalar* x, int64_t start) {
  using scalar = typename V::scalar;
  for (int64_t i = 0; i < kRowMultiple; i += V::width) {
    scalar* to = numbers<scalar>(row_chunk.hidden_transposed) +
        (start + i) / kPanelWidth<V> * kPanelWidth<V> * row_chunk.width + (start + i) % kPanelWidth<V>;
    for (int64_t d = 0; d < row_chunk.width; d += V::width) {
      typename V::vector square[V::width];
      for (int r = 0; r < V::width; ++r) {
        square[r] = V::load(x + (i + r) * row_chunk.padded_width + d);
      }
      transpose<V>(square);
      for (int r = 0; r < V::width && d + r < row_chunk.width; ++r) {
        V::store(to + (d + r) * kPanelWidth<V>, square[r]);
      }
    }
  }
}

// [kRowMultiple, padded_width]
template <typename V>
typename V::scalar* take_loaded_rows(Scratch& scratch, const CrossEntropyRowChunk& row_chunk) {
  return scratch.take<typename V::scalar>(kRowMultiple * row_chunk.padded_width);
}

template <typename V>
void load_hidden(
    const CrossEntropyRowChunk& row_chunk, const MatrixRows& from, const int64_t* rows, int64_t num_given,
    int64_t start, char* memory) {
  using scalar = typename V::scalar;
  Scratch scratch(memory);
  scalar* x = take_loaded_rows<V>(scratch, row_chunk);
  widen_rows(x, row_chunk.padded_width, from, rows + start, num_given - start, kRowMultiple, row_chunk.width);
  pack_panels<V>(
      numbers<scalar>(row_chunk.hidden) + start * kPanelWidth<V>, row_chunk.num_rows * kPanelWidth<V>, x,
      row_chunk.padded_width, kRowMultiple, row_chunk.padded_width);
  pack_transposed<V>(row_chunk, x, start);
}

// How a row chunk and a class split are divided into tiles

// Consecutive rows or classes.
struct Span {
  int64_t first;
  int64_t size;
};

// A row block of the row chunk against a class chunk.
struct Tile {
  Span rows;
  Span classes;
};

// Number `index` of the spans of `size` that `whole` is divided into; the last one may be smaller.
inline Span subspan(Span whole, int64_t index, int64_t size) {
  const int64_t left = whole.size - index * size;
  return {whole.first + index * size, left < size ? left : size};
}

// visit(row block) for all row blocks.
template <typename Visit>
void for_row_blocks(const CrossEntropyRowChunk& row_chunk, const Visit& visit) {
  for (int64_t i = 0; i * row_chunk.rows_per_block < row_chunk.num_rows; ++i) {
    visit(subspan({0, row_chunk.num_rows}, i, row_chunk.rows_per_block));
  }
}

// visit(class chunk, whether it is the first) for all class chunks of a class split.
template <typename Visit>
void for_class_chunks(const CrossEntropyRowChunk& row_chunk, int64_t class_split, const Visit& visit) {
  const Span classes = subspan({0, row_chunk.num_classes}, class_split, row_chunk.classes_per_split);
  for (int64_t i = 0; i * row_chunk.classes_per_chunk < classes.size; ++i) {
    visit(subspan(classes, i, row_chunk.classes_per_chunk), i == 0);
  }
}

// visit(index into targets, class in the tile, row in the tile) for the targets in a tile.
template <typename Visit>
void for_targets(const CrossEntropyRowChunk& row_chunk, const Tile& tile, const Visit& visit) {
  for (int64_t k = 0; k < row_chunk.num_targets; ++k) {
    const int64_t first = k * row_chunk.num_rows + tile.rows.first;
    for (int64_t i = 0; i < tile.rows.size; ++i) {
      const int64_t c = row_chunk.targets[first + i] - tile.classes.first;
      if (c >= 0 && c < tile.classes.size) {
        visit(first + i, c, i);
      }
    }
  }
}

// The width in whole panels.
template <typename V>
int64_t panels_width(const CrossEntropyRowChunk& row_chunk) {
  return (row_chunk.padded_width + kPanelWidth<V> - 1) / kPanelWidth<V> * kPanelWidth<V>;
}

// Memory of one thread for tiles of logits.
template <typename V>
struct TileScratch {
  using scalar = typename V::scalar;

  scalar* tile;     // [classes_per_chunk, rows_per_block]
  scalar* weight;   // of a class chunk in the compute type, [classes_per_chunk, padded_width]
  scalar* panels;   // the same in panels of columns
  scalar* factors;  // [rows_per_block]
  int64_t bytes;

  TileScratch(const CrossEntropyRowChunk& row_chunk, char* base) {
    Scratch scratch(base);
    tile = scratch.take<scalar>(row_chunk.classes_per_chunk * row_chunk.rows_per_block);
    weight = scratch.take<scalar>(row_chunk.classes_per_chunk * row_chunk.padded_width);
    panels = scratch.take<scalar>(row_chunk.classes_per_chunk * panels_width<V>(row_chunk));
    factors = scratch.take<scalar>(row_chunk.rows_per_block);
    bytes = scratch.size();
  }
};

template <typename V>
int64_t cross_entropy_scratch_bytes(const CrossEntropyRowChunk& row_chunk) {
  Scratch of_loading(nullptr);
  take_loaded_rows<V>(of_loading, row_chunk);
  return larger(of_loading.size(), TileScratch<V>(row_chunk, nullptr).bytes);
}

// Logits

// The weight of some classes in the compute type, in rows of whole vectors: in place where it is stored like that,
// otherwise copied to `to`.
template <typename V>
LeftMatrix<typename V::scalar> weight_rows(
    const CrossEntropyRowChunk& row_chunk, Span classes, typename V::scalar* to) {
  using scalar = typename V::scalar;
  const MatrixRows& weight = row_chunk.weight;
  const bool is_compute_type = weight.dtype == DType::kFloat32 || weight.dtype == DType::kFloat64;
  const int64_t element_bytes = is_compute_type ? static_cast<int64_t>(sizeof(scalar)) : 2;
  const char* data = static_cast<const char*>(weight.data) + classes.first * weight.row_stride * element_bytes;
  if (is_compute_type && row_chunk.width == row_chunk.padded_width) {
    return {numbers<scalar>(data), weight.row_stride, 1};
  }
  const MatrixRows from = {data, weight.dtype, weight.row_stride};
  widen_rows(to, row_chunk.padded_width, from, nullptr, classes.size, classes.size, row_chunk.width);
  return {to, row_chunk.padded_width, 1};
}

template <typename scalar>
scalar capped(scalar logit, scalar cap) {
  return cap *
      static_cast<scalar>(sizeof(scalar) == sizeof(float) ? __builtin_tanhf(logit / cap) : __builtin_tanh(logit / cap));
}

// Into the L2 cache, to be written if `to_write`. A product reads rows that are strided in memory, and would wait for
// the first cache lines of each (2 % of the time of large vocabularies for the weight, as much for its gradient).
template <int to_write, typename scalar>
void prefetch(const scalar* from, int64_t size) {
  constexpr int64_t kCacheLine = 64 / sizeof(scalar);
  for (int64_t i = 0; i < size; i += kCacheLine) {
    __builtin_prefetch(from + i, to_write, 2);
  }
}

// Whether exponentials take the place of kept logits. The derivative of a softcap needs the logits themselves.
inline bool keeps_exponentials(const CrossEntropyRowChunk& row_chunk) {
  return row_chunk.logits != nullptr && row_chunk.softcap == 0;
}

// The entries of class_chunk_max for a tile, [rows].
template <typename scalar>
scalar* max_of_tile(const CrossEntropyRowChunk& row_chunk, const Tile& tile) {
  const int64_t class_chunk = tile.classes.first / row_chunk.classes_per_chunk;
  return numbers<scalar>(row_chunk.class_chunk_max) + class_chunk * row_chunk.num_rows + tile.rows.first;
}

// The memory for the kept logits of a tile, [classes, rows_per_block].
template <typename scalar>
scalar* kept_logits(const CrossEntropyRowChunk& row_chunk, const Tile& tile) {
  const int64_t row_block = tile.rows.first / row_chunk.rows_per_block;
  const int64_t first_class = row_block * row_chunk.num_classes + tile.classes.first;
  return numbers<scalar>(row_chunk.logits) + first_class * row_chunk.rows_per_block;
}

template <typename V>
void compute_logits(
    const CrossEntropyRowChunk& row_chunk, const Tile& tile, LeftMatrix<typename V::scalar> weight,
    typename V::scalar* logits) {
  using scalar = typename V::scalar;
  const scalar* x_transposed = numbers<scalar>(row_chunk.hidden_transposed) + tile.rows.first * row_chunk.width;
  // logits [classes, rows] = W [classes, width] x^T [width, rows]
  product<V>(
      tile.classes.size, tile.rows.size, row_chunk.width, weight,
      RightMatrix<scalar>{x_transposed, kPanelWidth<V>, row_chunk.width * kPanelWidth<V>},
      ResultMatrix<scalar>{logits, row_chunk.rows_per_block}, false);
  if (row_chunk.bias == nullptr && row_chunk.softcap == 0) {
    return;
  }
  const scalar cap = static_cast<scalar>(row_chunk.softcap);
  for (int64_t c = 0; c < tile.classes.size; ++c) {
    const scalar bias = row_chunk.bias == nullptr ? scalar{0} : numbers<scalar>(row_chunk.bias)[tile.classes.first + c];
    scalar* of_class = logits + c * row_chunk.rows_per_block;
    for (int64_t i = 0; i < tile.rows.size; ++i) {
      of_class[i] = cap > 0 ? capped(of_class[i] + bias, cap) : of_class[i] + bias;
    }
  }
}

// Sums

// Adds the logits of a tile to the maxima and sums of its class split; the first class chunk begins them. Exponentials
// replace the logits where they are kept.
template <typename V>
void add_to_sums(
    const CrossEntropyRowChunk& row_chunk, int64_t class_split, const Tile& tile, typename V::scalar* logits,
    bool is_first) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const int64_t first_row = class_split * row_chunk.num_rows + tile.rows.first;
  for (int64_t i = 0; i < tile.rows.size; i += V::width) {
    scalar* max_at = numbers<scalar>(row_chunk.class_split_max) + first_row + i;
    scalar* sum_at = numbers<scalar>(row_chunk.class_split_sum) + first_row + i;
    const vector max_before = is_first ? V::broadcast(-__builtin_inff()) : V::load(max_at);
    vector max = max_before, sum_logits{};
    for (int64_t c = 0; c < tile.classes.size; ++c) {
      const vector logit = V::load(logits + c * row_chunk.rows_per_block + i);
      max = V::max(max, logit);
      if (row_chunk.needs_sum_logits) {
        sum_logits += logit;
      }
    }
    // Where all logits are -inf, the sum is 0 instead of the NaN that -inf - -inf would give.
    const vector finite_max = max == V::broadcast(-__builtin_inff()) ? vector{} : max;
    vector sum = is_first ? vector{} : V::load(sum_at) * V::exp(max_before - finite_max);
    if (keeps_exponentials(row_chunk)) {
      V::store(max_of_tile<scalar>(row_chunk, tile) + i, finite_max);
      for (int64_t c = 0; c < tile.classes.size; ++c) {
        scalar* at = logits + c * row_chunk.rows_per_block + i;
        const vector exponential = V::exp(V::load(at) - finite_max);
        V::store(at, exponential);
        sum += exponential;
      }
    } else {
      for (int64_t c = 0; c < tile.classes.size; ++c) {
        sum += V::exp(V::load(logits + c * row_chunk.rows_per_block + i) - finite_max);
      }
    }
    V::store(max_at, max);
    V::store(sum_at, sum);
    if (row_chunk.needs_sum_logits) {
      scalar* sum_logits_at = numbers<scalar>(row_chunk.class_split_sum_logits) + first_row + i;
      V::store(sum_logits_at, is_first ? sum_logits : V::load(sum_logits_at) + sum_logits);
    }
  }
}

template <typename V>
void sums_of_class_split(const CrossEntropyRowChunk& row_chunk, int64_t class_split, char* memory) {
  using scalar = typename V::scalar;
  const TileScratch<V> scratch(row_chunk, memory);
  for_class_chunks(row_chunk, class_split, [&](Span classes, bool is_first) {
    const LeftMatrix<scalar> weight = weight_rows<V>(row_chunk, classes, scratch.weight);
    for (int64_t c = 0; c < classes.size; ++c) {
      prefetch<0>(weight.data + c * weight.row, row_chunk.width);
    }
    for_row_blocks(row_chunk, [&](Span rows) {
      const Tile tile = {rows, classes};
      scalar* logits = row_chunk.logits == nullptr ? scratch.tile : kept_logits<scalar>(row_chunk, tile);
      compute_logits<V>(row_chunk, tile, weight, logits);
      for_targets(row_chunk, tile, [&](int64_t target, int64_t c, int64_t i) {
        numbers<scalar>(row_chunk.target_logits)[target] = logits[c * row_chunk.rows_per_block + i];
      });
      add_to_sums<V>(row_chunk, class_split, tile, logits, is_first);
    });
  });
}

// Gradients

// dlogits [classes, rows_per_block], from the logits or the exponentials that are kept; it may be the same memory.
// `factors` is scratch memory.
template <typename V>
void compute_dlogits(
    const CrossEntropyRowChunk& row_chunk, const Tile& tile, const typename V::scalar* logits,
    typename V::scalar* dlogits, typename V::scalar* factors) {
  using scalar = typename V::scalar;
  using vector = typename V::vector;
  const scalar cap = static_cast<scalar>(row_chunk.softcap);
  const auto slope = [&](auto logit) { return 1 - (logit / cap) * (logit / cap); };
  scalar* target_logits = numbers<scalar>(row_chunk.target_logits);
  if (cap > 0) {  // before dlogits take the place of the logits
    for_targets(row_chunk, tile, [&](int64_t target, int64_t c, int64_t i) {
      target_logits[target] = logits[c * row_chunk.rows_per_block + i];
    });
  }
  const scalar* lse = numbers<scalar>(row_chunk.lse) + tile.rows.first;
  const scalar* scale = numbers<scalar>(row_chunk.probability_scale) + tile.rows.first;
  const scalar* offset = numbers<scalar>(row_chunk.offset) + tile.rows.first;
  const bool has_exponentials = keeps_exponentials(row_chunk);
  if (has_exponentials) {  // exp(logit - lse) = exp(logit - max) exp(max - lse)
    const scalar* max = max_of_tile<scalar>(row_chunk, tile);
    for (int64_t i = 0; i < tile.rows.size; i += V::width) {
      V::store(factors + i, V::exp(V::load(max + i) - V::load(lse + i)) * V::load(scale + i));
    }
  }
  // Class by class: kept logits come from a distant cache or from memory, where they are stored in this order.
  for (int64_t c = 0; c < tile.classes.size; ++c) {
    if (row_chunk.grad_weight != nullptr) {
      const int64_t first = (tile.classes.first + c) * row_chunk.padded_width;
      prefetch<1>(numbers<scalar>(row_chunk.grad_weight) + first, row_chunk.padded_width);
    }
    for (int64_t i = 0; i < tile.rows.size; i += V::width) {
      const vector logit = V::load(logits + c * row_chunk.rows_per_block + i);
      vector dlogit =
          has_exponentials ? logit * V::load(factors + i) : V::exp(logit - V::load(lse + i)) * V::load(scale + i);
      dlogit -= V::load(offset + i);
      if (cap > 0) {
        dlogit *= slope(logit);
      }
      V::store(dlogits + c * row_chunk.rows_per_block + i, dlogit);
    }
  }
  for_targets(row_chunk, tile, [&](int64_t target, int64_t c, int64_t i) {
    const scalar weight = numbers<scalar>(row_chunk.target_weights)[target];
    dlogits[c * row_chunk.rows_per_block + i] -= cap > 0 ? weight * slope(target_logits[target]) : weight;
  });
}

// db += sum over the rows of dlogits
template <typename V>
void add_to_grad_bias(const CrossEntropyRowChunk& row_chunk, const Tile& tile, const typename V::scalar* dlogits) {
  using scalar = typename V::scalar;
  for (int64_t c = 0; c < tile.classes.size; ++c) {
    typename V::vector sum{};
    for (int64_t i = 0; i < tile.rows.size; i += V::width) {
      sum += V::load(dlogits + c * row_chunk.rows_per_block + i);
    }
    numbers<scalar>(row_chunk.grad_bias)[tile.classes.first + c] += V::sum(sum);
  }
}

template <typename V>
void gradients_of_class_split(const CrossEntropyRowChunk& row_chunk, int64_t class_split, char* memory) {
  using scalar = typename V::scalar;
  const int64_t padded_width = row_chunk.padded_width, rows_per_block = row_chunk.rows_per_block;
  const TileScratch<V> scratch(row_chunk, memory);
  for_class_chunks(row_chunk, class_split, [&](Span classes, bool is_first) {
    const LeftMatrix<scalar> weight = weight_rows<V>(row_chunk, classes, scratch.weight);
    const int64_t panel = classes.size * kPanelWidth<V>;
    if (row_chunk.grad_hidden_splits != nullptr) {
      pack_panels<V>(scratch.panels, panel, weight.data, weight.row, classes.size, padded_width);
    }
    for_row_blocks(row_chunk, [&](Span rows) {
      const Tile tile = {rows, classes};
      const scalar* logits = scratch.tile;
      if (row_chunk.logits == nullptr) {
        compute_logits<V>(row_chunk, tile, weight, scratch.tile);
      } else {
        logits = kept_logits<scalar>(row_chunk, tile);
      }
      scalar* dlogits = scratch.tile;
      compute_dlogits<V>(row_chunk, tile, logits, dlogits, scratch.factors);
      if (row_chunk.grad_bias != nullptr) {
        add_to_grad_bias<V>(row_chunk, tile, dlogits);
      }
      if (row_chunk.grad_weight != nullptr) {
        // dW [classes, padded_width] += dlogits [classes, rows] x [rows, padded_width]
        const scalar* x = numbers<scalar>(row_chunk.hidden) + rows.first * kPanelWidth<V>;
        scalar* grad_weight = numbers<scalar>(row_chunk.grad_weight) + classes.first * padded_width;
        product<V>(
            classes.size, padded_width, rows.size, LeftMatrix<scalar>{dlogits, rows_per_block, 1},
            RightMatrix<scalar>{x, kPanelWidth<V>, row_chunk.num_rows * kPanelWidth<V>},
            ResultMatrix<scalar>{grad_weight, padded_width}, true);
      }
      if (row_chunk.grad_hidden_splits != nullptr) {
        // dx [rows, padded_width] = dlogits^T [rows, classes] W [classes, padded_width]; later class chunks add to it
        scalar* grad_hidden = numbers<scalar>(row_chunk.grad_hidden_splits) +
            (class_split * row_chunk.num_rows + rows.first) * padded_width;
        product<V>(
            rows.size, padded_width, classes.size, LeftMatrix<scalar>{dlogits, 1, rows_per_block},
            RightMatrix<scalar>{scratch.panels, kPanelWidth<V>, panel}, ResultMatrix<scalar>{grad_hidden, padded_width},
            !is_first);
      }
    });
  });
}

template <typename V>
constexpr CrossEntropyKernels cross_entropy_kernels_of() {
  return {V::width,        kPanelWidth<V>,          &cross_entropy_scratch_bytes<V>,
          &load_hidden<V>, &sums_of_class_split<V>, &gradients_of_class_split<V>};
}

}  // namespace
}  // namespace stamp::cpu
