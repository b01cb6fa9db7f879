// How one softmax of the cross-entropy is divided, among threads and for the caches: sizes in, sizes out.
//
//   rows:     row splits    > row chunks > row blocks       (">": are divided into)
//   classes:  class splits  > class chunks
//
// A row block against a class chunk is a tile of logits, the unit of the kernels.
//
// Threads share a softmax in one of two ways:
// - few classes: row splits. Each has its own gradient of the weight; these are added in order at the end. Threads
//   wait for each other twice in a softmax.
// - many classes: class splits, for the sums and for the gradients of each row chunk. A class split computes the
//   gradients of its own classes and contributes to the rows' gradients; the contributions are added in order.
//
// The number of threads is not an argument: the division decides the order of sums, and a result must have the same
// bits for any number of threads.

#pragma once

#include <cstdint>

namespace stamp::cpu {

struct SoftmaxSizes {
  int64_t num_rows;      // with a target
  int64_t num_classes;   // at least 1
  int64_t padded_width;  // of hidden, in whole vectors
  int64_t scalar_bytes;  // of a number in the compute type
  bool needs_gradients;
  bool has_lse;  // from an earlier pass: no sums to compute
};

struct CrossEntropyPlan {
  int64_t num_row_splits;     // 1: threads share the class splits; otherwise each thread takes one row split at a time
  int64_t rows_per_split;     // a multiple of kRowMultiple where there are several
  int64_t rows_per_chunk;     // a multiple of kRowMultiple
  int64_t rows_per_block;     // a multiple of kRowMultiple
  int64_t num_class_splits;   // 1 where threads share the rows
  int64_t classes_per_split;  // a multiple of classes_per_chunk
  int64_t classes_per_chunk;
  bool keeps_logits;  // of a row chunk, from the sums to the gradients

  // Memory in scalars. That of gradients is only allocated where they are needed.
  int64_t logits_size;              // [num_row_blocks, num_classes, rows_per_block] of each worker; 0: not kept
  int64_t grad_hidden_splits_size;  // [num_class_splits, rows_per_chunk, padded_width] of each worker
  int64_t grad_weight_splits_size;  // [num_row_splits, num_classes, padded_width]; 0 where threads share class splits
};

CrossEntropyPlan plan_cross_entropy(const SoftmaxSizes& sizes);

}  // namespace stamp::cpu
