// gather_tokens on the CPU, forward and backward: the rows of a selection.
//
//   forward   y[j] = x[indices[j]]                         indices int64 [total_kept], -1 on tail rows
//   backward  dx[t] = inverse[t] < 0 ? 0 : dy[inverse[t]]  inverse int32 [total], -1 where token t is dropped
//
// Both are one operation: copy the row that the map names, or write zeros where the map says -1. Every output row is
// written once, so there is no zero-fill pass and no atomic addition.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/pruning/copy_rows.h"
#include "cpu/pruning/gather_arguments.h"

namespace stamp::cpu {
namespace {

// No thread is started for fewer bytes than this.
constexpr int64_t kMinBytesPerTask = 32 * 1024;

template <typename index_t>
std::vector<Tensor> gather_rows(
    const char* name, const std::vector<Tensor>& sources, const char* map_name, const Tensor& map_tensor,
    bool may_stream) {
  check_row_map_tensor(map_name, map_tensor, sizeof(index_t) == sizeof(int64_t) ? ScalarType::Long : ScalarType::Int);
  check_row_sources(name, sources);
  const Tensor map_contiguous = torch::stable::contiguous(map_tensor);
  const index_t* map = map_contiguous.const_data_ptr<index_t>();
  const int64_t num_rows = map_contiguous.size(0);
  RowCopies copies(sources, num_rows);
  check_row_map(map, num_rows, sources[0].size(0), map_name);

  int64_t bytes_per_row = 0;
  for (const Rows& rows : copies.rows) {
    bytes_per_row += rows.row_bytes;
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kMinBytesPerTask / std::max<int64_t>(1, bytes_per_row));
  torch::stable::parallel_for(0, num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (const Rows& rows : copies.rows) {
      copy_rows(rows, map, begin, end, may_stream && is_worth_streaming(rows, num_rows));
    }
  });
  return copies.outputs;
}

std::vector<Tensor> gather_tokens_forward(const std::vector<Tensor>& x, const Tensor& indices) {
  return gather_rows<int64_t>("x", x, "indices", indices, false);
}

std::vector<Tensor> gather_tokens_backward(const std::vector<Tensor>& grad, const Tensor& inverse) {
  return gather_rows<int32_t>("grad", grad, "inverse", inverse, true);
}

}  // namespace
}  // namespace stamp::cpu

STABLE_TORCH_LIBRARY_IMPL(stamp, CPU, m) {
  m.impl("gather_tokens_forward", TORCH_BOX(&stamp::cpu::gather_tokens_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&stamp::cpu::gather_tokens_backward));
}
