// Rows of bytes in memory, as the copies of every device see them.

#pragma once

#include <cstdint>

namespace stamp {

struct Rows {
  const char* source;
  char* destination;
  int64_t source_stride;  // bytes from one source row to the next
  int64_t row_bytes;
};

}  // namespace stamp
