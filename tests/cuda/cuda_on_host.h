// An emulator that runs the device code of csrc/cuda on the CPU, for tests on machines without a GPU.
//
// The threads of a block are fibers on one OS thread, and blocks run one after the other. A fiber runs until it waits
// for others: at __syncthreads() for the block, at a collective of its warp for the lanes. If every remaining fiber
// waits, the threads have diverged, and the process aborts with a message. A warp runs as far as it can before the next
// warp starts, in rising or in falling order (reverse_threads), so that a missing barrier shows in one of the two
// orders. Shared memory is filled with garbage before every block. Two things that a GPU may do are not emulated: it
// reorders memory accesses, and it runs blocks and threads at the same time.

#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// One OS thread runs everything, so thread_local changes nothing but the place: only shared memory is in the library's
// thread-local segment, where poison_shared_memory finds it.
#define __shared__ static thread_local

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

inline bool reverse_threads = false;
inline int64_t num_launches = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the CPU: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

enum class Collective { kNone, kBarrier, kSync, kBallot, kShuffleXor, kShuffleUp, kReduceAdd };

// A point where `members` threads meet and exchange values. The values are kept until all threads meet again.
struct Meeting {
  int members = 0;
  int arrived = 0;
  int64_t round = 0;
  Collective kind = Collective::kNone;
  size_t value_bytes = 0;
  alignas(16) char arriving[kLanes][16];
  alignas(16) char values[kLanes][16];
};

struct Fiber {
  ucontext_t first_entry;
  jmp_buf resume_point;
  bool is_started = false;
  bool is_finished = false;
  const Meeting* waits_for = nullptr;
  int64_t waits_for_round = 0;
};

struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::unique_ptr<char[]> stacks{new char[kMaxThreads * kStackBytes]};
  Meeting barrier;
  Meeting warps[kMaxThreads / kLanes];
  std::function<void()> kernel;
  ucontext_t scheduler_context;
  jmp_buf scheduler;
  int current = 0;
};

inline Block& block() {
  static Block the_block;
  return the_block;
}

inline void fiber_main() {
  Block& b = block();
  b.kernel();
  b.fibers[b.current].is_finished = true;
  _longjmp(b.scheduler, 1);
}

// Waits until all members of the meeting have arrived, each with a value.
inline void meet(Meeting& meeting, Collective kind, int place, const void* value, size_t value_bytes) {
  Block& b = block();
  if (meeting.arrived == 0) {
    meeting.kind = kind;
    meeting.value_bytes = value_bytes;
  } else if (meeting.kind != kind || meeting.value_bytes != value_bytes) {
    fail("lanes of a warp met in different collectives");
  }
  if (value_bytes > 0) {
    std::memcpy(meeting.arriving[place], value, value_bytes);
  }
  if (++meeting.arrived == meeting.members) {
    std::memcpy(meeting.values, meeting.arriving, sizeof(meeting.values));
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  Fiber& fiber = b.fibers[b.current];
  fiber.waits_for = &meeting;
  fiber.waits_for_round = meeting.round + 1;
  if (_setjmp(fiber.resume_point) == 0) {
    _longjmp(b.scheduler, 1);
  }
}

inline void resume(int thread) {
  Block& b = block();
  b.current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  Fiber& fiber = b.fibers[thread];
  if (_setjmp(b.scheduler) != 0) {
    return;
  }
  if (fiber.is_started) {
    _longjmp(fiber.resume_point, 1);
  }
  fiber.is_started = true;
  getcontext(&fiber.first_entry);
  fiber.first_entry.uc_stack.ss_sp = b.stacks.get() + thread * kStackBytes;
  fiber.first_entry.uc_stack.ss_size = kStackBytes;
  fiber.first_entry.uc_link = nullptr;
  makecontext(&fiber.first_entry, fiber_main, 0);
  swapcontext(&b.scheduler_context, &fiber.first_entry);
}

// The thread-local segment of this library.
struct SharedMemory {
  char* begin = nullptr;
  size_t bytes = 0;
};

inline int find_shared_memory(dl_phdr_info* library, size_t, void* found) {
  const auto here = reinterpret_cast<uintptr_t>(&find_shared_memory);
  SharedMemory segment;
  bool is_this_library = false;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& header = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + header.p_vaddr;
    is_this_library |= header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz;
    if (header.p_type == PT_TLS) {
      segment = {static_cast<char*>(library->dlpi_tls_data), header.p_memsz};
    }
  }
  if (is_this_library) {
    *static_cast<SharedMemory*>(found) = segment;
  }
  return is_this_library;
}

inline SharedMemory shared_memory() {
  __shared__ char touched;  // the segment is allocated when it is first used
  touched = 1;
  asm volatile("" : : "r"(&touched) : "memory");
  SharedMemory memory;
  dl_iterate_phdr(find_shared_memory, &memory);
  if (memory.begin == nullptr) {
    fail("the library has no thread-local segment for shared memory");
  }
  return memory;
}

inline void poison_shared_memory() {
  static const SharedMemory memory = shared_memory();
  std::memset(memory.begin, 0xa5, memory.bytes);
}

// Resumes the lanes of a warp that do not wait, and returns their number. Subtracts the lanes that finish from `left`.
inline int resume_lanes(int warp, int& left) {
  int resumed = 0;
  for (int i = 0; i < kLanes; ++i) {
    const int thread = warp * kLanes + (reverse_threads ? kLanes - 1 - i : i);
    Fiber& fiber = block().fibers[thread];
    if (fiber.is_finished || (fiber.waits_for != nullptr && fiber.waits_for->round < fiber.waits_for_round)) {
      continue;
    }
    fiber.waits_for = nullptr;
    resume(thread);
    left -= fiber.is_finished;
    ++resumed;
  }
  return resumed;
}

inline void run_block(int threads) {
  Block& b = block();
  poison_shared_memory();
  b.barrier = Meeting();
  b.barrier.members = threads;
  for (int warp = 0; warp < threads / kLanes; ++warp) {
    b.warps[warp] = Meeting();
    b.warps[warp].members = kLanes;
  }
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = b.fibers[thread];
    fiber.is_started = fiber.is_finished = false;
    fiber.waits_for = nullptr;
  }
  const int warps = threads / kLanes;
  for (int left = threads; left > 0;) {
    bool anything_ran = false;
    for (int i = 0; i < warps; ++i) {
      const int warp = reverse_threads ? warps - 1 - i : i;
      for (int resumed = resume_lanes(warp, left); resumed > 0; resumed = resume_lanes(warp, left)) {
        anything_ran = true;
      }
    }
    if (!anything_ran) {
      fail("the threads of a block diverge at a barrier or a collective");
    }
  }
}

// A kernel launch, with the interface of Launch in csrc/cuda/core/launch.cuh.
struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, const Arguments&... arguments) const {
    if (threads > kMaxThreads || threads % kLanes != 0 || grid.x == 0 || grid.y == 0) {
      fail("a launch that no GPU accepts, or that the emulator does not support");
    }
    ++num_launches;
    gridDim = grid;
    blockDim = dim3(static_cast<unsigned>(threads));
    block().kernel = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, 0);
        run_block(threads);
      }
    }
  }
};

inline int lane() {
  return static_cast<int>(threadIdx.x) % kLanes;
}

// The values of all lanes of the warp, after all have arrived.
template <typename T>
inline const Meeting& exchange(unsigned mask, Collective kind, const T& value) {
  static_assert(sizeof(T) <= 16, "a value must fit into 16 bytes");
  if (mask != 0xffffffffu) {
    fail("the emulator supports only collectives of whole warps");
  }
  Meeting& meeting = block().warps[threadIdx.x / kLanes];
  meet(meeting, kind, lane(), &value, sizeof(T));
  return meeting;
}

template <typename T>
inline T value_of_lane(const Meeting& meeting, int lane) {
  T value;
  std::memcpy(&value, meeting.values[lane], sizeof(T));
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::meet(cuda_on_host::block().barrier, cuda_on_host::Collective::kBarrier, 0, nullptr, 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::exchange(mask, cuda_on_host::Collective::kSync, 0);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const auto& meeting = cuda_on_host::exchange(mask, cuda_on_host::Collective::kBallot, predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
    ballot |= static_cast<unsigned>(cuda_on_host::value_of_lane<bool>(meeting, lane)) << lane;
  }
  return ballot;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const auto& meeting = cuda_on_host::exchange(mask, cuda_on_host::Collective::kShuffleXor, value);
  return cuda_on_host::value_of_lane<T>(meeting, cuda_on_host::lane() ^ distance);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const auto& meeting = cuda_on_host::exchange(mask, cuda_on_host::Collective::kShuffleUp, value);
  const int from = cuda_on_host::lane() - distance;
  return from < 0 ? value : cuda_on_host::value_of_lane<T>(meeting, from);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const auto& meeting = cuda_on_host::exchange(mask, cuda_on_host::Collective::kReduceAdd, value);
  unsigned sum = 0;
  for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
    sum += cuda_on_host::value_of_lane<unsigned>(meeting, lane);
  }
  return sum;
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) {
    cuda_on_host::fail("a load from an address that is not aligned to its type");
  }
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

using std::fabs;
using std::sqrt;
