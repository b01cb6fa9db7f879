// Selection on the device: which items of every sequence stay, in their original order.
//
// An item is `codes_per_item` consecutive tokens from the start of its sequence on; it scores the sum of its tokens.
// Scores become unsigned keys of the same order, and the best k items are those above a threshold and the first ones of
// those that equal it. The threshold is searched with counts, and what stays is compacted by ballots: nothing is
// sorted, and no order of execution matters. Lengths are read on the device alone; the host knows an upper bound of
// them.
//
//   count_protected_kernel   num_protected [batch], where tokens are protected
//   kept_offsets_kernel      cu_seqlens_kept [batch + 1]
//   select_tokens_kernel     indices, inverse, indices in the sequence

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/budget.h"
#include "cuda/core/numbers.cuh"
#include "cuda/core/warp.cuh"

namespace stamp::cuda {

struct SelectionProblem {
  const int32_t* cu_seqlens;     // [batch + 1]
  int32_t batch;
  int64_t total;                 // rows, tail rows included
  int64_t total_kept;            // rows that the result has room for
  int32_t codes_per_item;           // that of the budget in 32 bits
  Budget budget;
  const uint8_t* protect;        // [total]; null: nothing is protected
  const int32_t* num_protected;  // [batch], items; null with protect
  int32_t* cu_seqlens_kept;      // [batch + 1]
  int64_t* indices;              // [total_kept], -1 on tail rows
  int32_t* inverse;              // [total], -1 where a row is dropped
  int32_t* index_in_sequence;    // [total_kept] of every kept row, 0 on tail rows; null: not asked for
};

// One sequence, its rows counted in items.
struct SequenceItems {
  int32_t first_row;
  int32_t num_rows;
  int32_t num_items;  // tokens after the last whole item are dropped
  int32_t num_kept;   // items
};

__device__ inline SequenceItems items_of_sequence(const SelectionProblem& problem, int32_t sequence) {
  const int32_t first_row = __ldg(problem.cu_seqlens + sequence);
  const int32_t num_rows = __ldg(problem.cu_seqlens + sequence + 1) - first_row;
  const int32_t num_items = problem.codes_per_item == 1 ? num_rows : num_rows / problem.codes_per_item;
  const int64_t num_protected = problem.num_protected == nullptr ? 0 : __ldg(problem.num_protected + sequence);
  const int64_t kept = kept_items(problem.budget, sequence, num_items, num_protected);
  return {first_row, num_rows, num_items, static_cast<int32_t>(kept)};
}

__device__ inline bool item_is_protected(const SelectionProblem& problem, int64_t first_token) {
  bool is_protected = false;
#pragma unroll 1  // items are short, and this code is in many places
  for (int32_t token = 0; token < problem.codes_per_item; ++token) {
    is_protected |= __ldg(problem.protect + first_token + token) != 0;
  }
  return is_protected;
}

constexpr int kCountingThreads = 256;
constexpr int64_t kLongestCountedByWarp = 2048;

// Counts the protected items of every sequence: a warp a sequence, or a whole block.
//   grid  ceil(batch / sequences of a block)
template <int kThreadsPerSequence>
__global__ void __launch_bounds__(kCountingThreads)
    count_protected_kernel(const SelectionProblem problem, int32_t* num_protected) {
  constexpr int kWarpsPerSequence = kThreadsPerSequence / kWarpSize;
  __shared__ int32_t count_of_warp[kCountingThreads / kWarpSize];
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerSequence;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * (kCountingThreads / kThreadsPerSequence) +
      threadIdx.x / kThreadsPerSequence;
  int32_t count = 0;
  if (sequence < problem.batch) {
    const int64_t first_row = __ldg(problem.cu_seqlens + sequence);
    const int64_t num_items = (__ldg(problem.cu_seqlens + sequence + 1) - first_row) / problem.codes_per_item;
#pragma unroll 4
    for (int64_t item = thread; item < num_items; item += kThreadsPerSequence) {
      count += item_is_protected(problem, first_row + item * problem.codes_per_item);
    }
  }
  count = warp_sum(count);
  if (kWarpsPerSequence > 1) {
    if (lane_index() == 0) {
      count_of_warp[warp_index()] = count;
    }
    __syncthreads();
    count = 0;
    for (int warp = 0; warp < kWarpsPerSequence; ++warp) {
      count += count_of_warp[warp];
    }
  }
  if (thread == 0 && sequence < problem.batch) {
    num_protected[sequence] = count;
  }
}

template <typename Launch>
void launch_count_protected(
    const SelectionProblem& problem, int64_t max_seqlen, int32_t* num_protected, const Launch& launch) {
  constexpr int kSequences = kCountingThreads / kWarpSize;
  if (problem.batch == 0) {
    return;
  }
  if (max_seqlen <= kLongestCountedByWarp) {
    launch(
        &count_protected_kernel<kWarpSize>, (problem.batch + kSequences - 1) / kSequences, kCountingThreads, problem,
        num_protected);
  } else {
    launch(&count_protected_kernel<kCountingThreads>, problem.batch, kCountingThreads, problem, num_protected);
  }
}

// cu_seqlens_kept: the running sum of the kept lengths in tokens, cut off where the result has no more room. One block
// scans runs of consecutive sequences, a few of them a thread: threads by shuffles, warps through shared memory.
template <int kThreads>
__device__ inline void write_kept_offsets(const SelectionProblem& problem) {
  constexpr int kSequencesPerThread = 4;
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ int64_t sum_of_warp[kWarps];
  int64_t kept_before = 0;  // of the sequences of earlier rounds
  for (int64_t first = 0; first < problem.batch; first += kThreads * kSequencesPerThread) {
    const int64_t first_of_thread = first + static_cast<int64_t>(threadIdx.x) * kSequencesPerThread;
    int64_t kept[kSequencesPerThread], kept_of_thread = 0;
#pragma unroll
    for (int i = 0; i < kSequencesPerThread; ++i) {
      const int64_t sequence = first_of_thread + i;
      kept[i] = sequence < problem.batch
          ? static_cast<int64_t>(items_of_sequence(problem, sequence).num_kept) * problem.codes_per_item
          : 0;
      kept_of_thread += kept[i];
    }
    const int64_t kept_of_warp_so_far = warp_running_sum(kept_of_thread);
    __syncthreads();  // the sums of the last round have been read
    if (lane_index() == kWarpSize - 1) {
      sum_of_warp[warp_index()] = kept_of_warp_so_far;
    }
    __syncthreads();
    int64_t offset = kept_before + kept_of_warp_so_far - kept_of_thread;
    for (int warp = 0; warp < kWarps; ++warp) {
      offset += warp < warp_index() ? sum_of_warp[warp] : 0;
      kept_before += sum_of_warp[warp];
    }
#pragma unroll
    for (int i = 0; i < kSequencesPerThread; ++i) {
      offset += kept[i];
      if (first_of_thread + i < problem.batch) {
        problem.cu_seqlens_kept[first_of_thread + i + 1] = static_cast<int32_t>(min(offset, problem.total_kept));
      }
    }
  }
  if (threadIdx.x == 0) {
    problem.cu_seqlens_kept[0] = 0;
  }
}

//   grid  1
template <int kThreads>
__global__ void __launch_bounds__(kThreads) kept_offsets_kernel(const SelectionProblem problem) {
  write_kept_offsets<kThreads>(problem);
}

template <typename Launch>
void launch_kept_offsets(const SelectionProblem& problem, const Launch& launch) {
  constexpr int kThreads = 1024;
  launch(&kept_offsets_kernel<kThreads>, 1, kThreads, problem);
}

// Of a sequence's keys those above `threshold` stay, and the first `num_ties` of those that equal it.
template <typename Key>
struct Cut {
  Key threshold;
  int32_t num_ties;
};

template <typename Key>
__device__ inline Cut<Key> cut_of_nothing() {
  return {kHighestKey<Key>, 0};
}

template <typename T>
using ItemKey = typename KeyOf<Compute<T>>::type;

// Keys of the items first, first + stride, ... of a sequence, 0 for those from end_items on. All first tokens are read
// before anything waits for one of them, then all second ones, and so on.
template <typename T, int kCount>
__device__ inline void load_keys(
    const SelectionProblem& problem, const T* importance, int32_t first_row, int32_t first, int32_t stride,
    int32_t end_items, ItemKey<T> (&keys)[kCount]) {
  const int64_t length = problem.codes_per_item;
  const auto first_token = [&](int j) { return first_row + (first + static_cast<int64_t>(j) * stride) * length; };
  const auto exists = [&](int j) { return first + j * stride < end_items; };
  Compute<T> scores[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    scores[j] = exists(j) ? load_number(importance + first_token(j)) : 0;
  }
#pragma unroll 1
  for (int32_t token = 1; token < problem.codes_per_item; ++token) {  // first to last: it decides the bits
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      scores[j] += exists(j) ? load_number(importance + first_token(j) + token) : 0;
    }
  }
  static_assert(kCount <= 32, "a bit for each item");
  uint32_t protected_items = 0;
  if (problem.protect != nullptr) {
#pragma unroll 1
    for (int32_t token = 0; token < problem.codes_per_item; ++token) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const bool is_protected = exists(j) && __ldg(problem.protect + first_token(j) + token) != 0;
        protected_items |= static_cast<uint32_t>(is_protected) << j;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const ItemKey<T> key = (protected_items >> j & 1u) != 0 ? kHighestKey<ItemKey<T>> : key_of(scores[j]);
    keys[j] = exists(j) ? key : ItemKey<T>{0};
  }
}

// Writes where the tokens of an item go: to the rows from the `kept_before`-th kept item of the sequence on, or
// nowhere.
__device__ inline void place_item(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, int32_t item, bool stays,
    int32_t kept_before) {
#pragma unroll 1
  for (int32_t token = 0; token < problem.codes_per_item; ++token) {
    const int32_t index = item * problem.codes_per_item + token;
    const int64_t row = static_cast<int64_t>(items.first_row) + index;
    const int64_t kept_row = first_kept_row + static_cast<int64_t>(kept_before) * problem.codes_per_item + token;
    if (!stays || kept_row >= problem.total_kept) {
      problem.inverse[row] = -1;
      continue;
    }
    problem.inverse[row] = static_cast<int32_t>(kept_row);
    problem.indices[kept_row] = row;
    if (problem.index_in_sequence != nullptr) {
      problem.index_in_sequence[kept_row] = index;
    }
  }
}

// What a warp has placed of a sequence so far, or warps before it will have.
struct Placed {
  int32_t above;  // items above the threshold
  int32_t ties;   // items that equal it, whether they stay or not
};

// Places 32 consecutive items, one a lane; `exists`: the lane has one.
template <typename Key>
__device__ inline void place_items_of_warp(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, const Cut<Key>& cut,
    int32_t item, bool exists, Key key, Placed& placed) {
  const bool is_above = exists && key > cut.threshold;
  const bool is_tie = exists && key == cut.threshold;
  const unsigned above = __ballot_sync(kAllLanes, is_above);
  const unsigned ties = __ballot_sync(kAllLanes, is_tie);
  const int32_t above_before = placed.above + __popc(above & lanes_below());
  const int32_t ties_before = placed.ties + __popc(ties & lanes_below());
  if (exists) {
    const bool stays = is_above || (is_tie && ties_before < cut.num_ties);
    place_item(problem, items, first_kept_row, item, stays, above_before + min(ties_before, cut.num_ties));
  }
  placed.above += __popc(above);
  placed.ties += __popc(ties);
}

// Rows after the last whole item, by `num_threads` threads.
__device__ inline void drop_broken_item(
    const SelectionProblem& problem, const SequenceItems& items, int thread, int num_threads) {
  for (int32_t i = items.num_items * problem.codes_per_item + thread; i < items.num_rows; i += num_threads) {
    problem.inverse[items.first_row + static_cast<int64_t>(i)] = -1;
  }
}

// The cut that keeps k of n keys, 0 <= k <= n, lane l having those of items l, l + 32, ...: bisection, until exactly k
// keys reach the middle (of random keys after about log2(n) counts) or one key is left.
template <typename Key, int kKeysPerLane>
__device__ inline Cut<Key> cut_by_warp(const Key (&keys)[kKeysPerLane], int32_t n, int32_t k) {
  if (k == n) {
    return {Key{0}, n};
  }
  if (k == 0) {
    return cut_of_nothing<Key>();
  }
  Key low = kHighestKey<Key>, high = 0;
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) {
    const bool exists = j * kWarpSize + lane_index() < n;
    low = exists ? min(low, keys[j]) : low;
    high = max(high, keys[j]);  // where there is no item the key is 0
  }
  low = warp_min(low);
  high = warp_max(high);
  const auto count_from = [&](Key threshold) {  // at least 1, which the keys of no items do not reach
    int32_t count = 0;
#pragma unroll
    for (int j = 0; j < kKeysPerLane; ++j) {
      count += keys[j] >= threshold;
    }
    return warp_sum(count);
  };
  // At least k keys reach `low`, and fewer than k reach any key above `high`.
  while (low < high) {
    const Key distance = high - low;
    const Key middle = low + (distance / 2 + distance % 2);
    const int32_t count = count_from(middle);
    if (count == k) {
      return {middle, n};
    }
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, low == kHighestKey<Key> ? k : k - count_from(low + 1)};
}

// A sequence of at most 32 * kKeysPerLane items, by one warp with all keys in registers.
template <int kKeysPerLane, typename T>
__device__ inline void select_by_warp(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, const T* importance) {
  ItemKey<T> keys[kKeysPerLane];
  constexpr int kBatch = kKeysPerLane < 8 ? kKeysPerLane : 8;  // in flight, with their addresses in registers
#pragma unroll
  for (int first = 0; first < kKeysPerLane; first += kBatch) {
    ItemKey<T> batch[kBatch];
    load_keys(
        problem, importance, items.first_row, first * kWarpSize + lane_index(), kWarpSize, items.num_items, batch);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      keys[first + j] = batch[j];
    }
  }
  const Cut<ItemKey<T>> cut = cut_by_warp(keys, items.num_items, items.num_kept);
  Placed placed = {};
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) {
    if (j * kWarpSize < items.num_items) {
      const int32_t item = j * kWarpSize + lane_index();
      place_items_of_warp(
          problem, items, first_kept_row, cut, item, item < items.num_items, keys[j], placed);
    }
  }
  drop_broken_item(problem, items, lane_index(), kWarpSize);
}

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
// Keys that a thread has in flight when it goes through those of a long sequence.
constexpr int kKeysInFlight = 4;

// Shared memory of a block that selects within one long sequence.
template <typename Key, int kThreads, int kSharedKeys>
struct SelectionScratch {
  int32_t histogram[kDigits];
  int32_t digit;        // the threshold's next digit,
  int32_t keys_above;   // the keys with higher ones,
  int32_t keys_with_it; // and those with it
  Placed placed_by_warp[kThreads / kWarpSize];
  Key keys[kSharedKeys > 0 ? kSharedKeys : 1];
};

// Finds the digit of the `wanted`-th highest of the counted keys. Called by one warp, lane l having the digits of
// rank 8 l, ..., 8 l + 7 from the top.
template <typename Scratch>
__device__ inline void find_digit(Scratch& scratch, int32_t wanted) {
  constexpr int kDigitsPerLane = kDigits / kWarpSize;
  const int highest = kDigits - 1 - lane_index() * kDigitsPerLane;
  int32_t count_of_lane = 0;
#pragma unroll
  for (int i = 0; i < kDigitsPerLane; ++i) {
    count_of_lane += scratch.histogram[highest - i];
  }
  int32_t above = warp_running_sum(count_of_lane) - count_of_lane;
  if (above >= wanted || above + count_of_lane < wanted) {
    return;
  }
  for (int digit = highest;; --digit) {
    const int32_t count = scratch.histogram[digit];
    if (above + count >= wanted) {
      scratch.digit = digit;
      scratch.keys_above = above;
      scratch.keys_with_it = count;
      return;
    }
    above += count;
  }
}

// Calls visit(item, key) for the keys of items first, first + stride, ..., below end_items; several are fetched at a
// time by fetch(first, stride, end_items, keys).
template <typename Key, typename Fetch, typename Visit>
__device__ inline void for_keys(
    int32_t first, int32_t stride, int32_t end_items, const Fetch& fetch, const Visit& visit) {
#pragma unroll 1
  for (int32_t item = first; item < end_items; item += kKeysInFlight * stride) {
    Key keys[kKeysInFlight];
    fetch(item, stride, end_items, keys);
#pragma unroll
    for (int j = 0; j < kKeysInFlight; ++j) {
      if (item + j * stride < end_items) {
        visit(item + j * stride, keys[j]);
      }
    }
  }
}

// The cut that keeps k of n keys, 0 <= k <= n, one digit at a time from the highest on: a histogram of the digits of
// the keys that share the threshold's digits so far says what the next one is.
template <typename Key, int kThreads, typename Fetch, typename Scratch>
__device__ inline Cut<Key> cut_by_block(int32_t n, int32_t k, const Fetch& fetch, Scratch& scratch) {
  if (k == n) {
    return {Key{0}, n};
  }
  if (k == 0) {
    return cut_of_nothing<Key>();
  }
  const int thread = static_cast<int>(threadIdx.x);
  Key prefix = 0;
  int32_t wanted = k;  // of the keys that share the digits so far
  for (int shift = kKeyBits<Key> - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = thread; digit < kDigits; digit += kThreads) {
      scratch.histogram[digit] = 0;
    }
    __syncthreads();
    for_keys<Key>(thread, kThreads, n, fetch, [&](int32_t, Key key) {
      const Key digits = key >> shift;
      if (digits >> kDigitBits == prefix) {
        atomicAdd(&scratch.histogram[static_cast<int>(digits % kDigits)], 1);
      }
    });
    __syncthreads();
    if (warp_index() == 0) {
      find_digit(scratch, wanted);
    }
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<Key>(scratch.digit);
    wanted -= scratch.keys_above;
    if (wanted == scratch.keys_with_it) {  // all that share the digits so far stay, whatever their other digits
      return {prefix << shift, n};
    }
  }
  return {prefix, wanted};
}

// A sequence of any length, by the whole block. Every warp places a run of consecutive items, after all have counted
// what theirs contributes.
template <typename Key, int kThreads, typename Fetch, typename Scratch>
__device__ inline void select_by_block(
    const SelectionProblem& problem, const SequenceItems& items, int64_t first_kept_row, const Fetch& fetch,
    Scratch& scratch) {
  constexpr int kWarps = kThreads / kWarpSize;
  const Cut<Key> cut = cut_by_block<Key, kThreads>(items.num_items, items.num_kept, fetch, scratch);
  const int32_t items_per_warp = (items.num_items + kThreads - 1) / kThreads * kWarpSize;
  const int32_t first_item = min(items.num_items, warp_index() * items_per_warp);
  const int32_t end_items = min(items.num_items, first_item + items_per_warp);

  Placed counted = {};
  for_keys<Key>(first_item + lane_index(), kWarpSize, end_items, fetch, [&](int32_t, Key key) {
    counted.above += key > cut.threshold;
    counted.ties += key == cut.threshold;
  });
  counted.above = warp_sum(counted.above);
  counted.ties = warp_sum(counted.ties);
  if (lane_index() == 0) {
    scratch.placed_by_warp[warp_index()] = counted;
  }
  __syncthreads();
  Placed placed = {};
  for (int warp = 0; warp < kWarps; ++warp) {
    placed.above += warp < warp_index() ? scratch.placed_by_warp[warp].above : 0;
    placed.ties += warp < warp_index() ? scratch.placed_by_warp[warp].ties : 0;
  }

  for (int32_t first = first_item; first < end_items; first += kKeysInFlight * kWarpSize) {
    Key keys[kKeysInFlight];
    fetch(first + lane_index(), kWarpSize, end_items, keys);
#pragma unroll
    for (int j = 0; j < kKeysInFlight; ++j) {
      if (first + j * kWarpSize < end_items) {
        const int32_t item = first + j * kWarpSize + lane_index();
        place_items_of_warp(problem, items, first_kept_row, cut, item, item < end_items, keys[j], placed);
      }
    }
  }
  drop_broken_item(problem, items, static_cast<int>(threadIdx.x), kThreads);
}

// What no sequence owns: the result past the last kept row, inverse past the last row; by the whole grid.
template <int kThreads>
__device__ inline void fill_tails(const SelectionProblem& problem) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + problem.batch);
  const int64_t first_row = __ldg(problem.cu_seqlens + problem.batch);
  for (int64_t row = first_kept_row + thread; row < problem.total_kept; row += num_threads) {
    problem.indices[row] = -1;
    if (problem.index_in_sequence != nullptr) {
      problem.index_in_sequence[row] = 0;
    }
  }
  for (int64_t row = first_row + thread; row < problem.total; row += num_threads) {
    problem.inverse[row] = -1;
  }
}

// How sequences are shared out: up to 32 * kKeysPerLane items a warp, a whole block otherwise. A block of
// kThreads keeps kSharedKeys keys in shared memory, and reads those of a longer sequence again in every pass.
// kBlocksAtOnce share a multiprocessor, so many that loads are covered and so few that registers suffice.
template <int threads, int blocks_at_once, int keys_per_lane, int shared_keys>
struct Tiling {
  static_assert(keys_per_lane % 8 == 0, "shorter sequences have their own number of registers");
  static constexpr int kThreads = threads;
  static constexpr int kBlocksAtOnce = blocks_at_once;
  static constexpr int kKeysPerLane = keys_per_lane;
  static constexpr int kItemsPerWarp = kWarpSize * keys_per_lane;
  static constexpr int kSharedKeys = shared_keys;
  static constexpr int kSequencesPerBlock = threads / kWarpSize;
};

// Small blocks where warps do it all, so that few sequences reach many multiprocessors.
template <typename T>
using ShortTiling = Tiling<128, 6, sizeof(ItemKey<T>) == 4 ? 32 : 16, 0>;
template <typename T>
using LongTiling = Tiling<512, 2, sizeof(ItemKey<T>) == 4 ? 16 : 8, 32 * 1024 / sizeof(ItemKey<T>)>;

// The long ones among sequences `first`, first + stride, ..., by the whole block.
template <typename Tiling, typename T>
__device__ inline void select_in_long_sequences(
    const SelectionProblem& problem, const T* importance, int32_t first, int32_t stride) {
  using Key = ItemKey<T>;
  __shared__ SelectionScratch<Key, Tiling::kThreads, Tiling::kSharedKeys> scratch;
  for (int32_t first_of_lanes = first; first_of_lanes < problem.batch; first_of_lanes += stride * kWarpSize) {
    const int32_t sequence_of_lane = first_of_lanes + lane_index() * stride;
    const bool is_long = sequence_of_lane < problem.batch &&
        items_of_sequence(problem, sequence_of_lane).num_items > Tiling::kItemsPerWarp;
    for (unsigned left = __ballot_sync(kAllLanes, is_long); left != 0; left &= left - 1) {
      const int32_t sequence = first_of_lanes + (__ffs(static_cast<int>(left)) - 1) * stride;
      const SequenceItems items = items_of_sequence(problem, sequence);
      const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + sequence);
      const auto from_memory = [&](int32_t first, int32_t stride, int32_t end_items, Key(&keys)[kKeysInFlight]) {
        load_keys(problem, importance, items.first_row, first, stride, end_items, keys);
      };
      const auto from_scratch = [&](int32_t first, int32_t stride, int32_t end_items, Key(&keys)[kKeysInFlight]) {
#pragma unroll
        for (int j = 0; j < kKeysInFlight; ++j) {
          keys[j] = first + j * stride < end_items ? scratch.keys[first + j * stride] : Key{0};
        }
      };
      __syncthreads();  // what the last sequence left in shared memory has been read
      if (items.num_items <= Tiling::kSharedKeys) {
        for_keys<Key>(
            static_cast<int32_t>(threadIdx.x), Tiling::kThreads, items.num_items, from_memory,
            [&](int32_t item, Key key) { scratch.keys[item] = key; });
        __syncthreads();
        select_by_block<Key, Tiling::kThreads>(problem, items, first_kept_row, from_scratch, scratch);
      } else {
        select_by_block<Key, Tiling::kThreads>(problem, items, first_kept_row, from_memory, scratch);
      }
    }
  }
}

// Selects. The first num_long_blocks blocks share out the long sequences; every warp of the blocks after them has one
// sequence and leaves it to them where it is long.
//   grid  num_long_blocks (0 where no sequence can be long) + ceil(batch / kSequencesPerBlock), or more blocks where
//         the tails need them
template <typename T, typename Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocksAtOnce)
    select_tokens_kernel(const SelectionProblem problem, const T* __restrict__ importance, int32_t num_long_blocks) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block < num_long_blocks) {
    if constexpr (Tiling::kSharedKeys > 0) {
      select_in_long_sequences<Tiling>(problem, importance, block, num_long_blocks);
    }
  } else {
    const int32_t sequence = (block - num_long_blocks) * Tiling::kSequencesPerBlock + warp_index();
    if (sequence < problem.batch) {
      const SequenceItems items = items_of_sequence(problem, sequence);
      const int64_t first_kept_row = __ldg(problem.cu_seqlens_kept + sequence);
      if (items.num_items <= kWarpSize) {
        select_by_warp<1>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= 4 * kWarpSize) {
        select_by_warp<4>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= 8 * kWarpSize) {
        select_by_warp<8>(problem, items, first_kept_row, importance);
      } else if (items.num_items <= Tiling::kItemsPerWarp) {
        select_by_warp<Tiling::kKeysPerLane>(problem, items, first_kept_row, importance);
      }
    }
  }
  fill_tails<Tiling::kThreads>(problem);
}

template <typename Tiling, typename T, typename Launch>
void launch_select_with(
    const SelectionProblem& problem, int64_t num_long_blocks, const T* importance, const Launch& launch) {
  constexpr int64_t kSequences = Tiling::kSequencesPerBlock;
  // A tail may be everything: blocks enough to fill it at the speed of the memory.
  constexpr int64_t kTailRowsPerThread = 8, kMaxTailBlocks = 1024;
  const int64_t tail_rows = problem.total + problem.total_kept;
  const int64_t tail_blocks = std::min(kMaxTailBlocks, tail_rows / (kTailRowsPerThread * Tiling::kThreads) + 1);
  const int64_t sequence_blocks = num_long_blocks + (problem.batch + kSequences - 1) / kSequences;
  launch(
      &select_tokens_kernel<T, Tiling>, std::max(sequence_blocks, tail_blocks), Tiling::kThreads, problem, importance,
      static_cast<int32_t>(num_long_blocks));
}

template <typename Short, typename Long, typename T, typename Launch>
void launch_select_tokens(
    const SelectionProblem& problem, int64_t max_seqlen, const T* importance, const Launch& launch) {
  if (max_seqlen / problem.codes_per_item <= Short::kItemsPerWarp) {
    return launch_select_with<Short>(problem, 0, importance, launch);
  }
  // A block for every long sequence that there can be, and at least as many as keep a GPU busy with looking for them.
  constexpr int64_t kMinLongBlocks = 128;
  const int64_t most_long_sequences = problem.total / problem.codes_per_item / Long::kItemsPerWarp;
  launch_select_with<Long>(
      problem, std::min<int64_t>(problem.batch, std::max(kMinLongBlocks, most_long_sequences)), importance, launch);
}

}  // namespace stamp::cuda
