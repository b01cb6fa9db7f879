// The interface between the pruning ops and the kernels of one instruction set: plain data and function pointers, so
// that code compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "cpu/core/dispatch.h"
#include "cpu/core/dtypes.h"
#include "cpu/pruning/keys.h"

namespace stamp::cpu {

// The importance is float, or double where the hidden states are.
struct ImportanceProblem {
  DType dtype;         // of hidden
  const void* hidden;  // [total, width]
  int64_t row_stride;  // in elements
  int64_t width;
  const void* centrality;  // [total]
  bool centrality_is_double;
  int64_t norm_order;  // 1 or 2
  bool per_visible_query;
};

// What is kept of some keys: those above `key`, and the first `num_ties` of those that equal it.
template <typename Key>
struct Threshold {
  Key key;
  int64_t num_ties;
};

// Keys are padded with the lowest key up to a multiple of this.
constexpr int64_t kKeysPerVector = 16;

template <typename scalar>
struct PruningKernels {
  using Key = typename KeyOf<scalar>::type;
  // importance[i - first_row] := the importance of row i in [first_row, end_row), rows of a sequence that ends at
  // end_sequence.
  void (*importance_of_rows)(
      const ImportanceProblem&, int64_t first_row, int64_t end_row, int64_t end_sequence, scalar* importance);
  // The threshold that keeps num_kept of num_keys keys, 1 <= num_kept <= num_keys.
  Threshold<Key> (*find_threshold)(const Key* keys, int64_t num_keys, int64_t num_kept);
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
