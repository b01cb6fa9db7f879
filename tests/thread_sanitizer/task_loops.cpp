// The loops of cpu/core/tasks.h, used as the kernels use them: every task writes memory of its own without atomics, a
// round reads what the round before wrote, and the threads keep their scratch memory. Ends with status 1 if a task ran
// never or twice, or saw another round's memory. The thread sanitizer ends it with status 66.

#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/core/tasks.h"

namespace {

constexpr int64_t kThreads = 4;

bool every_task_runs_once() {
  constexpr int64_t kTasks = 2000, kScratchBytes = 40;
  std::vector<int64_t> runs(kTasks);
  std::vector<char> scratch(kThreads * stamp::cpu::scratch_of_thread(kScratchBytes));
  stamp::cpu::for_tasks(kTasks, kThreads, scratch.data(), kScratchBytes, [&](int64_t task, char* of_thread) {
    for (int64_t i = 0; i < kScratchBytes; ++i) {
      of_thread[i] = static_cast<char>(task);
    }
    runs[task] += of_thread[0] == static_cast<char>(task);
  });
  for (const int64_t n : runs) {
    if (n != 1) {
      return false;
    }
  }
  return true;
}

// Task i of a round is 1 + task i and task i + 1 of the round before. Some rounds have no tasks.
bool every_round_sees_the_one_before() {
  constexpr int64_t kRounds = 300, kTasks = 17;
  const auto num_tasks = [](int64_t round) { return round % 5 == 3 ? 0 : kTasks; };
  std::vector<int64_t> before(kTasks), after(kTasks), runs_of_thread(kThreads);
  stamp::cpu::for_rounds(
      kRounds, kThreads,
      [&](int64_t round) {
        if (num_tasks(round) > 0) {
          before.swap(after);
        }
        return num_tasks(round);
      },
      [&](int64_t, int64_t task, int64_t thread) {
        after[task] = 1 + (before[task] > before[(task + 1) % kTasks] ? before[task] : before[(task + 1) % kTasks]);
        ++runs_of_thread[thread];
      });
  int64_t rounds = 0, runs = 0;
  for (int64_t round = 0; round < kRounds; ++round) {
    rounds += num_tasks(round) > 0;
  }
  for (const int64_t n : runs_of_thread) {
    runs += n;
  }
  for (const int64_t x : after) {
    if (x != rounds) {
      return false;
    }
  }
  return runs == rounds * kTasks;
}

}  // namespace

int main() {
  for (int repeat = 0; repeat < 5; ++repeat) {
    if (!every_task_runs_once() || !every_round_sees_the_one_before()) {
      std::puts("a task ran never or twice, or saw the memory of another round");
      return 1;
    }
  }
  return 0;
}
