// Cross-entropy of several steps from hidden states, a group of rows at a time: their logits, transposed, are all that is
// ever there of the logits. What is computed is written in cross_entropy_tiles.h.
//
// A pass is a softmax: the rows of one hidden [N, width] against the classes of one weight. Steps that share hidden and
// classes share a pass, and a row then has a label for each. Rows without a label are left out.
//
// Threads share a group in three rounds: chunks of classes (logits), chunks of classes (gradients, those of the weight
// included), rows (their gradients). Nothing is added up by two threads, so the bits do not depend on their number.

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

#include "arguments.h"
#include "capability.h"
#include "cross_entropy_kernels.h"
#include "tasks.h"

namespace stamp::cpu {

const CrossEntropyKernels& cross_entropy_kernels(DType dtype) {
  if (dtype == DType::kFloat64) {
    return kCrossEntropyPortableFloat64;
  }
  [[maybe_unused]] const Capability capability = chosen_capability();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) {
    return kCrossEntropyAvx512;
  }
  if (capability == Capability::kAvx2) {
    return kCrossEntropyAvx2;
  }
#endif
  return kCrossEntropyPortable;
}

namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// Sizes, by measurement; what they are is part of the bits of a result. The logits of a group should stay in the second
// cache, but fewer rows than this leave too little to do for the weight that is read for them.
constexpr int64_t kLogitBytesPerGroup = 1 << 20;
constexpr int64_t kLeastRowsPerGroup = 128, kMostRowsPerGroup = 1024;
// The weight of a chunk of classes stays in the second cache while a group's rows pass; small vocabularies still are
// several chunks, so that threads can share them.
constexpr int64_t kWeightBytesPerChunk = 256 * 1024;
constexpr int64_t kLeastClassesPerChunk = 32, kMostClassesPerChunk = 256, kChunksOfFewClasses = 8;
constexpr int64_t kRowsPerTask = 64;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

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

ScalarType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
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
};

template <typename scalar>
scalar* numbers(const Tensor& x) {
  return x.mutable_data_ptr<scalar>();
}

int64_t classes_per_chunk(int64_t num_classes, int64_t row_bytes) {
  const int64_t by_weight = kWeightBytesPerChunk / std::max<int64_t>(row_bytes, 1) / kLeastClassesPerChunk;
  const int64_t most = std::clamp(by_weight * kLeastClassesPerChunk, 2 * kLeastClassesPerChunk, kMostClassesPerChunk);
  return std::clamp(round_up(num_classes / kChunksOfFewClasses, kLeastClassesPerChunk), kLeastClassesPerChunk, most);
}

// One softmax: the steps [first_step, end_step) of the rows that have a label in one of them.
template <typename scalar>
class Pass {
 public:
  Pass(const Inputs& inputs, int64_t first_step, int64_t end_step, const Wanted& wanted)
      : inputs_(inputs), wanted_(wanted), kernels_(cross_entropy_kernels(inputs.dtype)), first_step_(first_step),
        num_labels_(end_step - first_step), first_class_(inputs.starts[first_step]) {
    for (int64_t row = 0; row < inputs.num_rows; ++row) {
      for (int64_t k = first_step; k < end_step; ++k) {
        if (inputs.targets[row * inputs.num_steps + k] != inputs.ignore_index) {
          rows_.push_back(row);
          break;
        }
      }
    }
    const int64_t num_classes = inputs.ends[first_step] - first_class_;
    block_.width = inputs.width;
    block_.row = round_up(inputs.width, kernels_.vector_width);
    block_.num_classes = num_classes;
    block_.chunk_classes = classes_per_chunk(num_classes, block_.row * static_cast<int64_t>(sizeof(scalar)));
    num_chunks_ = (num_classes + block_.chunk_classes - 1) / block_.chunk_classes;
    const int64_t by_logits = kLogitBytesPerGroup / (num_classes * static_cast<int64_t>(sizeof(scalar)));
    rows_per_group_ = std::min(
        round_up(std::clamp(by_logits, kLeastRowsPerGroup, kMostRowsPerGroup), kRowsPerVector),
        round_up(std::max<int64_t>(rows_.size(), 1), kRowsPerVector));
    point_into_inputs();
    allocate();
  }

  void run() {
    const int64_t num_rows = static_cast<int64_t>(rows_.size());
    for (int64_t first = 0; first < num_rows; first += rows_per_group_) {
      run_group(rows_.data() + first, std::min(rows_per_group_, num_rows - first));
    }
  }

 private:
  static MatrixRows rows_of(const Tensor& x, DType dtype, int64_t step, int64_t first_row) {
    const int64_t size = static_cast<int64_t>(x.element_size()), row_stride = x.stride(x.dim() - 2);
    const int64_t offset = (is_per_step(x, 2) ? step * x.stride(0) : 0) + first_row * row_stride;
    return {static_cast<const char*>(x.const_data_ptr()) + offset * size, dtype, row_stride};
  }

  void point_into_inputs() {
    hidden_ = rows_of(inputs_.hidden, inputs_.dtype, first_step_, 0);
    block_.weight = rows_of(inputs_.weight, inputs_.dtype, first_step_, first_class_);
    block_.softcap = inputs_.softcap;
    block_.sum_logits = inputs_.label_smoothing > 0;
    if (inputs_.bias.has_value()) {
      const int64_t step = is_per_step(*inputs_.bias, 1) ? first_step_ : 0;
      block_.bias = inputs_.bias->template const_data_ptr<scalar>() + step * inputs_.num_classes + first_class_;
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
      block_.grad_weight =
          numbers<scalar>(*gradients.weight) + (step * inputs_.num_classes + first_class_) * block_.row;
    }
    if (gradients.bias.has_value()) {
      const int64_t step = is_per_step(*gradients.bias, 1) ? first_step_ : 0;
      block_.grad_bias = numbers<scalar>(*gradients.bias) + step * inputs_.num_classes + first_class_;
    }
  }

  scalar* take(int64_t size) {
    held_.push_back(torch::stable::new_empty(inputs_.hidden, {size}, compute_type(inputs_.dtype)));
    return numbers<scalar>(held_.back());
  }

  void allocate() {
    const int64_t rows = rows_per_group_;
    block_.num_rows = rows;
    block_.x = x_ = take(rows * block_.row);
    block_.x_transposed = take(rows * block_.width);
    block_.logits = logits_ = take(rows * block_.num_classes);
    block_.chunk_max = chunk_max_ = take(rows * num_chunks_);
    block_.chunk_sum = chunk_sum_ = take(rows * num_chunks_);
    block_.chunk_sum_logits = chunk_sum_logits_ = take(block_.sum_logits ? rows * num_chunks_ : 0);
    block_.lse = lse_ = take(rows);
    block_.probability_scale = probability_scale_ = take(rows);
    block_.offset = offset_ = take(rows);
    labels_.resize(rows * num_labels_);
    block_.labels = labels_.data();
    block_.num_labels = num_labels_;
    block_.label_weights = label_weights_ = take(rows * num_labels_);
    block_.label_slopes = take(block_.softcap > 0 ? rows * num_labels_ : 0);
    block_.grad_x = grad_x_ = take(grad_hidden_ != nullptr ? rows * block_.row : 0);
    scratch_bytes_ = kernels_.scratch_bytes(block_);
    held_.push_back(torch::stable::new_empty(
        inputs_.hidden, {torch::stable::get_num_threads() * scratch_of_thread(scratch_bytes_)}, ScalarType::Byte));
    scratch_ = static_cast<char*>(held_.back().mutable_data_ptr());
  }

  int64_t target(int64_t row, int64_t label) const {
    return inputs_.targets[row * inputs_.num_steps + first_step_ + label];
  }

  template <typename Run>
  void for_parts(int64_t num_parts, const Run& run) {
    const int64_t num_threads = std::min<int64_t>(num_parts, torch::stable::get_num_threads());
    for_tasks(num_parts, num_threads, scratch_, scratch_bytes_, run);
  }

  void run_group(const int64_t* rows, int64_t num_given) {
    block_.num_rows = round_up(num_given, kRowsPerVector);
    for_parts(block_.num_rows / kRowsPerVector, [&](int64_t part, char*) {
      const int64_t begin = part * kRowsPerVector;
      kernels_.load_x(block_, hidden_, rows, num_given, begin, begin + kRowsPerVector);
    });
    for_parts(num_chunks_, [&](int64_t chunk, char* scratch) { kernels_.logits(block_, chunk, scratch); });
    finish_rows(rows, num_given);
    if (wanted_.gradients == nullptr) {
      return;
    }
    for_parts(num_chunks_, [&](int64_t chunk, char*) { kernels_.gradients(block_, chunk); });
    if (grad_hidden_ != nullptr) {
      for_parts((num_given + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t part, char* scratch) {
        const int64_t begin = part * kRowsPerTask;
        add_gradient_of_rows(rows, begin, std::min(begin + kRowsPerTask, num_given), scratch);
      });
    }
  }

  void add_gradient_of_rows(const int64_t* rows, int64_t begin, int64_t end, char* scratch) {
    kernels_.gradient_of_rows(block_, begin, end, scratch);
    for (int64_t i = begin; i < end; ++i) {
      scalar* to = grad_hidden_ + rows[i] * inputs_.width;
      for (int64_t d = 0; d < inputs_.width; ++d) {
        to[d] += grad_x_[i * block_.row + d];
      }
    }
  }

  // From the chunks' sums to every row's lse and losses, and to what its gradients need.
  void finish_rows(const int64_t* rows, int64_t num_given) {
    for (int64_t i = 0; i < block_.num_rows; ++i) {
      lse_[i] = std::numeric_limits<scalar>::infinity();
      probability_scale_[i] = offset_[i] = 0;
      for (int64_t label = 0; label < num_labels_; ++label) {
        labels_[label * block_.num_rows + i] = -1;
        label_weights_[label * block_.num_rows + i] = 0;
      }
      if (i < num_given) {
        finish_row(rows[i], i);
      }
    }
  }

  void finish_row(int64_t row, int64_t i) {
    scalar largest = -std::numeric_limits<scalar>::infinity(), sum = 0, sum_logits = 0;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      largest = std::max(largest, chunk_max_[chunk * block_.num_rows + i]);
    }
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      const int64_t at = chunk * block_.num_rows + i;
      if (chunk_sum_[at] != 0) {
        sum += chunk_sum_[at] * std::exp(chunk_max_[at] - largest);
      }
      sum_logits += block_.sum_logits ? chunk_sum_logits_[at] : scalar{0};
    }
    const scalar lse = largest + std::log(sum);
    lse_[i] = lse;
    const double smoothing = inputs_.label_smoothing, num_classes = static_cast<double>(block_.num_classes);
    double scales = 0;
    for (int64_t label = 0; label < num_labels_; ++label) {
      const int64_t step = first_step_ + label, at = label * block_.num_rows + i;
      if (target(row, label) == inputs_.ignore_index) {
        continue;
      }
      const int64_t index = target(row, label) - first_class_;
      if (wanted_.losses != nullptr) {
        double loss = lse - (1 - smoothing) * logits_[index * block_.num_rows + i] + inputs_.z_loss * lse * lse;
        if (smoothing > 0) {
          loss -= smoothing * sum_logits / num_classes;
        }
        static_cast<scalar*>(wanted_.losses)[step * inputs_.num_rows + row] = static_cast<scalar>(loss);
      }
      if (wanted_.lse != nullptr) {
        static_cast<scalar*>(wanted_.lse)[step * inputs_.num_rows + row] = lse;
      }
      if (wanted_.gradients != nullptr) {
        const double scale = wanted_.loss_scale(row, step);
        scales += scale;
        labels_[at] = index;
        label_weights_[at] = static_cast<scalar>((1 - smoothing) * scale);
      }
    }
    probability_scale_[i] = static_cast<scalar>((1 + 2 * inputs_.z_loss * lse) * scales);
    offset_[i] = static_cast<scalar>(smoothing / num_classes * scales);
  }

  const Inputs& inputs_;
  const Wanted& wanted_;
  const CrossEntropyKernels& kernels_;
  int64_t first_step_;
  int64_t num_labels_;
  int64_t first_class_;
  int64_t rows_per_group_;
  int64_t num_chunks_;
  std::vector<int64_t> rows_;
  MatrixRows hidden_;
  CrossEntropyBlock block_ = {};
  scalar *x_, *logits_, *chunk_max_, *chunk_sum_, *chunk_sum_logits_, *lse_, *probability_scale_, *offset_;
  scalar *label_weights_, *grad_x_, *grad_hidden_ = nullptr;
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

template <typename scalar>
void run_passes(const Inputs& inputs, const Wanted& wanted) {
  const int64_t steps_per_pass = is_one_softmax(inputs) ? inputs.num_steps : 1;
  for (int64_t step = 0; step < inputs.num_steps; step += steps_per_pass) {
    Pass<scalar>(inputs, step, step + steps_per_pass, wanted).run();
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

Gradients zero_gradients(const Inputs& inputs, const OptionalTensor& bias, bool need_hidden, bool need_weight, bool need_bias) {
  Gradients gradients;
  if (need_hidden) {
    gradients.hidden = zeros(inputs.hidden, shape_of(inputs.hidden), inputs.dtype);
  }
  if (need_weight) {
    std::vector<int64_t> shape = shape_of(inputs.weight);
    shape.back() = round_up(shape.back(), cross_entropy_kernels(inputs.dtype).vector_width);
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
  run_all(inputs, {losses.mutable_data_ptr(), lse.mutable_data_ptr(), nullptr, {}});
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
  Gradients gradients = zero_gradients(inputs, bias, need_hidden, need_weight, need_bias);
  run_all(inputs, {nullptr, nullptr, &gradients, [&](int64_t row, int64_t step) {
                     return is_reduced ? *grad * scale[step] : grad[row * inputs.num_steps + step];
                   }});
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
  run_all(inputs, {losses.mutable_data_ptr(), nullptr, &gradients, [&](int64_t, int64_t step) {
                     return scales.weighted[step];
                   }});
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
