// The inner loop of gather_tokens and prune: y[j] = x[map[j]], zeros where the map says -1.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "cpu/pruning/rows.h"

namespace stamp::cpu {
namespace {

// An output of at least this size is written past the caches: it would not stay in them, and a streaming store saves
// reading each line first. Measured: half the time where most rows are zeros, slower where all rows are copied. So only
// gradients are streamed, since most of their rows were dropped.
constexpr int64_t kMinStreamBytes = 48 * 1024 * 1024;
constexpr int64_t kStreamAlignment = 16;

inline bool is_worth_streaming(const Rows& rows, int64_t num_rows) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(rows.destination) | static_cast<uint64_t>(rows.row_bytes);
  return bits % kStreamAlignment == 0 && num_rows * rows.row_bytes >= kMinStreamBytes;
}

// The next row is anywhere in memory, so the hardware prefetcher misses it: its first bytes are prefetched.
constexpr int64_t kPrefetchBytes = 512;
constexpr int64_t kCacheLine = 64;

// to := from, past the caches. `bytes` and `to` are multiples of kStreamAlignment.
inline void stream_row(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += kStreamAlignment) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void stream_zeros(char* to, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += kStreamAlignment) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
  }
#else
  std::memset(to, 0, bytes);
#endif
}

// Makes streamed rows visible to other threads.
inline void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Rows of a few bytes, for which a call of memcpy would cost more than the copy.
template <int64_t kBytes, typename index_t>
void copy_small_rows(const Rows& rows, const index_t* map, int64_t begin, int64_t end) {
  // Local copies, since the compiler must assume that a store through a char* changes `rows`.
  const char* const source = rows.source;
  const int64_t stride = rows.source_stride;
  char* destination = rows.destination + begin * kBytes;
  for (int64_t j = begin; j < end; ++j, destination += kBytes) {
    if (map[j] < 0) {
      std::memset(destination, 0, kBytes);
    } else {
      std::memcpy(destination, source + map[j] * stride, kBytes);
    }
  }
}

template <bool kStream, typename index_t>
void copy_wide_rows(const Rows& rows, const index_t* map, int64_t begin, int64_t end) {
  const int64_t bytes = rows.row_bytes;
  char* destination = rows.destination + begin * bytes;
  for (int64_t j = begin; j < end; ++j, destination += bytes) {
    if (j + 1 < end && map[j + 1] >= 0) {
      const char* next = rows.source + map[j + 1] * rows.source_stride;
      for (int64_t i = 0; i < bytes && i < kPrefetchBytes; i += kCacheLine) {
        __builtin_prefetch(next + i);
      }
    }
    if (map[j] < 0) {
      kStream ? stream_zeros(destination, bytes) : static_cast<void>(std::memset(destination, 0, bytes));
    } else {
      const char* source = rows.source + map[j] * rows.source_stride;
      kStream ? stream_row(destination, source, bytes) : static_cast<void>(std::memcpy(destination, source, bytes));
    }
  }
  if (kStream) {
    end_of_stream();
  }
}

// Copies the output rows [begin, end). `stream`: see is_worth_streaming.
template <typename index_t>
void copy_rows(const Rows& rows, const index_t* map, int64_t begin, int64_t end, bool stream) {
  switch (rows.row_bytes) {
    case 0:
      return;
    case 1:
      return copy_small_rows<1>(rows, map, begin, end);
    case 2:
      return copy_small_rows<2>(rows, map, begin, end);
    case 4:
      return copy_small_rows<4>(rows, map, begin, end);
    case 8:
      return copy_small_rows<8>(rows, map, begin, end);
    case 16:
      return copy_small_rows<16>(rows, map, begin, end);
    default:
      break;
  }
  if (stream) {
    copy_wide_rows<true>(rows, map, begin, end);
  } else {
    copy_wide_rows<false>(rows, map, begin, end);
  }
}

}  // namespace
}  // namespace stamp::cpu
