// The functions that torch.cuda.memory.CUDAPluggableAllocator finds in the extension module by their names: torch's
// tensors in the default DevicePool of each device, in the order of the stream that torch allocates them for.
//
// Of tensors that other streams use, record_stream() does nothing under such an allocator: those streams must be waited
// for before the tensor dies. torch does not look at what it is given: of a null pointer, for which it has no memory,
// it raises a RuntimeError when the tensor is first used.
#include <sys/types.h>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/stream.hpp"

// The stream is a cudaStream_t, which is a CUstream.
extern "C" __attribute__((visibility("default"))) void* ng_torch_cuda_malloc(ssize_t size, int device,
                                                                             CUstream_st* stream) noexcept {
  if (size <= 0) return nullptr;
  try {
    return ng::default_device_pool(device)->allocate(static_cast<size_t>(size), ng::Stream(device, stream));
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) void ng_torch_cuda_free(void* block, ssize_t size, int device,
                                                                          CUstream_st* stream) noexcept {
  if (block == nullptr) return;
  try {
    ng::default_device_pool(device)->deallocate(block, static_cast<size_t>(size), ng::Stream(device, stream));
  } catch (const std::exception&) {
    return;  // no block came from a device that is not there
  }
}
