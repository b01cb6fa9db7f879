// What the row copies of every device share: the shape and layout of a tensor seen as rows of bytes.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/row_layout.h"

namespace stamp {

using torch::stable::Tensor;

// A row is copied as one piece, so the trailing dimensions must be contiguous; the rows themselves may be apart.
inline bool rows_are_contiguous(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 1; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

// The map of rows must be a vector on the device of what it points into.
inline void check_row_map_tensor(const std::vector<Tensor>& sources, const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.dim() == 1, name, " must have one dimension, got ", map.dim());
  for (const Tensor& source : sources) {
    STD_TORCH_CHECK(
        source.is_cuda() == map.is_cuda() && source.get_device_index() == map.get_device_index(),
        "all tensors must be on the device of ", name);
  }
}

// Sources whose rows can be copied, outputs of `num_rows` rows for them, and the pointers of both.
struct RowCopies {
  std::vector<Tensor> inputs;  // holds the contiguous copies alive
  std::vector<Tensor> outputs;
  std::vector<Rows> rows;

  RowCopies(const std::vector<Tensor>& sources, int64_t num_rows) {
    STD_TORCH_CHECK(!sources.empty(), "gather_tokens needs at least one tensor");
    for (const Tensor& source : sources) {
      STD_TORCH_CHECK(source.dim() > 0, "a tensor of rows has at least one dimension");
      STD_TORCH_CHECK(
          source.size(0) == sources[0].size(0),
          "all tensors must have the same number of rows, got ", source.size(0), " and ", sources[0].size(0));
      const Tensor input = rows_are_contiguous(source) ? source : torch::stable::contiguous(source);
      std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
      shape[0] = num_rows;
      int64_t row_bytes = static_cast<int64_t>(input.element_size());
      const int64_t source_stride = input.stride(0) * row_bytes;
      for (size_t d = 1; d < shape.size(); ++d) {
        row_bytes *= shape[d];
      }
      inputs.push_back(input);
      outputs.push_back(torch::stable::new_empty(input, shape));
      rows.push_back(
          {static_cast<const char*>(input.const_data_ptr()),
           static_cast<char*>(outputs.back().mutable_data_ptr()),
           source_stride,
           row_bytes});
    }
  }
};

// `map` must hold rows of the source, or -1 for none.
template <typename index_t>
void check_row_map(const index_t* map, int64_t size, int64_t source_rows, const char* name) {
  // All of them at once, by the signs of what must not be negative; which one is wrong is of interest only if one is.
  uint64_t signs = 0;
  for (int64_t j = 0; j < size; ++j) {
    const uint64_t after = static_cast<uint64_t>(static_cast<int64_t>(map[j])) + 1;
    signs |= after | (static_cast<uint64_t>(source_rows) - after);
  }
  if (static_cast<int64_t>(signs) >= 0) {
    return;
  }
  for (int64_t j = 0; j < size; ++j) {
    STD_TORCH_CHECK(
        map[j] >= -1 && map[j] < source_rows,
        name, "[", j, "] is ", static_cast<int64_t>(map[j]), ", but only -1 (none) to ", source_rows - 1, " are allowed");
  }
}

}  // namespace stamp
