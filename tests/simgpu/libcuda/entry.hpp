// The functions that the library exports: exactly those of the table, with exactly its signatures.
#pragma once

#include "core/shim/cuda.hpp"

namespace ng::cuda {
#define NG_EXPORT(name, parameters) extern "C" __attribute__((visibility("default"))) Result name parameters;
NG_CUDA_FUNCTIONS(NG_EXPORT)
#undef NG_EXPORT
}  // namespace ng::cuda
