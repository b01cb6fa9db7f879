#include "cpu/attention/arguments.h"

#include <cmath>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/attention/relative_bias.h"

namespace stamp::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256, kHeadDimMultiple = 8;
constexpr int64_t kTileRows = 64;  // of a tile list

void check_rows(const AttentionArguments& arguments) {
  const Tensor &q = arguments.q, &k = arguments.k;
  check_tensor("q", q, {"total_q", "num_heads", "head_dim"}, kFloatingDTypes);
  const int64_t num_heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(
      head_dim % kHeadDimMultiple == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, "q: head_dim must be a multiple of ",
      kHeadDimMultiple, " from ", kHeadDimMultiple, " to ", kMaxHeadDim, ", got ", head_dim);
  const bool is_cross = arguments.sequences.cu_seqlens_k.has_value();
  check_tensor("k", k, {is_cross ? Size("total_k") : Size(q.size(0)), "num_heads_kv", head_dim}, {q.scalar_type()});
  const int64_t num_heads_kv = k.size(1);
  STD_TORCH_CHECK(
      num_heads_kv > 0 && num_heads % num_heads_kv == 0, "k: num_heads_kv must divide the ", num_heads,
      " heads of q, got ", num_heads_kv);
  if (arguments.v.has_value()) {
    check_tensor("v", *arguments.v, {k.size(0), num_heads_kv, head_dim}, {q.scalar_type()});
  }
}

void check_bias(const BiasArguments& bias, const Tensor& q, const Tensor& k) {
  if (bias.positions_q.has_value()) {
    check_tensor("positions_q", *bias.positions_q, {q.size(0)}, {ScalarType::Int});
  }
  if (bias.positions_k.has_value()) {
    check_tensor("positions_k", *bias.positions_k, {k.size(0)}, {ScalarType::Int});
  }
  if (!bias.table.has_value()) {
    return;
  }
  check_tensor("bias_table", *bias.table, {"num_buckets", q.size(1)}, kFloatingDTypes);
  const int64_t num_buckets = bias.table->size(0), directions = bias.bidirectional ? 2 : 1;
  const int64_t num_exact = num_buckets / directions / 2;
  STD_TORCH_CHECK(
      num_buckets % directions == 0 && num_exact >= 1, "bias_table must have at least ", 2 * directions, " rows in ",
      directions, " equal parts, got ", num_buckets);
  STD_TORCH_CHECK(
      bias.max_distance > num_exact, "bias_max_distance must exceed the ", num_exact, " exact distances, got ",
      bias.max_distance);
}

void check_tiles(const char* name, const std::optional<Tensor>& tiles, int64_t total, int64_t num_sequences) {
  if (tiles.has_value()) {
    check_tensor(name, *tiles, {total / kTileRows + num_sequences, 2}, {ScalarType::Int});
  }
}

}  // namespace

HeadRows head_rows(const Tensor& x, std::vector<Tensor>& held) {
  const Tensor x_rows = x.stride(2) == 1 ? x : held_contiguous(x, held);
  HeadRows rows;
  rows.data = const_cast<void*>(x_rows.const_data_ptr());
  rows.row_stride = x_rows.stride(0);
  rows.head_stride = x_rows.stride(1);
  return rows;
}

HeadRows rows_like_q(const char* name, const Tensor& x, const Tensor& q, std::vector<Tensor>& held) {
  check_tensor(name, x, {q.size(0), q.size(1), q.size(2)}, {q.scalar_type()});
  return head_rows(x, held);
}

const void* lse_of(const Tensor& lse, AttentionInputs& inputs) {
  const AttentionProblem& problem = inputs.problem;
  check_tensor("lse", lse, {problem.num_heads, problem.total_q}, {compute_type(problem.dtype)});
  return held_contiguous(lse, inputs.held).const_data_ptr();
}

const uint8_t* query_mask_of(const char* name, const std::optional<Tensor>& query_mask, AttentionInputs& inputs) {
  if (!query_mask.has_value()) {
    return nullptr;
  }
  check_tensor(name, *query_mask, {inputs.problem.total_q}, kMaskDTypes);
  return static_cast<const uint8_t*>(held_contiguous(*query_mask, inputs.held).const_data_ptr());
}

AttentionInputs attention_inputs(const AttentionArguments& arguments) {
  const Tensor &q = arguments.q, &k = arguments.k;
  check_rows(arguments);
  check_bias(arguments.bias, q, k);
  AttentionInputs inputs = {};
  AttentionProblem& problem = inputs.problem;
  problem.dtype = dtype_of(q);
  problem.head_dim = q.size(2);
  problem.num_heads = q.size(1);
  problem.num_heads_kv = k.size(1);
  problem.gqa_group_size = q.size(1) / k.size(1);
  problem.total_q = q.size(0);
  problem.total_k = k.size(0);
  problem.q = head_rows(q, inputs.held);
  problem.k = head_rows(k, inputs.held);
  if (arguments.v.has_value()) {
    problem.v = head_rows(*arguments.v, inputs.held);
  }
  problem.causal = arguments.causal;
  STD_TORCH_CHECK(
      std::isfinite(in_compute_type(problem.dtype, arguments.scale)), "scale must be finite, got ", arguments.scale);
  problem.scale = arguments.scale;

  const SequenceArguments& sequences = arguments.sequences;
  const BiasArguments& bias = arguments.bias;
  check_at_least("max_seqlen_q", sequences.max_seqlen_q, 0);
  check_at_least("max_seqlen_k", sequences.max_seqlen_k, 0);
  const Tensor cu_seqlens_q =
      checked_cu_seqlens("cu_seqlens_q", sequences.cu_seqlens_q, problem.total_q, sequences.max_seqlen_q, inputs.held);
  problem.num_sequences = cu_seqlens_q.size(0) - 1;
  problem.cu_seqlens_q = problem.cu_seqlens_k = cu_seqlens_q.const_data_ptr<int32_t>();
  if (bias.positions_q.has_value()) {
    problem.bias.positions_q = held_contiguous(*bias.positions_q, inputs.held).const_data_ptr<int32_t>();
  }
  if (sequences.cu_seqlens_k.has_value()) {
    check_shape("cu_seqlens_k", *sequences.cu_seqlens_k, {problem.num_sequences + 1});
    const Tensor cu_seqlens_k = checked_cu_seqlens(
        "cu_seqlens_k", *sequences.cu_seqlens_k, problem.total_k, sequences.max_seqlen_k, inputs.held);
    problem.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  } else {
    problem.bias.positions_k = problem.bias.positions_q;
  }
  if (bias.positions_k.has_value()) {
    problem.bias.positions_k = held_contiguous(*bias.positions_k, inputs.held).const_data_ptr<int32_t>();
  }
  check_tiles("tiles_q", sequences.tiles_q, problem.total_q, problem.num_sequences);
  check_tiles("tiles_k", sequences.tiles_k, problem.total_k, problem.num_sequences);
  problem.longest_q = longest(problem.cu_seqlens_q, problem.num_sequences);
  problem.longest_k = longest(problem.cu_seqlens_k, problem.num_sequences);
  if (bias.table.has_value()) {
    set_relative_bias(inputs, bias);
  }
  return inputs;
}

void set_dropout(AttentionProblem& problem, const DropoutArguments& arguments) {
  STD_TORCH_CHECK(arguments.p >= 0 && arguments.p < 1, "dropout_p must be in [0, 1), got ", arguments.p);
  if (arguments.seed.has_value()) {
    check_tensor("dropout_seed", *arguments.seed, {1}, {ScalarType::Long});
  }
  if (arguments.p == 0) {
    return;
  }
  STD_TORCH_CHECK(arguments.seed.has_value(), "dropout_p ", arguments.p, " needs a dropout_seed");
  const uint64_t seed = static_cast<uint64_t>(*arguments.seed->const_data_ptr<int64_t>());
  problem.dropout.is_active = true;
  problem.dropout.threshold = static_cast<uint32_t>(arguments.p * 4294967296.0);
  problem.dropout.seed_low = static_cast<uint32_t>(seed);
  problem.dropout.seed_high = static_cast<uint32_t>(seed >> 32);
  problem.dropout.keep_scale = 1.0 / (1.0 - arguments.p);
}

}  // namespace stamp::cpu
