// What the worker fills in and the kernels of one instruction set carry out: plain data and function pointers, so that
// code compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "cpu/core/dtypes.h"

namespace stamp::cpu {

// The kernels take rows in multiples of this: the panels of the widest vectors (matrix_product.h) have 32 columns, and
// panels of hidden transposed have a column for each row.
constexpr int64_t kRowMultiple = 32;

// Rows of a matrix in memory. The columns are contiguous.
struct MatrixRows {
  const void* data;
  DType dtype;
  int64_t row_stride;  // in elements
};

// A row chunk of hidden states against all classes of one softmax. plan.h says how rows and classes are divided.
//
// Logits are stored transposed, [classes, rows]: the sums of the softmax then run along vectors, and every product
// reads its factors in the order in which they are in memory. "In panels" is the layout of the right factor of a
// product, see RightMatrix. `scalar` is the compute type: float, or double where dtype is kFloat64.
struct CrossEntropyRowChunk {
  // Sizes
  int64_t num_rows;        // a multiple of kRowMultiple; rows past the last one that is given are 0
  int64_t rows_per_block;  // a multiple of kRowMultiple
  int64_t width;           // of hidden
  int64_t padded_width;    // the width in whole vectors, in which gradients are stored
  int64_t num_classes;
  int64_t classes_per_split;  // a multiple of classes_per_chunk
  int64_t classes_per_chunk;
  int64_t num_targets;  // per row: one for each step that shares the softmax

  // Inputs
  void* hidden;             // scalar [num_rows, width] in panels of columns, zeros past the width
  void* hidden_transposed;  // scalar [width, num_rows] in panels of rows
  MatrixRows weight;        // [num_classes, width]
  const void* bias;         // scalar [num_classes]; null: none
  double softcap;           // 0: none
  const int64_t* targets;   // [num_targets, num_rows], counted from the first class; -1: none

  // What the sums leave for the gradients; null: the gradients compute the logits again.
  void* logits;           // scalar [num_row_blocks, num_classes, rows_per_block]; without a softcap exp(logit -
                          // class_chunk_max) takes their place, which saves the gradients an exponential
  void* class_chunk_max;  // scalar [num_class_chunks, num_rows]

  // Results of the sums
  void* target_logits;           // scalar [num_targets, num_rows]
  void* class_split_max;         // scalar [num_class_splits, num_rows]
  void* class_split_sum;         // scalar [num_class_splits, num_rows], of exp(logit - class_split_max)
  void* class_split_sum_logits;  // scalar [num_class_splits, num_rows]
  bool needs_sum_logits;         // for label smoothing

  // The gradient of the logits is probability_scale * p - offset, minus target_weights at the targets.
  const void* lse;                // scalar [num_rows]; +inf where a row does not count
  const void* probability_scale;  // scalar [num_rows]
  const void* offset;             // scalar [num_rows]
  const void* target_weights;     // scalar [num_targets, num_rows]

  // Results of the gradients; null: not needed.
  void* grad_weight;         // scalar [num_classes, padded_width], added to
  void* grad_bias;           // scalar [num_classes], added to
  void* grad_hidden_splits;  // scalar [num_class_splits, num_rows, padded_width]: what each class split contributes
};

struct CrossEntropyKernels {
  int64_t vector_width;
  int64_t panel_width;
  // Scratch memory of one thread.
  int64_t (*scratch_bytes)(const CrossEntropyRowChunk&);
  // Fills the rows [start, start + kRowMultiple) of hidden and hidden_transposed: row i is row rows[i] of `from`, or 0
  // from i = num_given on.
  void (*load_hidden)(
      const CrossEntropyRowChunk&, const MatrixRows& from, const int64_t* rows, int64_t num_given, int64_t start,
      char* scratch);
  // The results of the sums, for the classes of one class split.
  void (*sums)(const CrossEntropyRowChunk&, int64_t class_split, char* scratch);
  // The results of the gradients, for the classes of one class split.
  void (*gradients)(const CrossEntropyRowChunk&, int64_t class_split, char* scratch);
};

// The kernels for a dtype on this machine.
const CrossEntropyKernels& cross_entropy_kernels(DType dtype);

}  // namespace stamp::cpu
