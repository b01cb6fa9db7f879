// The interface between the attention ops, which plan the work, and the kernels of one instruction set, which do it:
// plain data and function pointers, so that code compiled for AVX-512 shares nothing else with the portable code.
//
// Names here and in the kernels: first_* is the first row of a sequence in the packed batch, start_* and end_* bound a
// tile or a block by local index in its sequence, num_* is a count. Strides are in elements. The compute type is float,
// or double for float64.

#pragma once

#include <cstdint>

#include "cpu/core/dtypes.h"

namespace stamp::cpu {

// [rows, heads, head_dim] with a contiguous last dimension.
struct HeadRows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// The relative position bias, tabulated by entries. An entry is a distance position_k - position_q, clamped to
// +-max_distance and counted from -max_distance; or, where positions lie too far apart for that, a bucket.
struct RelativeBias {
  const void* of_entry;  // [num_heads, num_entries] in the compute type; null: no bias
  int64_t num_entries;
  const int32_t* bucket_of_entry;  // [num_entries]
  int64_t max_distance;
  int64_t num_buckets;
  const int32_t* positions_q;  // [total_q]; null: the index in the sequence
  const int32_t* positions_k;  // [total_k]; null: the index in the sequence
  // The first distance of each bucket of one direction [num_buckets_of_direction], rising; null: entries are distances.
  const int32_t* first_distance_of_bucket;
  int64_t num_buckets_of_direction;
  bool is_bidirectional;
};

// The weight of (sequence, head, query, key) is dropped where its Philox word is below the threshold.
struct Dropout {
  bool is_active;
  uint32_t threshold;
  uint32_t seed_low;
  uint32_t seed_high;
  double keep_scale;  // 1 / (1 - p)
};

// What forward, backward and centrality have in common.
struct AttentionProblem {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t head_dim;
  int64_t num_heads;  // of q
  int64_t num_heads_kv;
  int64_t gqa_group_size;  // num_heads / num_heads_kv
  int64_t total_q;
  int64_t total_k;
  int64_t num_sequences;
  int64_t longest_q;  // the longest sequence, which decides the size of scratch memory
  int64_t longest_k;
  HeadRows q;
  HeadRows k;
  HeadRows v;
  const int32_t* cu_seqlens_q;  // [num_sequences + 1]
  const int32_t* cu_seqlens_k;  // [num_sequences + 1]
  double scale;
  bool causal;
  RelativeBias bias;
  Dropout dropout;
};

// The work that one thread does at a time: KV heads [first_head_kv, end_head_kv) with the query heads that share them,
// of whole sequences [first_sequence, end_sequence) or of one split of a single sequence. A split is the rows
// [begin, end) of the sequence's queries (forward) or keys (backward, centrality).
struct AttentionTask {
  int64_t first_sequence;
  int64_t end_sequence;
  int64_t first_head_kv;
  int64_t end_head_kv;
  int64_t begin;
  int64_t end;
  int64_t split;             // backward: the index of the split in its sequence
  int64_t first_dbias_head;  // backward: the task's first row in dbias_by_task
  int64_t cost;
};

struct ForwardPass {
  AttentionProblem problem;
  HeadRows out;
  void* lse;                  // [num_heads, total_q], compute type
  void* centrality_by_head;   // [num_heads_kv, total_k], compute type; null: not asked for
  const uint8_t* query_mask;  // [total_q]; null: every query counts
};

struct BackwardPass {
  AttentionProblem problem;
  HeadRows out;
  HeadRows grad_out;
  const void* lse;  // [num_heads, total_q], compute type
  HeadRows dq;      // data null: not needed
  HeadRows dk;
  HeadRows dv;
  // A sequence with more than kKeysPerBlock keys has a dQ of its own for each split of the keys:
  // [splits, queries of the sequence, num_heads, head_dim] in the compute type, from element
  // dq_splits_offset[sequence].
  void* dq_splits;
  const int64_t* dq_splits_offset;  // [num_sequences]
  double* dbias_by_task;            // [query heads of all tasks, num_buckets]; null: not needed
};

struct CentralityPass {
  AttentionProblem problem;
  const void* lse;            // [num_heads, total_q], compute type
  const uint8_t* query_mask;  // [total_q]; null: every query counts
  void* centrality;           // [total_k], compute type
  bool skip_fused;            // leave out the sequences whose centrality the forward pass has computed
};

// Block sizes. The bits of a result depend on them, so they are the same for every instruction set.
constexpr int64_t kQueriesPerTile = 64;        // rows of a tile of scores
constexpr int64_t kQueriesPerTask = 512;       // forward: a longer sequence is split
constexpr int64_t kKeysPerForwardBlock = 512;  // columns of a tile of scores
constexpr int64_t kKeysPerBlock = 256;  // the same in backward and centrality, where more matrices share the cache

// Within these bounds the forward pass sees whole rows of the softmax, so it can compute the centrality too.
static constexpr bool centrality_is_fused(int64_t num_queries, int64_t num_keys) {
  return num_queries <= kQueriesPerTask && num_keys <= kKeysPerForwardBlock;
}

struct AttentionKernels {
  int64_t (*forward_scratch_bytes)(const ForwardPass&);
  void (*forward)(const ForwardPass&, const AttentionTask&, char* scratch);
  int64_t (*backward_scratch_bytes)(const BackwardPass&);
  void (*backward)(const BackwardPass&, const AttentionTask&, char* scratch);
  int64_t (*centrality_scratch_bytes)(const CentralityPass&);
  void (*centrality)(const CentralityPass&, const AttentionTask&, char* scratch);
};

// The kernels for a dtype on this machine.
const AttentionKernels& attention_kernels(DType dtype);

}  // namespace stamp::cpu
