// What scoring and selection leave to the kernels of one instruction set: plain data and function pointers, so that code
// compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "cpu/core/dispatch.h"
#include "cpu/core/numbers.h"

namespace stamp::cpu {

// Scores are float, and double where the hidden states are.
struct Scoring {
  DType dtype;         // of hidden
  const void* hidden;  // [total, width]
  int64_t row_stride;  // in elements
  int64_t width;
  const void* centrality;  // [total]
  bool centrality_is_double;
  bool squares;  // L2 norm, not L1
  bool per_visible_query;
};

// A score's place in the order of scores.
template <typename scalar>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  static constexpr type lowest = INT32_MIN, highest = INT32_MAX;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  static constexpr type lowest = INT64_MIN, highest = INT64_MAX;
};

// What stays of some keys: those above `threshold`, and the first `num_ties` of those that equal it.
template <typename Key>
struct Cut {
  Key threshold;
  int64_t num_ties;
};

// Keys are followed by lowest keys up to a multiple of this.
constexpr int64_t kKeysPerVector = 16;

template <typename scalar>
struct PruningKernels {
  using Key = typename KeyOf<scalar>::type;
  // scores[i - first_row] := the score of row i, for rows of a sequence that ends at end_sequence.
  void (*score_rows)(
      const Scoring&, int64_t first_row, int64_t end_row, int64_t end_sequence, scalar* scores);
  // The cut that leaves k of n keys, 1 <= k <= n.
  Cut<Key> (*cut)(const Key* keys, int64_t n, int64_t k);
};

// The kernels for a compute type on this machine.
template <typename scalar>
const PruningKernels<scalar>& pruning_kernels() {
  if constexpr (sizeof(scalar) == sizeof(double)) {
    return KernelTables<PruningKernels<double>>::portable_float64;
  } else {
    return kernels_of_machine<PruningKernels<float>>();
  }
}

}  // namespace stamp::cpu
