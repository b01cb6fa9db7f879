// Parallel loops: the tasks of an op, and the threads that run them.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include <torch/csrc/stable/ops.h>

#include "cpu/core/arithmetic.h"

namespace stamp::cpu {

// The scratch memory of one thread, in whole cache lines.
constexpr int64_t scratch_of_thread(int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  return round_up(bytes, kCacheLine);
}

// Calls run(task, thread) for every task, from the threads 0 to num_threads - 1. Task costs vary, so each thread takes
// the next task when it is free. `run` must not throw: an exception loses its message inside a worker thread.
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

// The same with run(task, scratch): thread t has the memory from t * scratch_of_thread(scratch_bytes) on.
template <typename Run>
void for_tasks(int64_t num_tasks, int64_t num_threads, char* scratch, int64_t scratch_bytes, const Run& run) {
  for_tasks_of_threads(num_tasks, num_threads, [&](int64_t task, int64_t thread) {
    run(task, scratch + thread * scratch_of_thread(scratch_bytes));
  });
}

// Runs rounds of tasks: a round starts when all tasks of the round before are done. One thread calls begin(round),
// which returns the number of the round's tasks. Then the threads call run(round, task, thread) for all of them.
//
// All rounds share one parallel region. Other thread pools can make OpenMP's threads sleep between regions, and waking
// them for every round took up to 20 % of the time of an op with a hundred rounds. A round waits for its tasks, not for
// threads: a thread that never arrives does not block the round.
template <typename Begin, typename Run>
void for_rounds(int64_t num_rounds, int64_t num_threads, const Begin& begin, const Run& run) {
  if (num_threads == 1) {
    for (int64_t round = 0; round < num_rounds; ++round) {
      const int64_t num_tasks = begin(round);
      for (int64_t task = 0; task < num_tasks; ++task) {
        run(round, task, 0);
      }
    }
    return;
  }
  // One word holds the round, its number of tasks and the next task, so that a thread that takes a task knows its
  // round.
  constexpr uint64_t kTotal = uint64_t{1} << 20, kRound = uint64_t{1} << 40;
  std::atomic<uint64_t> next{0};
  std::atomic<int64_t> num_left{0};  // unfinished tasks of the round
  const auto enter = [&](int64_t round) {
    int64_t num_tasks = 0;
    while (round < num_rounds && (num_tasks = begin(round)) == 0) {
      ++round;
    }
    num_left = num_tasks;
    next = static_cast<uint64_t>(round) * kRound + static_cast<uint64_t>(num_tasks) * kTotal;
  };
  const auto wait_for_end_of = [&](uint64_t round) {
    constexpr int kSpins = 4096;
    for (int i = 0; next / kRound == round; ++i) {
      if (i >= kSpins) {
        std::this_thread::yield();
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  };
  enter(0);
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t thread, int64_t) {
    while (true) {
      const uint64_t taken = next++;
      const uint64_t round = taken / kRound, num_tasks = taken % kRound / kTotal, task = taken % kTotal;
      if (static_cast<int64_t>(round) == num_rounds) {
        return;
      }
      if (task >= num_tasks) {
        wait_for_end_of(round);
        continue;
      }
      run(static_cast<int64_t>(round), static_cast<int64_t>(task), thread);
      if (--num_left == 0) {
        enter(static_cast<int64_t>(round) + 1);
      }
    }
  });
}

}  // namespace stamp::cpu
