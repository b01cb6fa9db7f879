// Cross-entropy of several steps from hidden states, tile by tile of the logits. What is computed is written in
// cross_entropy_tiles.h.
//
// A pass is a softmax: the rows of one hidden [N, width] against the classes of one weight. Steps that share hidden and
// classes share a pass, and a row then has a label for each. Rows without a label are left out.
//
// A pass takes its rows group by group, and a group in two rounds: the sums of the softmax, then the gradients, which
// want them. Logits are kept in between, where both rounds are run. (To compute them again instead, a third more of the
// arithmetic for far less memory traffic, took 11 to 28 % longer, for 32,768 to 1,024 classes on cores of 105 GFLOP/s.)
//
// Products are our own blocks (matrix_product.h), at every width. Against chunks of logits by BLAS (MKL, two threads,
// 220 GFLOP/s) they are 1.2 to 1.7 times as fast up to width 256, 1.05 times at 512, and from 1,024 on
// as fast or up to a fifth slower, with few classes.
//
// Threads share a pass in one of two ways, which its sizes alone decide, so that the bits do not depend on their number:
// - few classes: parts of the rows. A part has a gradient of the weight to itself; they are added up in order. Threads
//   meet twice in a pass;
// - many classes: slices of them, in every group's sums and gradients. A slice makes the gradients of its own classes,
//   and its part of the rows' gradients, which are added up in the order of the slices.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/arguments.h"
#include "cpu/core/dispatch.h"
#include "cpu/cross_entropy/kernels.h"
#include "cpu/core/tasks.h"

namespace stamp::cpu {

const CrossEntropyKernels& cross_entropy_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? KernelTables<CrossEntropyKernels>::portable_float64
                                  : kernels_of_machine<CrossEntropyKernels>();
}

namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// Sizes, by measurement; what they are is part of the bits of a result.
//
// A tile of logits, with the weight of its classes and the rows of its block, stays in the second cache; where rows are
// wide only the tile does, but a chunk of fewer classes would add to the rows' gradients more often (17 % of the time at
// width 1,024).
constexpr int64_t kBlockRows = 128;
constexpr int64_t kMinClassesPerChunk = 64, kMaxClassesPerChunk = 128;
// Threads share a group by slices, each of which has a part of the rows' gradients in memory.
constexpr int64_t kSlicesOfFewClasses = 8, kMaxSlices = 16;
constexpr int64_t kGradientPartBytes = 16 << 20;
// The logits of a group should stay in the second cache of the threads that share it, but one block is the least.
constexpr int64_t kLogitBytesOfThread = 512 << 10;
constexpr int64_t kMaxRowsPerGroup = 4 * kBlockRows;
// Where even one does not, a group is one larger block, which reads the weight and its gradient less often (5 % of the
// time of 32,768 classes), of a share of the rows: all logits together would be so many times as much memory.
constexpr int64_t kMaxRowsOfOneBlock = 2 * kBlockRows, kLogitShare = 18;
// Threads share rows where the weight's gradients of enough parts and the logits of a block are small. To wake a thread
// can take 0.1 ms, which is a third of the time of a group of 128 rows and 1,024 classes.
constexpr int64_t kWeightGradientBytes = 4 << 20;
constexpr int64_t kMinParts = 8, kMaxParts = 16, kMinRowsPerPart = 64;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The arguments that all ops have.
struct Inputs {
  DType dtype;
  Tensor hidden;   // [N, D] or [K, N, D], rows contiguous
  Tensor weight;   // [V, D] or [K, V, D], rows contiguous
  OptionalTensor bias;  // [V] or [K, V], contiguous, in the compute type
  Tensor targets_held;
  const int64_t* targets;  // [N, K]
  int64_t num_rows;
  int64_t num_steps;
  int64_t width;
  int64_t num_classes;
  std::vector<int64_t> starts;  // of each step's classes
  std::vector<int64_t> ends;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
};

bool is_per_step(const Tensor& x, int64_t shared_dims) {
  return x.dim() > shared_dims;
}

Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

void check_targets(const Inputs& inputs) {
  for (int64_t row = 0; row < inputs.num_rows; ++row) {
    for (int64_t k = 0; k < inputs.num_steps; ++k) {
      const int64_t target = inputs.targets[row * inputs.num_steps + k];
      STD_TORCH_CHECK(
          target == inputs.ignore_index || (target >= inputs.starts[k] && target < inputs.ends[k]), "targets[", row,
          ", ", k, "] is ", target, ", which is neither in the range [", inputs.starts[k], ", ", inputs.ends[k],
          ") of step ", k, " nor ignore_index (", inputs.ignore_index, ")");
    }
  }
}

Inputs inputs_of(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap) {
  STD_TORCH_CHECK(targets.dim() == 2, "targets must have shape [N, K], got ", targets.dim(), " dimensions");
  STD_TORCH_CHECK(
      (hidden.dim() == 2 || hidden.dim() == 3) && (weight.dim() == 2 || weight.dim() == 3),
      "hidden and weight must have two dimensions, or three where every step has its own");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "hidden and weight must have one dtype");
  Inputs inputs = {
      dtype_of("hidden", hidden), with_contiguous_rows(hidden), with_contiguous_rows(weight), std::nullopt,
      torch::stable::contiguous(targets)};
  inputs.targets = inputs.targets_held.const_data_ptr<int64_t>();
  inputs.num_rows = targets.size(0);
  inputs.num_steps = targets.size(1);
  inputs.width = hidden.size(hidden.dim() - 1);
  inputs.num_classes = weight.size(weight.dim() - 2);
  STD_TORCH_CHECK(
      hidden.size(hidden.dim() - 2) == inputs.num_rows && weight.size(weight.dim() - 1) == inputs.width &&
          (hidden.dim() == 2 || hidden.size(0) == inputs.num_steps) &&
          (weight.dim() == 2 || weight.size(0) == inputs.num_steps),
      "the shapes of hidden, weight and targets do not fit each other");
  if (bias.has_value()) {
    inputs.bias = torch::stable::contiguous(torch::stable::to(*bias, compute_type(inputs.dtype)));
  }
  for (int64_t k = 0; k < inputs.num_steps; ++k) {
    inputs.starts.push_back(vocab_ranges.has_value() ? (*vocab_ranges)[2 * k] : 0);
    inputs.ends.push_back(vocab_ranges.has_value() ? (*vocab_ranges)[2 * k + 1] : inputs.num_classes);
  }
  inputs.ignore_index = ignore_index;
  inputs.label_smoothing = label_smoothing;
  inputs.z_loss = z_loss;
  inputs.softcap = softcap.value_or(0.0);
  check_targets(inputs);
  return inputs;
}

// Scalars from a row of a gradient to the next: whole vectors.
int64_t padded_width(const Inputs& inputs) {
  return round_up(inputs.width, cross_entropy_kernels(inputs.dtype).vector_width);
}

// Gradients in the compute type, which every pass adds to; empty where not needed.
struct Gradients {
  OptionalTensor hidden;  // [(K,) N, D]
  OptionalTensor weight;  // [(K,) V, D in whole vectors]
  OptionalTensor bias;    // [(K,) V]
};

// By how much the loss of a row and step counts.
using LossScale = std::function<double(int64_t row, int64_t step)>;

// What a run over all rows is for.
struct Wanted {
  void* losses;      // scalar [K, N], of every row, 0 where ignored; null: not wanted
  void* lse;         // scalar [K, N], 0 where ignored; null: not wanted
  Gradients* gradients;  // null: not wanted
  LossScale loss_scale;  // for the gradients
  const void* known_lse;  // scalar [K, N], where it has been computed before; null: compute it
};

template <typename scalar>
scalar* numbers(const Tensor& x) {
  return x.mutable_data_ptr<scalar>();
}

// Into what the classes of a softmax are cut, in rows of so many bytes: slices, and these into chunks.
struct ClassSizes {
  int64_t slice;
  int64_t chunk;
};

ClassSizes class_sizes(int64_t num_classes, int64_t row_bytes) {
  const int64_t of_few = round_up(divide_up(num_classes, kSlicesOfFewClasses), kMinClassesPerChunk);
  if (of_few <= kMaxClassesPerChunk) {
    return {of_few, of_few};
  }
  const int64_t most_slices = std::clamp(kGradientPartBytes / (kBlockRows * row_bytes), int64_t{4}, kMaxSlices);
  return {round_up(divide_up(num_classes, most_slices), kMaxClassesPerChunk), kMaxClassesPerChunk};
}

// One softmax: the steps [first_step, end_step) of rows that have a label in one of them. Memory is allocated by the
// constructor, so that a thread can run what the caller's has made.
template <typename scalar>
class Pass {
 public:
  // At most `most_rows` rows a run. If `is_shared`, threads share its slices; otherwise a thread has it to itself.
  Pass(
      const Inputs& inputs, int64_t first_step, int64_t end_step, const Wanted& wanted, int64_t most_rows,
      bool is_shared)
      : inputs_(inputs), wanted_(wanted), kernels_(cross_entropy_kernels(inputs.dtype)), first_step_(first_step),
        num_labels_(end_step - first_step), first_class_(inputs.starts[first_step]), is_shared_(is_shared) {
    choose_sizes(most_rows);
    point_into_inputs();
    allocate();
  }

  void run(const int64_t* rows, int64_t num_rows) {
    const int64_t num_groups = divide_up(num_rows, rows_per_group_);
    for_rounds(
        num_groups * kPhases, num_threads_,
        [&](int64_t round) {
          if (round % kPhases == 0) {
            const int64_t first = round / kPhases * rows_per_group_;
            begin_group(rows + first, std::min(rows_per_group_, num_rows - first));
          }
          return num_tasks_of(static_cast<Phase>(round % kPhases));
        },
        [&](int64_t round, int64_t task, int64_t thread) {
          run_task(static_cast<Phase>(round % kPhases), task, scratch_ + thread * scratch_of_thread(scratch_bytes_));
        });
  }

  // Where the gradients of the weight [num_classes, row] and the bias [num_classes] of this softmax are added to.
  scalar* grad_weight() const { return static_cast<scalar*>(group_.grad_weight); }
  scalar* grad_bias() const { return static_cast<scalar*>(group_.grad_bias); }

  // To elsewhere, if they are needed.
  void add_weight_gradients_to(scalar* grad_weight, scalar* grad_bias) {
    group_.grad_weight = group_.grad_weight == nullptr ? nullptr : grad_weight;
    group_.grad_bias = group_.grad_bias == nullptr ? nullptr : grad_bias;
  }

 private:
  static MatrixRows rows_of(const Tensor& x, DType dtype, int64_t step, int64_t first_row) {
    const int64_t size = static_cast<int64_t>(x.element_size()), row_stride = x.stride(x.dim() - 2);
    const int64_t offset = (is_per_step(x, 2) ? step * x.stride(0) : 0) + first_row * row_stride;
    return {static_cast<const char*>(x.const_data_ptr()) + offset * size, dtype, row_stride};
  }

  void choose_sizes(int64_t most_rows) {
    group_.width = inputs_.width;
    group_.row = padded_width(inputs_);
    group_.num_classes = inputs_.ends[first_step_] - first_class_;
    const int64_t scalar_bytes = static_cast<int64_t>(sizeof(scalar));
    const int64_t row_bytes = std::max<int64_t>(group_.row, 1) * scalar_bytes;
    const ClassSizes sizes = class_sizes(group_.num_classes, row_bytes);
    group_.slice_classes = is_shared_ ? sizes.slice : round_up(group_.num_classes, sizes.chunk);
    group_.chunk_classes = sizes.chunk;
    num_slices_ = divide_up(group_.num_classes, group_.slice_classes);
    keeps_logits_ = wanted_.gradients != nullptr && wanted_.known_lse == nullptr;
    const int64_t most_by_parts = kGradientPartBytes / (num_slices_ * row_bytes);
    int64_t rows = std::min(kMaxRowsPerGroup, most_by_parts);
    group_.block_rows = kBlockRows;
    if (keeps_logits_) {
      const int64_t logit_bytes = is_shared_ ? 2 * kLogitBytesOfThread : kLogitBytesOfThread;
      rows = std::min(rows, logit_bytes / (group_.num_classes * scalar_bytes));
      if (rows < kBlockRows) {
        const int64_t most = std::min(kMaxRowsOfOneBlock, most_by_parts) / kRowsPerVector * kRowsPerVector;
        rows = std::min(most_rows / kLogitShare / kRowsPerVector * kRowsPerVector, most);
        group_.block_rows = rows = std::max(rows, kBlockRows);
      }
    }
    most_rows = round_up(std::max<int64_t>(most_rows, 1), kRowsPerVector);
    group_.block_rows = std::min(group_.block_rows, most_rows);
    rows_per_group_ = std::min(std::max<int64_t>(rows / group_.block_rows, 1) * group_.block_rows, most_rows);
  }

  void point_into_inputs() {
    hidden_ = rows_of(inputs_.hidden, inputs_.dtype, first_step_, 0);
    group_.weight = rows_of(inputs_.weight, inputs_.dtype, first_step_, first_class_);
    group_.softcap = inputs_.softcap;
    group_.sum_logits = inputs_.label_smoothing > 0;
    if (inputs_.bias.has_value()) {
      const int64_t step = is_per_step(*inputs_.bias, 1) ? first_step_ : 0;
      group_.bias = inputs_.bias->template const_data_ptr<scalar>() + step * inputs_.num_classes + first_class_;
    }
    if (wanted_.gradients == nullptr) {
      return;
    }
    const Gradients& gradients = *wanted_.gradients;
    if (gradients.hidden.has_value()) {
      const int64_t step = is_per_step(*gradients.hidden, 2) ? first_step_ : 0;
      grad_hidden_ = numbers<scalar>(*gradients.hidden) + step * inputs_.num_rows * inputs_.width;
    }
    if (gradients.weight.has_value()) {
      const int64_t step = is_per_step(*gradients.weight, 2) ? first_step_ : 0;
      group_.grad_weight =
          numbers<scalar>(*gradients.weight) + (step * inputs_.num_classes + first_class_) * group_.row;
    }
    if (gradients.bias.has_value()) {
      const int64_t step = is_per_step(*gradients.bias, 1) ? first_step_ : 0;
      group_.grad_bias = numbers<scalar>(*gradients.bias) + step * inputs_.num_classes + first_class_;
    }
  }

  scalar* take(int64_t size) {
    held_.push_back(torch::stable::new_empty(inputs_.hidden, {size}, compute_type(inputs_.dtype)));
    return numbers<scalar>(held_.back());
  }

  void allocate() {
    const int64_t rows = rows_per_group_;
    group_.num_rows = rows;
    group_.x = take(rows * round_up(inputs_.width, kernels_.panel_width));
    group_.x_transposed = take(rows * group_.width);
    if (keeps_logits_) {
      group_.logits = take(round_up(rows, group_.block_rows) * group_.num_classes);
      group_.chunk_max = take(rows * divide_up(group_.num_classes, group_.chunk_classes));
    }
    group_.slice_max = slice_max_ = take(rows * num_slices_);
    group_.slice_sum = slice_sum_ = take(rows * num_slices_);
    group_.slice_sum_logits = slice_sum_logits_ = take(group_.sum_logits ? rows * num_slices_ : 0);
    group_.lse = lse_ = take(rows);
    group_.probability_scale = probability_scale_ = take(rows);
    group_.offset = offset_ = take(rows);
    labels_.resize(rows * num_labels_);
    group_.labels = labels_.data();
    group_.num_labels = num_labels_;
    group_.label_logits = label_logits_ = take(rows * num_labels_);
    group_.label_weights = label_weights_ = take(rows * num_labels_);
    group_.grad_x = grad_x_ = grad_hidden_ == nullptr ? nullptr : take(num_slices_ * rows * group_.row);
    scratch_bytes_ = kernels_.scratch_bytes(group_);
    num_threads_ = is_shared_ ? std::min<int64_t>(num_slices_, torch::stable::get_num_threads()) : 1;
    held_.push_back(torch::stable::new_empty(
        inputs_.hidden, {num_threads_ * scratch_of_thread(scratch_bytes_)}, ScalarType::Byte));
    scratch_ = static_cast<char*>(held_.back().mutable_data_ptr());
  }

  int64_t target(int64_t row, int64_t label) const {
    return inputs_.targets[row * inputs_.num_steps + first_step_ + label];
  }

  // The rounds of a group. Tasks are slices of the classes in those of the logits, and some rows in the others.
  enum Phase : int64_t { kLoad, kSums, kFinish, kGradients, kAdd, kPhases };

  void begin_group(const int64_t* rows, int64_t num_given) {
    group_rows_ = rows;
    num_given_ = num_given;
    group_.num_rows = round_up(num_given, kRowsPerVector);
  }

  int64_t num_tasks_of(Phase phase) const {
    const bool has_gradients = wanted_.gradients != nullptr;
    switch (phase) {
      case kSums:
        return wanted_.known_lse == nullptr ? num_slices_ : 0;
      case kGradients:
        return has_gradients ? num_slices_ : 0;
      case kAdd:
        return has_gradients && grad_hidden_ != nullptr ? group_.num_rows / kRowsPerVector : 0;
      default:
        return group_.num_rows / kRowsPerVector;
    }
  }

  void run_task(Phase phase, int64_t task, char* scratch) {
    const int64_t first = task * kRowsPerVector, end = first + kRowsPerVector;
    switch (phase) {
      case kLoad:
        kernels_.load_x(group_, hidden_, group_rows_, num_given_, first, scratch);
        find_labels(first);
        break;
      case kSums:
        kernels_.sums(group_, task, scratch);
        break;
      case kFinish:
        for (int64_t i = first; i < end; ++i) {
          finish_row(i < num_given_ ? group_rows_[i] : -1, i);
        }
        break;
      case kGradients:
        // Backwards: the last slices' logits and weight are those that may still be in a cache.
        kernels_.gradients(group_, num_slices_ - 1 - task, scratch);
        break;
      default:
        add_gradients_of_rows(first, std::min(end, num_given_));
    }
  }

  void find_labels(int64_t begin) {
    for (int64_t label = 0; label < num_labels_; ++label) {
      for (int64_t i = begin; i < begin + kRowsPerVector; ++i) {
        const bool has_label = i < num_given_ && target(group_rows_[i], label) != inputs_.ignore_index;
        labels_[label * group_.num_rows + i] = has_label ? target(group_rows_[i], label) - first_class_ : -1;
      }
    }
  }

  void add_gradients_of_rows(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scalar* to = grad_hidden_ + group_rows_[i] * inputs_.width;
      for (int64_t slice = 0; slice < num_slices_; ++slice) {
        const scalar* from = grad_x_ + (slice * group_.num_rows + i) * group_.row;
        for (int64_t d = 0; d < inputs_.width; ++d) {
          to[d] += from[d];
        }
      }
    }
  }

  // From the slices' sums to a row's lse and losses, and to what its gradients need. -1: no row.
  void finish_row(int64_t row, int64_t i) {
    lse_[i] = std::numeric_limits<scalar>::infinity();
    probability_scale_[i] = offset_[i] = 0;
    if (row < 0) {
      return;
    }
    const double smoothing = inputs_.label_smoothing, num_classes = static_cast<double>(group_.num_classes);
    const scalar lse = lse_of_row(row, i);
    double scales = 0;
    for (int64_t label = 0; label < num_labels_; ++label) {
      const int64_t step = first_step_ + label, at = label * group_.num_rows + i;
      if (labels_[at] < 0) {
        continue;
      }
      if (wanted_.losses != nullptr) {
        double loss = lse - (1 - smoothing) * label_logits_[at] + inputs_.z_loss * lse * lse;
        if (smoothing > 0) {
          loss -= smoothing * sum_logits_of_row(i) / num_classes;
        }
        static_cast<scalar*>(wanted_.losses)[step * inputs_.num_rows + row] = static_cast<scalar>(loss);
      }
      if (wanted_.lse != nullptr) {
        static_cast<scalar*>(wanted_.lse)[step * inputs_.num_rows + row] = lse;
      }
      if (wanted_.gradients != nullptr) {
        const double scale = wanted_.loss_scale(row, step);
        scales += scale;
        label_weights_[at] = static_cast<scalar>((1 - smoothing) * scale);
      }
    }
    lse_[i] = lse;
    probability_scale_[i] = static_cast<scalar>((1 + 2 * inputs_.z_loss * lse) * scales);
    offset_[i] = static_cast<scalar>(smoothing / num_classes * scales);
  }

  scalar lse_of_row(int64_t row, int64_t i) const {
    if (wanted_.known_lse != nullptr) {
      int64_t label = 0;  // the first there is: ignored steps have no lse
      while (labels_[label * group_.num_rows + i] < 0) {
        ++label;
      }
      return static_cast<const scalar*>(wanted_.known_lse)[(first_step_ + label) * inputs_.num_rows + row];
    }
    scalar largest = -std::numeric_limits<scalar>::infinity(), sum = 0;
    for (int64_t slice = 0; slice < num_slices_; ++slice) {
      largest = std::max(largest, slice_max_[slice * group_.num_rows + i]);
    }
    for (int64_t slice = 0; slice < num_slices_; ++slice) {
      const int64_t at = slice * group_.num_rows + i;
      if (slice_sum_[at] != 0) {
        sum += slice_sum_[at] * std::exp(slice_max_[at] - largest);
      }
    }
    return largest + std::log(sum);
  }

  scalar sum_logits_of_row(int64_t i) const {
    scalar sum = 0;
    for (int64_t slice = 0; slice < num_slices_; ++slice) {
      sum += slice_sum_logits_[slice * group_.num_rows + i];
    }
    return sum;
  }

  const Inputs& inputs_;
  const Wanted& wanted_;
  const CrossEntropyKernels& kernels_;
  int64_t first_step_;
  int64_t num_labels_;
  int64_t first_class_;
  int64_t rows_per_group_;
  int64_t num_slices_;
  int64_t num_threads_;
  bool is_shared_;
  bool keeps_logits_;
  const int64_t* group_rows_;
  int64_t num_given_;
  MatrixRows hidden_;
  CrossEntropyGroup group_ = {};
  scalar *slice_max_, *slice_sum_, *slice_sum_logits_, *lse_, *probability_scale_, *offset_;
  scalar *label_logits_, *label_weights_, *grad_x_, *grad_hidden_ = nullptr;
  std::vector<int64_t> labels_;
  int64_t scratch_bytes_;
  char* scratch_;
  std::vector<Tensor> held_;
};

bool is_one_softmax(const Inputs& inputs) {
  const bool is_shared = !is_per_step(inputs.hidden, 2) && !is_per_step(inputs.weight, 2) &&
      !(inputs.bias.has_value() && is_per_step(*inputs.bias, 1));
  const auto all_equal = [](const std::vector<int64_t>& x) {
    return std::equal(x.begin() + 1, x.end(), x.begin());
  };
  return is_shared && all_equal(inputs.starts) && all_equal(inputs.ends);
}

std::vector<int64_t> rows_with_labels(const Inputs& inputs, int64_t first_step, int64_t end_step) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < inputs.num_rows; ++row) {
    const int64_t* targets = inputs.targets + row * inputs.num_steps;
    if (std::any_of(targets + first_step, targets + end_step, [&](int64_t target) {
          return target != inputs.ignore_index;
        })) {
      rows.push_back(row);
    }
  }
  return rows;
}

// Parts of the rows that threads share; 1: they share slices of the classes instead.
int64_t number_of_parts(int64_t num_rows, int64_t num_classes, int64_t row_bytes, int64_t scalar_bytes) {
  const int64_t most_by_memory = kWeightGradientBytes / std::max<int64_t>(num_classes * row_bytes, 1);
  if (most_by_memory < kMinParts || kBlockRows * num_classes * scalar_bytes > kLogitBytesOfThread) {
    return 1;
  }
  return std::clamp(num_rows / kMinRowsPerPart, int64_t{1}, std::min(most_by_memory, kMaxParts));
}

// to[i] += sum of the parts' [num_parts, size], in their order.
template <typename scalar>
void add_parts(scalar* to, const scalar* parts, int64_t num_parts, int64_t size) {
  constexpr int64_t kNumbersPerTask = 16 << 10;
  const int64_t num_tasks = divide_up(size, kNumbersPerTask);
  const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  for_tasks_of_threads(num_tasks, num_threads, [&](int64_t task, int64_t) {
    const int64_t end = std::min((task + 1) * kNumbersPerTask, size);
    for (int64_t part = 0; part < num_parts; ++part) {
      for (int64_t i = task * kNumbersPerTask; i < end; ++i) {
        to[i] += parts[part * size + i];
      }
    }
  });
}

// The rows of one softmax in parts, each by one thread.
template <typename scalar>
void run_parts(
    const Inputs& inputs, int64_t first_step, int64_t end_step, const Wanted& wanted, const std::vector<int64_t>& rows,
    int64_t num_parts) {
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  const int64_t rows_per_part = round_up(divide_up(num_rows, num_parts), kRowsPerVector);
  const int64_t num_threads = std::min<int64_t>(num_parts, torch::stable::get_num_threads());
  std::vector<Pass<scalar>> passes;
  passes.reserve(num_threads);
  for (int64_t thread = 0; thread < num_threads; ++thread) {
    passes.emplace_back(inputs, first_step, end_step, wanted, rows_per_part, false);
  }
  scalar* const grad_weight = passes[0].grad_weight();
  scalar* const grad_bias = passes[0].grad_bias();
  const int64_t num_classes = inputs.ends[first_step] - inputs.starts[first_step];
  const int64_t weight_size = num_classes * padded_width(inputs);
  const auto memory_of_parts = [&](bool is_needed, int64_t size) {
    return torch::stable::new_empty(inputs.hidden, {is_needed ? num_parts * size : 0}, compute_type(inputs.dtype));
  };
  const Tensor weight_parts = memory_of_parts(grad_weight != nullptr, weight_size);
  const Tensor bias_parts = memory_of_parts(grad_bias != nullptr, num_classes);
  for_tasks_of_threads(num_parts, num_threads, [&](int64_t part, int64_t thread) {
    scalar* const of_weight = numbers<scalar>(weight_parts) + part * weight_size;
    scalar* const of_bias = numbers<scalar>(bias_parts) + part * num_classes;
    if (grad_weight != nullptr) {
      std::fill_n(of_weight, weight_size, scalar{0});
    }
    if (grad_bias != nullptr) {
      std::fill_n(of_bias, num_classes, scalar{0});
    }
    passes[thread].add_weight_gradients_to(of_weight, of_bias);
    const int64_t first = std::min(part * rows_per_part, num_rows);
    passes[thread].run(rows.data() + first, std::min(rows_per_part, num_rows - first));
  });
  if (grad_weight != nullptr) {
    add_parts(grad_weight, weight_parts.const_data_ptr<scalar>(), num_parts, weight_size);
  }
  if (grad_bias != nullptr) {
    add_parts(grad_bias, bias_parts.const_data_ptr<scalar>(), num_parts, num_classes);
  }
}

template <typename scalar>
void run_passes(const Inputs& inputs, const Wanted& wanted) {
  const int64_t steps_per_pass = is_one_softmax(inputs) ? inputs.num_steps : 1;
  for (int64_t step = 0; step < inputs.num_steps; step += steps_per_pass) {
    const int64_t end_step = step + steps_per_pass;
    const std::vector<int64_t> rows = rows_with_labels(inputs, step, end_step);
    const int64_t num_rows = static_cast<int64_t>(rows.size());
    const int64_t num_classes = inputs.ends[step] - inputs.starts[step];
    const int64_t scalar_bytes = static_cast<int64_t>(sizeof(scalar)), row_bytes = padded_width(inputs) * scalar_bytes;
    const int64_t num_parts = number_of_parts(num_rows, num_classes, row_bytes, scalar_bytes);
    if (num_parts > 1) {
      run_parts<scalar>(inputs, step, end_step, wanted, rows, num_parts);
    } else {
      Pass<scalar>(inputs, step, end_step, wanted, num_rows, true).run(rows.data(), num_rows);
    }
  }
}

void run_all(const Inputs& inputs, const Wanted& wanted) {
  if (inputs.dtype == DType::kFloat64) {
    run_passes<double>(inputs, wanted);
  } else {
    run_passes<float>(inputs, wanted);
  }
}

Tensor zeros(const Tensor& like, std::vector<int64_t> shape, DType dtype) {
  return torch::stable::new_zeros(like, shape, compute_type(dtype));
}

std::vector<int64_t> shape_of(const Tensor& x) {
  return std::vector<int64_t>(x.sizes().begin(), x.sizes().end());
}

Gradients zero_gradients(
    const Inputs& inputs, const OptionalTensor& bias, bool need_hidden, bool need_weight, bool need_bias) {
  Gradients gradients;
  if (need_hidden) {
    gradients.hidden = zeros(inputs.hidden, shape_of(inputs.hidden), inputs.dtype);
  }
  if (need_weight) {
    std::vector<int64_t> shape = shape_of(inputs.weight);
    shape.back() = padded_width(inputs);
    gradients.weight = zeros(inputs.hidden, shape, inputs.dtype);
  }
  if (need_bias) {
    gradients.bias = zeros(inputs.hidden, shape_of(*bias), inputs.dtype);
  }
  return gradients;
}

// Gradients as the op returns them: in the dtypes of what they belong to, empty where not needed.
std::tuple<Tensor, Tensor, Tensor> finished(
    const Inputs& inputs, const Gradients& gradients, const OptionalTensor& bias) {
  const ScalarType dtype = inputs.hidden.scalar_type();
  Tensor weight = gradients.weight.has_value() ? *gradients.weight : zeros(inputs.weight, {0}, inputs.dtype);
  if (gradients.weight.has_value() && weight.size(weight.dim() - 1) != inputs.width) {
    weight = torch::stable::contiguous(torch::stable::narrow(weight, weight.dim() - 1, 0, inputs.width));
  }
  const Tensor hidden = gradients.hidden.has_value() ? *gradients.hidden : zeros(inputs.hidden, {0}, inputs.dtype);
  const Tensor grad_bias = gradients.bias.has_value() ? *gradients.bias : zeros(inputs.weight, {0}, inputs.dtype);
  return {
      torch::stable::to(hidden, dtype), torch::stable::to(weight, dtype),
      torch::stable::to(grad_bias, bias.has_value() ? bias->scalar_type() : dtype)};
}

// How much a row's loss of each step counts: 1 / valid rows for the mean, times the step's weight.
struct StepScales {
  std::vector<double> reduced;   // without the weight
  std::vector<double> weighted;
};

StepScales step_scales(
    const Inputs& inputs, const std::optional<std::vector<double>>& step_weights,
    const OptionalTensor& step_weights_tensor, int64_t reduction) {
  StepScales scales;
  std::vector<double> weights(inputs.num_steps, 1.0);
  if (step_weights.has_value()) {
    weights = *step_weights;
  } else if (step_weights_tensor.has_value()) {
    const Tensor as_double = torch::stable::contiguous(torch::stable::to(*step_weights_tensor, ScalarType::Double));
    weights.assign(as_double.const_data_ptr<double>(), as_double.const_data_ptr<double>() + inputs.num_steps);
  }
  for (int64_t k = 0; k < inputs.num_steps; ++k) {
    int64_t valid = 0;
    for (int64_t row = 0; row < inputs.num_rows; ++row) {
      valid += inputs.targets[row * inputs.num_steps + k] != inputs.ignore_index;
    }
    scales.reduced.push_back(reduction == kMean ? 1.0 / static_cast<double>(std::max<int64_t>(valid, 1)) : 1.0);
    scales.weighted.push_back(scales.reduced.back() * weights[k]);
  }
  return scales;
}

template <typename scalar>
Tensor from_numbers(const Tensor& like, const std::vector<double>& values, std::vector<int64_t> shape) {
  const Tensor x = torch::stable::new_empty(
      like, shape, sizeof(scalar) == sizeof(double) ? ScalarType::Double : ScalarType::Float);
  std::transform(values.begin(), values.end(), x.mutable_data_ptr<scalar>(), [](double value) {
    return static_cast<scalar>(value);
  });
  return x;
}

Tensor from_numbers(const Inputs& inputs, const std::vector<double>& values, std::vector<int64_t> shape) {
  return inputs.dtype == DType::kFloat64 ? from_numbers<double>(inputs.hidden, values, shape)
                                         : from_numbers<float>(inputs.hidden, values, shape);
}

// (loss, step_losses) from the losses [K, N] of all rows.
template <typename scalar>
std::tuple<Tensor, Tensor> reduced(const Inputs& inputs, const Tensor& losses, const StepScales& scales) {
  std::vector<double> step_losses;
  double total = 0;
  const scalar* loss = losses.const_data_ptr<scalar>();
  for (int64_t k = 0; k < inputs.num_steps; ++k) {
    double sum = 0;
    for (int64_t row = 0; row < inputs.num_rows; ++row) {
      sum += *loss++;
    }
    step_losses.push_back(sum * scales.reduced[k]);
    total += sum * scales.weighted[k];
  }
  return {from_numbers(inputs, {total}, {}), from_numbers(inputs, step_losses, {inputs.num_steps})};
}

std::tuple<Tensor, Tensor> reduced(const Inputs& inputs, const Tensor& losses, const StepScales& scales) {
  return inputs.dtype == DType::kFloat64 ? reduced<double>(inputs, losses, scales)
                                         : reduced<float>(inputs, losses, scales);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const std::optional<std::vector<double>>& step_weights, const OptionalTensor& step_weights_tensor,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, int64_t reduction) {
  const Inputs inputs = inputs_of(
      hidden, weight, targets, bias, vocab_ranges, ignore_index, label_smoothing, z_loss, softcap);
  const Tensor losses = zeros(hidden, {inputs.num_steps, inputs.num_rows}, inputs.dtype);
  const Tensor lse = zeros(hidden, {inputs.num_steps, inputs.num_rows}, inputs.dtype);
  run_all(inputs, {losses.mutable_data_ptr(), lse.mutable_data_ptr(), nullptr, {}, nullptr});
  if (reduction == kNone) {
    return {
        torch::stable::contiguous(torch::stable::transpose(losses, 0, 1)), zeros(hidden, {0}, inputs.dtype),
        zeros(hidden, {0}, inputs.dtype), lse};
  }
  const StepScales scales = step_scales(inputs, step_weights, step_weights_tensor, reduction);
  const auto [loss, step_losses] = reduced(inputs, losses, scales);
  return {loss, step_losses, from_numbers(inputs, scales.weighted, {inputs.num_steps}), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_loss, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const OptionalTensor& bias, const Tensor& lse, const Tensor& step_scale,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, bool need_hidden, bool need_weight, bool need_bias) {
  const Inputs inputs = inputs_of(
      hidden, weight, targets, bias, vocab_ranges, ignore_index, label_smoothing, z_loss, softcap);
  const Tensor grads = torch::stable::contiguous(torch::stable::to(grad_loss, ScalarType::Double));
  const Tensor scales = torch::stable::contiguous(torch::stable::to(step_scale, ScalarType::Double));
  const double* grad = grads.const_data_ptr<double>();
  const double* scale = scales.const_data_ptr<double>();
  const bool is_reduced = step_scale.size(0) > 0;
  const Tensor known_lse = torch::stable::contiguous(torch::stable::to(lse, compute_type(inputs.dtype)));
  Gradients gradients = zero_gradients(inputs, bias, need_hidden, need_weight, need_bias);
  const auto loss_scale = [&](int64_t row, int64_t step) {
    return is_reduced ? *grad * scale[step] : grad[row * inputs.num_steps + step];
  };
  run_all(inputs, {nullptr, nullptr, &gradients, loss_scale, known_lse.const_data_ptr()});
  return finished(inputs, gradients, bias);
}

// Loss and the gradients of the loss in one: the logits are computed once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> with_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
    const std::optional<std::vector<double>>& step_weights, const OptionalTensor& step_weights_tensor,
    const std::optional<std::vector<int64_t>>& vocab_ranges, int64_t ignore_index, double label_smoothing,
    double z_loss, std::optional<double> softcap, int64_t reduction, bool need_hidden, bool need_weight,
    bool need_bias) {
  STD_TORCH_CHECK(reduction != kNone, "gradients in the forward pass want a loss that is one number");
  const Inputs inputs = inputs_of(
      hidden, weight, targets, bias, vocab_ranges, ignore_index, label_smoothing, z_loss, softcap);
  const StepScales scales = step_scales(inputs, step_weights, step_weights_tensor, reduction);
  const Tensor losses = zeros(hidden, {inputs.num_steps, inputs.num_rows}, inputs.dtype);
  Gradients gradients = zero_gradients(inputs, bias, need_hidden, need_weight, need_bias);
  const auto loss_scale = [&](int64_t, int64_t step) { return scales.weighted[step]; };
  run_all(inputs, {losses.mutable_data_ptr(), nullptr, &gradients, loss_scale, nullptr});
  const auto [loss, step_losses] = reduced(inputs, losses, scales);
  const auto [grad_hidden, grad_weight, grad_bias] = finished(inputs, gradients, bias);
  return {loss, step_losses, grad_hidden, grad_weight, grad_bias};
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("multi_token_cross_entropy_forward", TORCH_BOX(&stamp::cpu::forward));
  m.impl("multi_token_cross_entropy_backward", TORCH_BOX(&stamp::cpu::backward));
  m.impl("multi_token_cross_entropy_with_gradients", TORCH_BOX(&stamp::cpu::with_gradients));
}
