// Rows of bytes in memory, as the gather reads and writes them.

#pragma once

#include <cstdint>

namespace stamp::cpu {

struct Rows {
  const char* source;
  char* destination;
  int64_t source_stride;  // bytes from one source row to the next
  int64_t row_bytes;
};

}  // namespace stamp::cpu
