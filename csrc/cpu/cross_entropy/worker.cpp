// A row chunk takes five rounds, and every round waits for the tasks of the one before:
//
//   load       hidden states and targets                            a task: kRowMultiple rows
//   sums       maxima and sums of exponentials of the logits        a task: a class split
//   finish     lse = log sum_c exp(l_c), and from it the losses     a task: kRowMultiple rows
//                loss = lse - (1 - s) l_target - s / C sum_c l_c + z lse^2     s: label_smoothing, z: z_loss
//              and the factors of the gradients of the logits
//                dl_c = ((1 + 2 z lse) p_c - s / C - (1 - s) [c is the target]) loss_scale
//   gradients  of weight and bias, and contributions to those of    a task: a class split
//              the rows
//   add        the contributions of the class splits, in order      a task: kRowMultiple rows

#include "cpu/cross_entropy/worker.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "cpu/core/dispatch.h"
#include "cpu/core/tasks.h"
#include "cpu/cross_entropy/kernels.h"

namespace stamp::cpu {

const CrossEntropyKernels& cross_entropy_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? KernelTables<CrossEntropyKernels>::portable_float64
                                  : kernels_of_machine<CrossEntropyKernels>();
}

int64_t padded_width(const CrossEntropyInputs& inputs) {
  return round_up(inputs.width, cross_entropy_kernels(inputs.dtype).vector_width);
}

namespace {

// The matrix of a step in x, [rows, columns] or [K, rows, columns], from row `first_row` on.
MatrixRows matrix_of_step(const Tensor& x, DType dtype, int64_t step, int64_t first_row) {
  const int64_t element_bytes = static_cast<int64_t>(x.element_size()), row_stride = x.stride(x.dim() - 2);
  const int64_t offset = (is_per_step(x, 2) ? step * x.stride(0) : 0) + first_row * row_stride;
  return {static_cast<const char*>(x.const_data_ptr()) + offset * element_bytes, dtype, row_stride};
}

// Takes the rows of one row split after another. The constructor allocates all memory, so that the calling thread makes
// the workers that other threads run.
template <typename scalar>
class Worker {
 public:
  Worker(
      const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
      const CrossEntropyOutputs& outputs)
      : inputs_(inputs),
        softmax_(softmax),
        plan_(plan),
        outputs_(outputs),
        kernels_(cross_entropy_kernels(inputs.dtype)) {
    set_sizes();
    set_inputs();
    set_gradients();
    allocate();
  }

  void run(const int64_t* rows, int64_t num_rows) {
    for_rounds(
        divide_up(num_rows, plan_.rows_per_chunk) * kPhases, num_threads_,
        [&](int64_t round) {
          if (round % kPhases == 0) {
            const int64_t first = round / kPhases * plan_.rows_per_chunk;
            begin_row_chunk(rows + first, std::min(plan_.rows_per_chunk, num_rows - first));
          }
          return num_tasks_of(static_cast<Phase>(round % kPhases));
        },
        [&](int64_t round, int64_t task, int64_t thread) {
          run_task(static_cast<Phase>(round % kPhases), task, scratch_ + thread * scratch_of_thread(scratch_bytes_));
        });
  }

  // What run() adds to: the gradients of the weight [num_classes, padded_width] and the bias [num_classes] of the
  // softmax; null: not needed.
  scalar* grad_weight() const {
    return static_cast<scalar*>(row_chunk_.grad_weight);
  }
  scalar* grad_bias() const {
    return static_cast<scalar*>(row_chunk_.grad_bias);
  }

  // Adds to these instead.
  void set_grad_weight(scalar* grad_weight) {
    row_chunk_.grad_weight = grad_weight;
  }
  void set_grad_bias(scalar* grad_bias) {
    row_chunk_.grad_bias = grad_bias;
  }

 private:
  enum Phase : int64_t { kLoad, kSums, kFinish, kGradients, kAdd, kPhases };

  void set_sizes() {
    row_chunk_.rows_per_block = plan_.rows_per_block;
    row_chunk_.width = inputs_.width;
    row_chunk_.padded_width = padded_width(inputs_);
    row_chunk_.num_classes = softmax_.classes.end - softmax_.classes.start;
    row_chunk_.classes_per_split = plan_.classes_per_split;
    row_chunk_.classes_per_chunk = plan_.classes_per_chunk;
    row_chunk_.num_targets = softmax_.num_steps;
  }

  void set_inputs() {
    hidden_ = matrix_of_step(inputs_.hidden, inputs_.dtype, softmax_.first_step, 0);
    row_chunk_.weight = matrix_of_step(inputs_.weight, inputs_.dtype, softmax_.first_step, softmax_.classes.start);
    row_chunk_.softcap = inputs_.softcap;
    row_chunk_.needs_sum_logits = inputs_.label_smoothing > 0;
    if (inputs_.bias.has_value()) {
      row_chunk_.bias = inputs_.bias->template const_data_ptr<scalar>() + first_class_in(*inputs_.bias, 1);
    }
  }

  void set_gradients() {
    if (outputs_.gradients == nullptr) {
      return;
    }
    const CrossEntropyGradients& gradients = *outputs_.gradients;
    if (gradients.hidden.has_value()) {
      const int64_t step = is_per_step(*gradients.hidden, 2) ? softmax_.first_step : 0;
      grad_hidden_ = gradients.hidden->template mutable_data_ptr<scalar>() + step * inputs_.num_rows * inputs_.width;
    }
    if (gradients.weight.has_value()) {
      row_chunk_.grad_weight = gradients.weight->template mutable_data_ptr<scalar>() +
          first_class_in(*gradients.weight, 2) * row_chunk_.padded_width;
    }
    if (gradients.bias.has_value()) {
      row_chunk_.grad_bias = gradients.bias->template mutable_data_ptr<scalar>() + first_class_in(*gradients.bias, 1);
    }
  }

  // The index of the softmax's first class in x, [V, ...] or [K, V, ...].
  int64_t first_class_in(const Tensor& x, int64_t shared_dims) const {
    return (is_per_step(x, shared_dims) ? softmax_.first_step * inputs_.num_classes : 0) + softmax_.classes.start;
  }

  scalar* allocate(int64_t size) {
    held_.push_back(torch::stable::new_empty(inputs_.hidden, {size}, compute_type(inputs_.dtype)));
    return held_.back().template mutable_data_ptr<scalar>();
  }

  void allocate() {
    const int64_t rows = plan_.rows_per_chunk;
    row_chunk_.num_rows = rows;
    row_chunk_.hidden = allocate(rows * round_up(inputs_.width, kernels_.panel_width));
    row_chunk_.hidden_transposed = allocate(rows * inputs_.width);
    if (plan_.keeps_logits) {
      row_chunk_.logits = allocate(plan_.logits_size);
      row_chunk_.class_chunk_max = allocate(rows * divide_up(row_chunk_.num_classes, plan_.classes_per_chunk));
    }
    const int64_t split_size = rows * plan_.num_class_splits, target_size = rows * softmax_.num_steps;
    row_chunk_.class_split_max = split_max_ = allocate(split_size);
    row_chunk_.class_split_sum = split_sum_ = allocate(split_size);
    row_chunk_.class_split_sum_logits = split_sum_logits_ = allocate(row_chunk_.needs_sum_logits ? split_size : 0);
    row_chunk_.lse = lse_ = allocate(rows);
    row_chunk_.probability_scale = probability_scale_ = allocate(rows);
    row_chunk_.offset = offset_ = allocate(rows);
    targets_.resize(target_size);
    row_chunk_.targets = targets_.data();
    row_chunk_.target_logits = target_logits_ = allocate(target_size);
    row_chunk_.target_weights = target_weights_ = allocate(target_size);
    if (grad_hidden_ != nullptr) {
      row_chunk_.grad_hidden_splits = grad_hidden_splits_ = allocate(plan_.grad_hidden_splits_size);
    }
    scratch_bytes_ = kernels_.scratch_bytes(row_chunk_);
    num_threads_ = std::min<int64_t>(plan_.num_class_splits, torch::stable::get_num_threads());
    held_.push_back(
        torch::stable::new_empty(inputs_.hidden, {num_threads_ * scratch_of_thread(scratch_bytes_)}, ScalarType::Byte));
    scratch_ = static_cast<char*>(held_.back().mutable_data_ptr());
  }

  void begin_row_chunk(const int64_t* rows, int64_t num_given) {
    rows_ = rows;
    num_given_ = num_given;
    row_chunk_.num_rows = round_up(num_given, kRowMultiple);
  }

  int64_t num_tasks_of(Phase phase) const {
    switch (phase) {
      case kSums:
        return outputs_.known_lse == nullptr ? plan_.num_class_splits : 0;
      case kGradients:
        return outputs_.gradients != nullptr ? plan_.num_class_splits : 0;
      case kAdd:
        return grad_hidden_ != nullptr ? row_chunk_.num_rows / kRowMultiple : 0;
      default:
        return row_chunk_.num_rows / kRowMultiple;
    }
  }

  void run_task(Phase phase, int64_t task, char* scratch) {
    const int64_t start = task * kRowMultiple, end = start + kRowMultiple;
    switch (phase) {
      case kLoad:
        kernels_.load_hidden(row_chunk_, hidden_, rows_, num_given_, start, scratch);
        load_targets(start, end);
        break;
      case kSums:
        kernels_.sums(row_chunk_, task, scratch);
        break;
      case kFinish:
        for (int64_t i = start; i < end; ++i) {
          finish_row(i);
        }
        break;
      case kGradients:
        // Backwards: the logits and the weight of the last class splits may still be in a cache.
        kernels_.gradients(row_chunk_, plan_.num_class_splits - 1 - task, scratch);
        break;
      default:
        add_to_grad_hidden(start, std::min(end, num_given_));
    }
  }

  void load_targets(int64_t start, int64_t end) {
    for (int64_t k = 0; k < softmax_.num_steps; ++k) {
      const int64_t step = softmax_.first_step + k;
      for (int64_t i = start; i < end; ++i) {
        const bool has_target = i < num_given_ && inputs_.has_target(rows_[i], step);
        targets_[k * row_chunk_.num_rows + i] =
            has_target ? inputs_.target(rows_[i], step) - softmax_.classes.start : -1;
      }
    }
  }

  // The lse and the losses of row i of the chunk, and the factors of its gradients.
  void finish_row(int64_t i) {
    lse_[i] = std::numeric_limits<scalar>::infinity();
    probability_scale_[i] = offset_[i] = 0;
    if (i >= num_given_) {
      return;
    }
    const double smoothing = inputs_.label_smoothing, num_classes = static_cast<double>(row_chunk_.num_classes);
    const scalar lse = outputs_.known_lse == nullptr ? lse_of_row(i) : known_lse_of_row(i);
    // The only class has p = 1: without z_loss its gradient is exactly 0, which must not be left to cancellation.
    const double without_z_loss = row_chunk_.num_classes == 1 ? 0 : 1;
    double sum_of_scales = 0;
    for (int64_t k = 0; k < softmax_.num_steps; ++k) {
      const int64_t step = softmax_.first_step + k, at = k * row_chunk_.num_rows + i;
      if (targets_[at] < 0) {
        continue;
      }
      const int64_t output = step * inputs_.num_rows + rows_[i];
      if (outputs_.losses != nullptr) {
        double loss = lse - (1 - smoothing) * target_logits_[at] + inputs_.z_loss * lse * lse;
        if (smoothing > 0) {
          loss -= smoothing * sum_logits_of_row(i) / num_classes;
        }
        static_cast<scalar*>(outputs_.losses)[output] = static_cast<scalar>(loss);
      }
      if (outputs_.lse != nullptr) {
        static_cast<scalar*>(outputs_.lse)[output] = lse;
      }
      if (outputs_.gradients != nullptr) {
        const double scale = outputs_.loss_scale(rows_[i], step);
        sum_of_scales += scale;
        target_weights_[at] = static_cast<scalar>(without_z_loss * (1 - smoothing) * scale);
      }
    }
    lse_[i] = lse;
    probability_scale_[i] = static_cast<scalar>((without_z_loss + 2 * inputs_.z_loss * lse) * sum_of_scales);
    offset_[i] = static_cast<scalar>(without_z_loss * smoothing / num_classes * sum_of_scales);
  }

  scalar known_lse_of_row(int64_t i) const {
    int64_t k = 0;  // the first step with a target: the others have no lse
    while (targets_[k * row_chunk_.num_rows + i] < 0) {
      ++k;
    }
    return static_cast<const scalar*>(outputs_.known_lse)[(softmax_.first_step + k) * inputs_.num_rows + rows_[i]];
  }

  scalar lse_of_row(int64_t i) const {
    scalar max = -std::numeric_limits<scalar>::infinity(), sum = 0;
    for (int64_t split = 0; split < plan_.num_class_splits; ++split) {
      max = std::max(max, split_max_[split * row_chunk_.num_rows + i]);
    }
    for (int64_t split = 0; split < plan_.num_class_splits; ++split) {
      const int64_t at = split * row_chunk_.num_rows + i;
      if (split_sum_[at] != 0) {  // 0 where all logits are -inf
        sum += split_sum_[at] * std::exp(split_max_[at] - max);
      }
    }
    return max + std::log(sum);
  }

  scalar sum_logits_of_row(int64_t i) const {
    scalar sum = 0;
    for (int64_t split = 0; split < plan_.num_class_splits; ++split) {
      sum += split_sum_logits_[split * row_chunk_.num_rows + i];
    }
    return sum;
  }

  void add_to_grad_hidden(int64_t start, int64_t end) {
    for (int64_t i = start; i < end; ++i) {
      scalar* to = grad_hidden_ + rows_[i] * inputs_.width;
      for (int64_t split = 0; split < plan_.num_class_splits; ++split) {
        const scalar* from = grad_hidden_splits_ + (split * row_chunk_.num_rows + i) * row_chunk_.padded_width;
        for (int64_t d = 0; d < inputs_.width; ++d) {
          to[d] += from[d];
        }
      }
    }
  }

  const CrossEntropyInputs& inputs_;
  const Softmax& softmax_;
  const CrossEntropyPlan& plan_;
  const CrossEntropyOutputs& outputs_;
  const CrossEntropyKernels& kernels_;
  MatrixRows hidden_;
  scalar* grad_hidden_ = nullptr;
  int64_t num_threads_;

  // The row chunk, and memory that its pointers point into.
  CrossEntropyRowChunk row_chunk_ = {};
  const int64_t* rows_;  // of hidden
  int64_t num_given_;    // rows in the chunk
  std::vector<int64_t> targets_;
  scalar *target_logits_, *target_weights_;
  scalar *split_max_, *split_sum_, *split_sum_logits_;
  scalar *lse_, *probability_scale_, *offset_;
  scalar* grad_hidden_splits_;
  int64_t scratch_bytes_;  // of a thread
  char* scratch_;
  std::vector<Tensor> held_;
};

// Memory for a result [size] of every row split, which is then added to the result of all rows.
template <typename scalar>
class SplitResult {
 public:
  // A null `result` is not needed, and needs no memory.
  SplitResult(const CrossEntropyInputs& inputs, scalar* result, int64_t num_splits, int64_t size)
      : result_(result),
        num_splits_(num_splits),
        size_(result == nullptr ? 0 : size),
        held_(torch::stable::new_empty(inputs.hidden, {num_splits * size_}, compute_type(inputs.dtype))),
        splits_(held_.mutable_data_ptr<scalar>()) {}

  // The memory of one row split, filled with zeros; null: not needed.
  scalar* zeros_of_split(int64_t split) const {
    if (result_ == nullptr) {
      return nullptr;
    }
    std::fill_n(splits_ + split * size_, size_, scalar{0});
    return splits_ + split * size_;
  }

  // result[i] += the splits' results, in their order.
  void add_up() const {
    constexpr int64_t kNumbersPerTask = 16 << 10;
    const int64_t num_tasks = divide_up(size_, kNumbersPerTask);
    const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
    for_tasks_of_threads(num_tasks, num_threads, [&](int64_t task, int64_t) {
      const int64_t end = std::min((task + 1) * kNumbersPerTask, size_);
      for (int64_t split = 0; split < num_splits_; ++split) {
        for (int64_t i = task * kNumbersPerTask; i < end; ++i) {
          result_[i] += splits_[split * size_ + i];
        }
      }
    });
  }

 private:
  scalar* result_;
  int64_t num_splits_;
  int64_t size_;
  Tensor held_;
  scalar* splits_;
};

// Threads take row splits, each thread with a worker of its own.
template <typename scalar>
void run_row_splits(
    const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
    const CrossEntropyOutputs& outputs) {
  const int64_t num_threads = std::min<int64_t>(plan.num_row_splits, torch::stable::get_num_threads());
  std::vector<Worker<scalar>> workers;
  workers.reserve(num_threads);
  for (int64_t thread = 0; thread < num_threads; ++thread) {
    workers.emplace_back(inputs, softmax, plan, outputs);
  }
  const int64_t num_rows = static_cast<int64_t>(softmax.rows.size());
  const int64_t num_classes = softmax.classes.end - softmax.classes.start;
  const SplitResult<scalar> weight(
      inputs, workers[0].grad_weight(), plan.num_row_splits, plan.grad_weight_splits_size / plan.num_row_splits);
  const SplitResult<scalar> bias(inputs, workers[0].grad_bias(), plan.num_row_splits, num_classes);
  for_tasks_of_threads(plan.num_row_splits, num_threads, [&](int64_t split, int64_t thread) {
    workers[thread].set_grad_weight(weight.zeros_of_split(split));
    workers[thread].set_grad_bias(bias.zeros_of_split(split));
    const int64_t first = split * plan.rows_per_split;
    workers[thread].run(softmax.rows.data() + first, std::min(plan.rows_per_split, num_rows - first));
  });
  weight.add_up();
  bias.add_up();
}

template <typename scalar>
void run_softmax_as(
    const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
    const CrossEntropyOutputs& outputs) {
  if (plan.num_row_splits > 1) {
    run_row_splits<scalar>(inputs, softmax, plan, outputs);
  } else {
    Worker<scalar>(inputs, softmax, plan, outputs).run(softmax.rows.data(), static_cast<int64_t>(softmax.rows.size()));
  }
}

}  // namespace

void run_softmax(
    const CrossEntropyInputs& inputs, const Softmax& softmax, const CrossEntropyPlan& plan,
    const CrossEntropyOutputs& outputs) {
  if (inputs.dtype == DType::kFloat64) {
    run_softmax_as<double>(inputs, softmax, plan, outputs);
  } else {
    run_softmax_as<float>(inputs, softmax, plan, outputs);
  }
}

}  // namespace stamp::cpu
