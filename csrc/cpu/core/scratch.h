// The scratch memory of one thread, as the kernels divide it. Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "cpu/core/arithmetic.h"

namespace stamp::cpu {
namespace {

// Every array begins at a multiple of this many bytes.
constexpr int64_t kScratchAlignment = 64;

// Under the address sanitizer a gap follows every array, and whoever reads or writes it ends the program. Otherwise an
// overrun would end in the next array, which the sanitizer allows. Freeing the memory makes the gaps usable again.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kScratchGap = 1024;
#else
constexpr int64_t kScratchGap = 0;
#endif

// Takes one array after the other. Without a base it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t bytes_with_gap = round_up(bytes, kScratchAlignment) + kScratchGap;
    char* array = base_ == nullptr ? nullptr : base_ + size_;
    size_ += bytes_with_gap;
#if defined(__SANITIZE_ADDRESS__)
    if (array != nullptr) {  // the memory may have been divided in another way before
      ASAN_UNPOISON_MEMORY_REGION(array, bytes);
      ASAN_POISON_MEMORY_REGION(array + bytes, bytes_with_gap - bytes);
    }
#endif
    return reinterpret_cast<T*>(array);
  }

  int64_t size() const {
    return size_;
  }

 private:
  char* base_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace stamp::cpu
