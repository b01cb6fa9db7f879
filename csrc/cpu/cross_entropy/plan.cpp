#include "cpu/cross_entropy/plan.h"

#include <algorithm>

#include "cpu/core/arithmetic.h"
#include "cpu/cross_entropy/kernels.h"

namespace stamp::cpu {
namespace {

// All of these decide the order of sums: another value gives other bits.

// A tile of logits stays in the L2 cache, together with the weight of its classes and the hidden states of its rows.
// Wide rows do not fit beside the tile, but a chunk of fewer classes would add to the rows' gradients more often (17 %
// of the time at width 1,024).
constexpr int64_t kRowsPerBlock = 128;
constexpr int64_t kMinClassesPerChunk = 64, kMaxClassesPerChunk = 128;

// Class splits. With few classes each one is a single chunk. Every class split has memory for its contribution to the
// rows' gradients: wide rows allow fewer splits, down to kMinClassSplits, so that there is still work to share.
constexpr int64_t kSplitsOfFewClasses = 8;
constexpr int64_t kMinClassSplits = 4, kMaxClassSplits = 16;
constexpr int64_t kMaxGradHiddenBytes = 16 << 20;

// The kept logits of a row chunk should stay in the L2 caches of the threads that share it, two or more of them where
// threads share class splits.
constexpr int64_t kMaxLogitBytesPerThread = 512 << 10;
constexpr int64_t kMaxRowsPerChunk = 4 * kRowsPerBlock;
// Where the logits of a single row block do not fit, a row chunk is one larger block: it reads the weight and its
// gradient less often (5 % of the time of 32,768 classes). To bound the memory it has no more than this share of the
// rows, and so of all logits.
constexpr int64_t kMaxRowsOfLargeBlock = 2 * kRowsPerBlock, kLargeBlocksInAllRows = 18;
// With few rows a row chunk has most of them, and its logits are most of all logits. Above this size they are computed
// again instead.
constexpr int64_t kMaxLogitBytesOfMostRows = 64 << 20;

// Row splits are used where enough of them have a small gradient of the weight, and where the logits of a row block are
// small: to wake a thread can take 0.1 ms, a third of the time of 128 rows and 1,024 classes.
constexpr int64_t kMaxGradWeightBytes = 4 << 20;
constexpr int64_t kMinRowSplits = 8, kMaxRowSplits = 16;
constexpr int64_t kMinRowsPerSplit = 64;

constexpr int64_t round_down(int64_t n, int64_t multiple) {
  return n / multiple * multiple;
}

// Of a row of a gradient; at least one scalar, since other sizes are quotients by it.
int64_t row_bytes(const SoftmaxSizes& sizes) {
  return std::max<int64_t>(sizes.padded_width, 1) * sizes.scalar_bytes;
}

int64_t max_row_splits(const SoftmaxSizes& sizes) {
  const int64_t max_by_memory = kMaxGradWeightBytes / (sizes.num_classes * row_bytes(sizes));
  const int64_t block_logit_bytes = kRowsPerBlock * sizes.num_classes * sizes.scalar_bytes;
  if (max_by_memory < kMinRowSplits || block_logit_bytes > kMaxLogitBytesPerThread) {
    return 1;
  }
  return std::min(max_by_memory, kMaxRowSplits);
}

void split_rows(const SoftmaxSizes& sizes, CrossEntropyPlan& plan) {
  const int64_t num_splits = std::clamp(sizes.num_rows / kMinRowsPerSplit, int64_t{1}, max_row_splits(sizes));
  if (num_splits == 1) {
    plan.num_row_splits = 1;
    plan.rows_per_split = sizes.num_rows;
    return;
  }
  plan.rows_per_split = round_up(divide_up(sizes.num_rows, num_splits), kRowMultiple);
  plan.num_row_splits = divide_up(sizes.num_rows, plan.rows_per_split);  // fewer than num_splits after rounding up
}

void split_classes(const SoftmaxSizes& sizes, CrossEntropyPlan& plan) {
  const int64_t of_few_classes = round_up(divide_up(sizes.num_classes, kSplitsOfFewClasses), kMinClassesPerChunk);
  if (of_few_classes <= kMaxClassesPerChunk) {
    plan.classes_per_split = plan.classes_per_chunk = of_few_classes;
  } else {
    const int64_t max_splits =
        std::clamp(kMaxGradHiddenBytes / (kRowsPerBlock * row_bytes(sizes)), kMinClassSplits, kMaxClassSplits);
    plan.classes_per_chunk = kMaxClassesPerChunk;
    plan.classes_per_split = round_up(divide_up(sizes.num_classes, max_splits), kMaxClassesPerChunk);
  }
  if (plan.num_row_splits > 1) {
    plan.classes_per_split = round_up(sizes.num_classes, plan.classes_per_chunk);
  }
  plan.num_class_splits = divide_up(sizes.num_classes, plan.classes_per_split);
}

// The row chunks and row blocks of a row split.
void chunk_rows(const SoftmaxSizes& sizes, CrossEntropyPlan& plan) {
  const int64_t max_by_grad_hidden = kMaxGradHiddenBytes / (plan.num_class_splits * row_bytes(sizes));
  int64_t rows_per_chunk = std::min(kMaxRowsPerChunk, max_by_grad_hidden);
  int64_t rows_per_block = kRowsPerBlock;
  if (plan.keeps_logits) {
    const int64_t num_caches = plan.num_row_splits > 1 ? 1 : 2;
    const int64_t max_logit_bytes = num_caches * kMaxLogitBytesPerThread;
    rows_per_chunk = std::min(rows_per_chunk, max_logit_bytes / (sizes.num_classes * sizes.scalar_bytes));
    if (rows_per_chunk < kRowsPerBlock) {
      const int64_t share_of_rows = plan.rows_per_split / kLargeBlocksInAllRows;
      const int64_t large_block =
          round_down(std::min({share_of_rows, kMaxRowsOfLargeBlock, max_by_grad_hidden}), kRowMultiple);
      rows_per_chunk = rows_per_block = std::max(large_block, kRowsPerBlock);
    }
  }
  const int64_t max_rows = round_up(std::max<int64_t>(plan.rows_per_split, 1), kRowMultiple);
  plan.rows_per_block = std::min(rows_per_block, max_rows);
  const int64_t blocks_per_chunk = std::max<int64_t>(rows_per_chunk / plan.rows_per_block, 1);
  plan.rows_per_chunk = std::min(blocks_per_chunk * plan.rows_per_block, max_rows);
}

bool keeps_too_many_logits(const SoftmaxSizes& sizes, const CrossEntropyPlan& plan) {
  const bool has_most_rows = 2 * plan.rows_per_chunk > plan.rows_per_split;
  return plan.num_row_splits == 1 && has_most_rows &&
      plan.rows_per_chunk * sizes.num_classes * sizes.scalar_bytes > kMaxLogitBytesOfMostRows;
}

}  // namespace

CrossEntropyPlan plan_cross_entropy(const SoftmaxSizes& sizes) {
  CrossEntropyPlan plan = {};
  // To compute the logits again instead, a third more of the arithmetic for far less memory traffic, took 11 to 28 %
  // longer, for 32,768 to 1,024 classes on cores of 105 GFLOP/s.
  plan.keeps_logits = sizes.needs_gradients && !sizes.has_lse;
  split_rows(sizes, plan);
  split_classes(sizes, plan);
  chunk_rows(sizes, plan);
  if (plan.keeps_logits && keeps_too_many_logits(sizes, plan)) {
    plan.keeps_logits = false;
    chunk_rows(sizes, plan);
  }
  if (plan.keeps_logits) {
    plan.logits_size = round_up(plan.rows_per_chunk, plan.rows_per_block) * sizes.num_classes;
  }
  plan.grad_hidden_splits_size = plan.num_class_splits * plan.rows_per_chunk * sizes.padded_width;
  if (plan.num_row_splits > 1) {
    plan.grad_weight_splits_size = plan.num_row_splits * sizes.num_classes * sizes.padded_width;
  }
  return plan;
}

}  // namespace stamp::cpu
