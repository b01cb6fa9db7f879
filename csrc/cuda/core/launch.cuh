// Kernel launches of the CUDA ops.

#pragma once

#include <cstdint>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace stamp::cuda {

// Makes a device the current one as long as it lives, and launches on that device's current stream.
class Launch {
 public:
  // `op` names the operator in error messages.
  Launch(const char* op, int32_t device_index) : op_(op), guard_(device_index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, const Arguments&... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op_, " could not be launched: ", cudaGetErrorString(error));
  }

  // A copy of device memory in CPU memory. Waits for the stream.
  template <typename T>
  std::vector<T> copy_to_cpu(const T* data, int64_t size, const char* name) const {
    std::vector<T> copy(size);
    const cudaError_t copied = cudaMemcpyAsync(copy.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost, stream_);
    STD_TORCH_CHECK(
        copied == cudaSuccess && cudaStreamSynchronize(stream_) == cudaSuccess, name,
        " could not be read from the device");
    return copy;
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace stamp::cuda
