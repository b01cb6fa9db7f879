#include "cuda/core/arguments.cuh"

#include <cstdlib>
#include <cstring>

#include "common/contents.h"

namespace stamp::cuda {

namespace {

bool read_environment() {
  const char* value = std::getenv("STAMP_KERNELS_CHECK");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// Read once, when the library is loaded: getenv must not run beside a write of the environment, and Python's os.environ
// writes it at any time, in any thread.
const bool environment_asks_for_checks = read_environment();

}  // namespace

bool contents_are_checked() {
  return environment_asks_for_checks;
}

std::vector<int32_t> checked_cu_seqlens(
    const int32_t* cu_seqlens, int64_t num_sequences, int64_t total, int64_t max_seqlen, const Launch& launch) {
  const std::vector<int32_t> offsets = launch.copy_to_cpu(cu_seqlens, num_sequences + 1, "cu_seqlens");
  check_cu_seqlens("cu_seqlens", offsets.data(), num_sequences, total, max_seqlen);
  return offsets;
}

Tensor held_contiguous(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(torch::stable::contiguous(x));
  return held.back();
}

Tensor held_cu_seqlens(const Tensor& cu_seqlens, const char* name, const Tensor& rows, std::vector<Tensor>& held) {
  check_cu_seqlens_tensor("cu_seqlens", cu_seqlens);
  check_device("cu_seqlens", cu_seqlens, name, rows);
  check_int32_rows("cu_seqlens", cu_seqlens.size(0));
  return held_contiguous(cu_seqlens, held);
}

}  // namespace stamp::cuda
