// What a caller's pointer points to.
#pragma once

#include <cstddef>

namespace ng::cuda {

// Throws InvalidArgument, with `name`, unless `pointer` is memory of cuda:`device`, aligned to `alignment`. Null
// passes. pre: the device's context is current.
void check_pointer(const void* pointer, const char* name, int device, size_t alignment);

}  // namespace ng::cuda
