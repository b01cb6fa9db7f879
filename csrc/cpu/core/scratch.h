// The scratch memory of one thread, as the kernels divide it. Internal linkage, for the reason given in simd.h.

#pragma once

#include <cstdint>

#include "common/arithmetic.h"

namespace stamp::cpu {
namespace {

// Every array begins at a multiple of this many bytes.
constexpr int64_t kScratchAlignment = 64;

// Takes one array after the other. Without a base it only counts the bytes.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment);
    return array;
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
