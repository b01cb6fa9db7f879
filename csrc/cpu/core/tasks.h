// The threads that do the tasks of an op.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

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

// Rounds of tasks, each round when all tasks of the one before are done. One thread calls begin(round), which says how
// many tasks the round has, then threads call run(round, task, thread) for all of them.
//
// Threads meet within one parallel region: where other pools of threads have made OpenMP's sleep between regions, waking
// them for every round took up to 20 % of the time of an op with a hundred rounds. A round waits for its tasks, not for
// threads: those that come late, or never, are not missed.
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
  // The round, its number of tasks and the next one in one word: whoever takes a task knows of which round it is.
  constexpr uint64_t kTotal = uint64_t{1} << 20, kRound = uint64_t{1} << 40;
  std::atomic<uint64_t> next{0};
  std::atomic<int64_t> num_left{0};  // tasks of the round that are not done
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
