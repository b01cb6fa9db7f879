// What cross_entropy.cpp plans, and the kernels of one instruction set carry out: plain data and function pointers, so
// that code compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "numbers.h"

namespace stamp::cpu {

// Rows of a matrix in memory, strides in elements; the columns are contiguous.
struct MatrixRows {
  const void* data;
  DType dtype;
  int64_t row_stride;
};

// Some rows of hidden states against the classes of one softmax. Logits are kept transposed, classes by rows: the sums
// of the softmax then run along vectors, and all three products read their factors as they lie in memory. `scalar` is
// the compute type: float, double where dtype is kFloat64.
struct CrossEntropyBlock {
  int64_t num_rows;     // a multiple of kRowsPerVector; what is past the last row is 0
  int64_t width;        // of hidden
  int64_t row;          // scalars from a row of x, or of a gradient, to the next: the width in whole vectors
  int64_t num_classes;
  int64_t chunk_classes;
  const void* x;            // scalar [num_rows, row], zeros past the width
  const void* x_transposed;  // scalar [width, num_rows]
  MatrixRows weight;        // [num_classes, width]
  const void* bias;         // scalar [num_classes]; null: none
  double softcap;           // 0: none
  bool sum_logits;          // wanted for label smoothing
  void* logits;             // scalar [num_classes, num_rows]

  // Of each chunk of classes and row: [num_chunks, num_rows]
  void* chunk_max;
  void* chunk_sum;         // of exp(logit - chunk_max)
  void* chunk_sum_logits;

  // Gradient of the logits: probability_scale * p - offset, less label_weights at the labels.
  const void* lse;                // scalar [num_rows]; +inf where a row does not count
  const void* probability_scale;  // scalar [num_rows]
  const void* offset;             // scalar [num_rows]
  int64_t num_labels;             // per row
  const int64_t* labels;          // [num_labels, num_rows], from the first class; -1: none
  const void* label_weights;      // scalar [num_labels, num_rows]
  void* label_slopes;             // the same, memory for what the cap makes of a label's gradient

  void* grad_weight;  // scalar [num_classes, row], added to; null: not needed
  void* grad_bias;    // scalar [num_classes], added to; null: not needed
  void* grad_x;       // scalar [num_rows, row]; null: not needed
};

constexpr int64_t kRowsPerVector = 32;

struct CrossEntropyKernels {
  int64_t vector_width;
  // Of one thread that handles a chunk.
  int64_t (*scratch_bytes)(const CrossEntropyBlock&);
  // The rows [begin, end), of whole vectors, of x and x_transposed: those of hidden that `rows` names, 0 from
  // `num_given` on.
  void (*load_x)(
      const CrossEntropyBlock&, const MatrixRows& hidden, const int64_t* rows, int64_t num_given, int64_t begin,
      int64_t end);
  // Logits of one chunk of classes, and what its softmax needs of them.
  void (*logits)(const CrossEntropyBlock&, int64_t chunk, char* scratch);
  // Logits of one chunk become their gradient; grad_weight and grad_bias of its classes.
  void (*gradients)(const CrossEntropyBlock&, int64_t chunk);
  // grad_x of some rows, from the gradients of all logits.
  void (*gradient_of_rows)(const CrossEntropyBlock&, int64_t begin, int64_t end, char* scratch);
};

extern const CrossEntropyKernels kCrossEntropyPortable;
extern const CrossEntropyKernels kCrossEntropyPortableFloat64;
#if defined(__x86_64__)
extern const CrossEntropyKernels kCrossEntropyAvx2;
extern const CrossEntropyKernels kCrossEntropyAvx512;
#endif

// The kernels for a dtype on this machine, see chosen_capability().
const CrossEntropyKernels& cross_entropy_kernels(DType dtype);

}  // namespace stamp::cpu
