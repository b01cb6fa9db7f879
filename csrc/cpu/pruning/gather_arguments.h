// The arguments of a gather of rows: which tensors it copies, what it returns, and the checks of its map.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/core/checks.h"
#include "cpu/pruning/rows.h"

namespace stamp::cpu {

// Whether each row is contiguous, so that it can be copied as one piece. The distance between rows may be larger.
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

// The sources of a gather: tensors [rows, ...] with the same number of rows.
inline void check_row_sources(const char* name, const std::vector<Tensor>& sources) {
  STD_TORCH_CHECK(!sources.empty(), name, " must have at least one tensor, got an empty list");
  for (const Tensor& source : sources) {
    STD_TORCH_CHECK(source.dim() > 0, name, " must have tensors with at least one dimension, got a scalar");
    STD_TORCH_CHECK(
        source.size(0) == sources[0].size(0), name, " must have tensors with the same number of rows, got ",
        source.size(0), " and ", sources[0].size(0));
    check_storage(name, source);
  }
}

// The map of rows: [num_rows].
inline void check_row_map_tensor(const char* name, const Tensor& map, ScalarType dtype) {
  STD_TORCH_CHECK(map.dim() == 1, name, " must have one dimension, got ", map.dim());
  check_dtype(name, map, {dtype});
  check_storage(name, map);
}

// The checked sources of a gather, its outputs of `num_rows` rows, and the memory of both.
struct RowCopies {
  std::vector<Tensor> inputs;  // keeps the contiguous copies alive
  std::vector<Tensor> outputs;
  std::vector<Rows> rows;

  RowCopies(const std::vector<Tensor>& sources, int64_t num_rows) {
    for (const Tensor& source : sources) {
      const Tensor input = rows_are_contiguous(source) ? source : torch::stable::contiguous(source);
      std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
      shape[0] = num_rows;
      const Tensor output = torch::stable::new_empty(input, shape);
      Rows copy;
      copy.source = static_cast<const char*>(input.const_data_ptr());
      copy.destination = static_cast<char*>(output.mutable_data_ptr());
      copy.row_bytes = static_cast<int64_t>(input.element_size());
      copy.source_stride = input.stride(0) * copy.row_bytes;
      for (size_t d = 1; d < shape.size(); ++d) {
        copy.row_bytes *= shape[d];
      }
      inputs.push_back(input);
      outputs.push_back(output);
      rows.push_back(copy);
    }
  }
};

// Every entry of `map` must be a row of the source, or -1 for none.
template <typename index_t>
void check_row_map(const index_t* map, int64_t size, int64_t num_source_rows, const char* name) {
  // One pass without branches: map[j] + 1 and num_source_rows - (map[j] + 1) must not be negative, so the signs of all
  // are joined. Only if one is negative, a second pass looks for it.
  uint64_t signs = 0;
  for (int64_t j = 0; j < size; ++j) {
    const uint64_t next = static_cast<uint64_t>(static_cast<int64_t>(map[j])) + 1;
    signs |= next | (static_cast<uint64_t>(num_source_rows) - next);
  }
  if (static_cast<int64_t>(signs) >= 0) {
    return;
  }
  for (int64_t j = 0; j < size; ++j) {
    STD_TORCH_CHECK(
        map[j] >= -1 && map[j] < num_source_rows, name, "[", j, "] is ", static_cast<int64_t>(map[j]),
        ", but only -1 (none) to ", num_source_rows - 1, " are allowed");
  }
}

}  // namespace stamp::cpu
