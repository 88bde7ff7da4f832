// Whose memory an address is: the check at the boundary of functions that run on a GPU.
#pragma once

namespace ng::cuda {

// Throws InvalidArgument, with `name`, unless kernels on cuda:`device` can use the address: memory of that device, or
// pinned memory of the host. pre: the device's context is current.
void require_reachable(const void* pointer, int device, const char* name);

}  // namespace ng::cuda
