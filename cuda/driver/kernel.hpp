// Kernels: the images that a build carries, and launches of what is in them.
//
// Each .cu file of cuda/kernels is one image: cubins for the architectures of the build, compressed, and PTX for all
// later ones. Of an image a device gets its exact cubin, else one of its family, else the PTX, when a kernel of it is
// first asked for: tens of milliseconds, and seconds where the driver compiles PTX for the first time.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace ng::cuda {

struct Image {
  const char* name;
  const void* cubins;  // a fat binary; null in a build for development, which has PTX only
  const char* ptx;     // empty in a build without nvcc
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The kernel `name` of the image, ready to be launched on the device; loads the image there if it is the first. Kept
// until the process ends; a look-up is a hash and a shared lock. Throws CudaError with the compiler's message if the
// device takes none of the image's codes. pre: the device's context is current, and it is not capturing for the first.
Function find_kernel(const Image& image, std::string_view name, int device);

// The address of a __device__ variable of the image; loads it likewise.
DevicePtr find_variable(const Image& image, const char* name, int device);

// Allows launches with this much dynamic shared memory, which beyond 48 KiB must be asked for. Throws CudaError.
void allow_shared_bytes(Function kernel, size_t bytes);

struct Launch {
  const char* name;  // lives for ever
  Function kernel;
  Dim3 grid;
  Dim3 block;
  size_t shared_bytes = 0;
};

// Gives the kernel to the stream. `arguments` are copied; they have the types of the kernel's parameters exactly.
// pre: the device's context is current.
void launch_with(const Launch& launch, const Stream& stream, std::span<void*> arguments);

template <typename... Arguments>
void launch(const Launch& what, const Stream& stream, const Arguments&... arguments) {
  std::array<void*, sizeof...(Arguments)> pointers{const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch_with(what, stream, pointers);
}

}  // namespace ng::cuda
