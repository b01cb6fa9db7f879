// Checks of an op's arguments at its boundary: what the kernels rely on for memory safety. Each raises an error that
// names the argument, what it was and what is allowed. They read shapes, strides, dtypes and plain numbers, never
// contents, and take nanoseconds. The dispatcher has made sure that all tensors are on the CPU.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The size that a dimension must have, or a word for one of any size.
struct Size {
  Size(int64_t size) : size(size), word(nullptr) {}
  Size(const char* word) : size(0), word(word) {}

  int64_t size;
  const char* word;
};

using Shape = std::initializer_list<Size>;
using DTypes = std::initializer_list<ScalarType>;

constexpr DTypes kFloatingDTypes = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double};
constexpr DTypes kMaskDTypes = {ScalarType::Bool, ScalarType::Byte};

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// Lists items between commas.
template <typename Items, typename Write>
std::string listed(const Items& items, const Write& write) {
  std::ostringstream text;
  const char* separator = "";
  for (const auto& item : items) {
    text << separator;
    write(text, item);
    separator = ", ";
  }
  return text.str();
}

inline std::string sizes_of(const Tensor& x) {
  return "[" + listed(x.sizes(), [](std::ostream& text, int64_t size) { text << size; }) + "]";
}

[[noreturn]] inline void refuse_shape(const char* name, const Tensor& x, Shape shape) {
  const std::string allowed = listed(
      shape, [](std::ostream& text, Size size) { size.word != nullptr ? text << size.word : text << size.size; });
  STD_TORCH_CHECK(false, name, " must have shape [", allowed, "], got ", sizes_of(x));
}

inline void check_shape(const char* name, const Tensor& x, Shape shape) {
  const auto sizes = x.sizes();
  if (sizes.size() != shape.size()) {
    refuse_shape(name, x, shape);
  }
  const int64_t* size = sizes.data();
  for (const Size& allowed : shape) {
    if (allowed.word == nullptr && allowed.size != *size) {
      refuse_shape(name, x, shape);
    }
    ++size;
  }
}

inline void check_dtype(const char* name, const Tensor& x, DTypes dtypes) {
  const ScalarType dtype = x.scalar_type();
  for (const ScalarType allowed : dtypes) {
    if (allowed == dtype) {
      return;
    }
  }
  const std::string allowed = listed(dtypes, [](std::ostream& text, ScalarType allowed) { text << name_of(allowed); });
  STD_TORCH_CHECK(false, name, " must have dtype ", allowed, ", got ", name_of(dtype));
}

// The storage must hold all elements. One that was resized does not: FSDP frees parameters in this way.
inline void check_storage(const char* name, const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t num_elements = 1;  // of the storage, from the first element of x to the last
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return;
    }
    num_elements += (sizes[d] - 1) * strides[d];
  }
  int64_t offset = 0, storage_bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x.get(), &offset));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &storage_bytes));
  const int64_t needed_bytes = (offset + num_elements) * static_cast<int64_t>(x.element_size());
  STD_TORCH_CHECK(
      needed_bytes <= storage_bytes && x.const_data_ptr() != nullptr, name, " must have memory for shape ", sizes_of(x),
      ": its storage needs ", needed_bytes, " bytes and has ", storage_bytes, " (was it resized or freed?)");
}

inline void check_tensor(const char* name, const Tensor& x, Shape shape, DTypes dtypes) {
  check_shape(name, x, shape);
  check_dtype(name, x, dtypes);
  check_storage(name, x);
}

// Offsets: int32 [num_sequences + 1].
inline void check_cu_seqlens_tensor(const char* name, const Tensor& cu_seqlens) {
  check_tensor(name, cu_seqlens, {"num_sequences + 1"}, {ScalarType::Int});
  STD_TORCH_CHECK(cu_seqlens.size(0) >= 1, name, " must have num_sequences + 1 >= 1 entries, got 0");
}

// Rows whose indices are stored as int32.
inline void check_int32_rows(const char* name, int64_t num_rows) {
  STD_TORCH_CHECK(
      num_rows <= std::numeric_limits<int32_t>::max(), name, " must have at most ", std::numeric_limits<int32_t>::max(),
      " rows, got ", num_rows);
}

inline void check_at_least(const char* name, int64_t value, int64_t minimum) {
  STD_TORCH_CHECK(value >= minimum, name, " must be at least ", minimum, ", got ", value);
}

}  // namespace stamp::cpu
