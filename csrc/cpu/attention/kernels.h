// What attention.cpp and importance.cpp plan, and the kernels of one instruction set carry out: plain data and function
// pointers, so that code compiled for AVX-512 shares nothing else with the portable code.

#pragma once

#include <cstdint>

#include "cpu/core/numbers.h"

namespace stamp::cpu {

// [rows, heads, head_dim] with a contiguous last dimension; strides in elements.
struct HeadRows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// What forward, backward and centrality have in common. `compute type` is float, double where dtype is kFloat64.
struct AttentionProblem {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t head_dim;
  int64_t num_heads;    // of q
  int64_t num_heads_kv;  // divides num_heads
  int64_t total_q;
  int64_t longest_q;  // lengths of the longest sequences, to size scratch memory by
  int64_t longest_k;
  HeadRows q;
  HeadRows k;
  HeadRows v;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  double scale;
  bool causal;

  // Relative bias by the distance position_k - position_q, clamped to [-max_distance, max_distance].
  const void* bias_of_distance;  // [num_heads, 2 * max_distance + 1] in the compute type; null: no bias
  const int32_t* bucket_of_distance;  // [2 * max_distance + 1]
  int64_t max_distance;
  int64_t num_buckets;
  const int32_t* positions_q;  // null: the index in the sequence, for keys too
  const int32_t* positions_k;

  // Dropout: the weight of (sequence, head, query, key) is dropped where its Philox word is below `dropout_threshold`.
  bool dropout;
  uint32_t dropout_threshold;
  uint32_t seed_low;
  uint32_t seed_high;
  double keep_scale;  // 1 / (1 - p)
};

// A piece of work that one thread does, for the key heads [first_head_kv, end_head_kv) and the query heads that share
// them: the sequences [first_sequence, end_sequence), whole, or a part of a single one, the rows [begin, end) of its
// queries (forward) or of its keys (backward, centrality).
struct AttentionUnit {
  int64_t first_sequence;
  int64_t end_sequence;
  int64_t first_head_kv;
  int64_t end_head_kv;
  int64_t begin;
  int64_t end;
  int64_t part;        // backward: which of its sequence's parts this is
  int64_t first_head;  // backward: the units' query heads counted through, the first of this one
  int64_t cost;
};

struct ForwardPass {
  AttentionProblem problem;
  HeadRows out;
  void* lse;                   // [num_heads, total_q], compute type
  void* centrality_by_head;    // [num_heads_kv, total_k], compute type; null: not asked for
  int64_t total_k;
  const uint8_t* query_mask;   // [total_q]; null: every query votes
};

struct BackwardPass {
  AttentionProblem problem;
  HeadRows out;
  HeadRows grad_out;
  const void* lse;
  HeadRows dq;  // data null: not needed
  HeadRows dk;
  HeadRows dv;
  // Sequences with more keys than kKeysPerBlock gather dq part by part: [parts, queries of the sequence, num_heads,
  // head_dim] in the compute type, from element dq_parts_offset[sequence] on.
  void* dq_parts;
  const int64_t* dq_parts_offset;
  double* dbias_by_unit;  // [query heads of all units, num_buckets]; null: not needed
};

struct CentralityPass {
  AttentionProblem problem;
  const void* lse;             // [num_heads, total_q]
  const uint8_t* query_mask;   // [total_q]; null: every query votes
  void* centrality;            // [total_k], compute type
  bool without_fused;          // leave out the sequences that the forward pass has served
};

// Blocks of a sequence. They are part of what the bits of a result depend on, so they are the same everywhere.
constexpr int64_t kQueriesPerTile = 64;       // rows of a tile of scores
constexpr int64_t kQueriesPerUnit = 512;      // forward: a longer sequence is divided
constexpr int64_t kKeysPerForwardBlock = 512;  // columns of a tile of scores
constexpr int64_t kKeysPerBlock = 256;        // the same, backward and centrality: more matrices share the cache

// The forward pass sees whole rows of the softmax, and can add up the centrality, of sequences within these bounds.
constexpr bool centrality_is_fused(int64_t num_queries, int64_t num_keys) {
  return num_queries <= kQueriesPerUnit && num_keys <= kKeysPerForwardBlock;
}

struct AttentionKernels {
  int64_t (*forward_scratch_bytes)(const ForwardPass&);
  void (*forward)(const ForwardPass&, const AttentionUnit&, char* scratch);
  int64_t (*backward_scratch_bytes)(const BackwardPass&);
  void (*backward)(const BackwardPass&, const AttentionUnit&, char* scratch);
  int64_t (*centrality_scratch_bytes)(const CentralityPass&);
  void (*centrality)(const CentralityPass&, const AttentionUnit&, char* scratch);
};

// Scratch memory begins at a multiple of this.
constexpr int64_t kScratchAlignment = 64;

// The kernels for a dtype on this machine.
const AttentionKernels& attention_kernels(DType dtype);

}  // namespace stamp::cpu
