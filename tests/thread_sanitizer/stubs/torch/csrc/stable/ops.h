// torch::stable::parallel_for on threads that the thread sanitizer sees: it does not see those of OpenMP.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

// f(i, i + 1) for every i in [begin, end), each in a thread of its own.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t /* grain_size */, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) {
    threads.emplace_back([&f, i] { f(i, i + 1); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace torch::stable
