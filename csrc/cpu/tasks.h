// The threads that do the tasks of an op.

#pragma once

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace stamp::cpu {

// Memory of one thread, in whole cache lines.
constexpr int64_t scratch_of_thread(int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

// Calls run(task, thread) for every task, from the threads 0 to num_threads - 1. Tasks cost unlike much, so threads take
// them one by one, in rising order. `run` must not throw: the text would be lost.
template <typename Run>
void for_tasks_of_threads(int64_t num_tasks, int64_t num_threads, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next++; task < num_tasks; task = next++) {
        run(task, thread);
      }
    }
  });
}

// Calls run(task, scratch) likewise, thread t with the memory from t * scratch_of_thread(scratch_bytes) on.
template <typename Run>
void for_tasks(int64_t num_tasks, int64_t num_threads, char* scratch, int64_t scratch_bytes, const Run& run) {
  for_tasks_of_threads(num_tasks, num_threads, [&](int64_t task, int64_t thread) {
    run(task, scratch + thread * scratch_of_thread(scratch_bytes));
  });
}

}  // namespace stamp::cpu
