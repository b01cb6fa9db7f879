// What cross_entropy.cpp plans, and the kernels of one instruction set carry out: plain data and function pointers, so
// that code compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "cpu/core/dtypes.h"

namespace stamp::cpu {

// Rows of a matrix in memory, strides in elements; the columns are contiguous.
struct MatrixRows {
  const void* data;
  DType dtype;
  int64_t row_stride;
};

// Some rows of hidden states, a group, against the classes of one softmax. Classes are cut into slices, which are what
// threads share, and slices into chunks; rows into blocks. A block of rows against a chunk of classes is a tile of
// logits, which stays in the second cache with all that is computed from it. Logits are kept transposed, classes by
// rows: the sums of the softmax then run along vectors, and all products read their factors as they lie in memory.
// `scalar` is the compute type: float, double where dtype is kFloat64.
//
// "Panels" are the layout of the right factor of a product, see RightMatrix.
struct CrossEntropyGroup {
  int64_t num_rows;    // a multiple of kRowsPerVector; what is past the last row is 0
  int64_t block_rows;  // a multiple of kRowsPerVector
  int64_t width;       // of hidden
  int64_t row;         // scalars from a row of a gradient to the next: the width in whole vectors
  int64_t num_classes;
  int64_t slice_classes;  // a multiple of chunk_classes
  int64_t chunk_classes;
  void* x;             // scalar [num_rows, width] in panels of columns, zeros past the width
  void* x_transposed;  // scalar [width, num_rows] in panels of rows
  MatrixRows weight;   // [num_classes, width]
  const void* bias;    // scalar [num_classes]; null: none
  double softcap;      // 0: none
  bool sum_logits;     // wanted for label smoothing
  void* logits;        // scalar [num_blocks, num_classes, block_rows]; null: not kept. What is kept without a softcap is
                       // exp(logit - chunk_max): an exponential less for the gradients
  void* chunk_max;     // scalar [num_chunks, num_rows], where logits are kept
  int64_t num_labels;     // per row
  const int64_t* labels;  // [num_labels, num_rows], from the first class; -1: none
  void* label_logits;     // scalar [num_labels, num_rows]

  // Of each slice and row: [num_slices, num_rows]
  void* slice_max;
  void* slice_sum;         // of exp(logit - slice_max)
  void* slice_sum_logits;

  // Gradient of the logits: probability_scale * p - offset, less label_weights at the labels.
  const void* lse;                // scalar [num_rows]; +inf where a row does not count
  const void* probability_scale;  // scalar [num_rows]
  const void* offset;             // scalar [num_rows]
  const void* label_weights;      // scalar [num_labels, num_rows]

  void* grad_weight;  // scalar [num_classes, row], added to; null: not needed
  void* grad_bias;    // scalar [num_classes], added to; null: not needed
  void* grad_x;       // scalar [num_slices, num_rows, row], each slice's part; null: not needed
};

constexpr int64_t kRowsPerVector = 32;

struct CrossEntropyKernels {
  int64_t vector_width;
  int64_t panel_width;
  // Of one thread.
  int64_t (*scratch_bytes)(const CrossEntropyGroup&);
  // The rows [begin, begin + kRowsPerVector) of x and x_transposed: those of hidden that `rows` names, 0 from
  // `num_given` on.
  void (*load_x)(
      const CrossEntropyGroup&, const MatrixRows& hidden, const int64_t* rows, int64_t num_given, int64_t begin,
      char* scratch);
  // What the softmax needs of the logits of one slice, and the logits of the labels in it.
  void (*sums)(const CrossEntropyGroup&, int64_t slice, char* scratch);
  // From the logits of one slice their gradients, to grad_weight and grad_bias of its classes and to its grad_x.
  void (*gradients)(const CrossEntropyGroup&, int64_t slice, char* scratch);
};

// The kernels for a dtype on this machine.
const CrossEntropyKernels& cross_entropy_kernels(DType dtype);

}  // namespace stamp::cpu
