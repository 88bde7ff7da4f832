// What wire.cpp hands to the kernels of sm80_wire.cu: plain structs that both compilers read.
#pragma once

#include <stdint.h>

#include "kernels/quantize_args.hpp"

namespace ng::cuda {

// A warp has a block of 64 elements, lane i those numbered i and 32 + i of it.
inline constexpr int kWireBlock = 64;
inline constexpr int kWireWarps = 8;

// to = Hadamard of (from + error), and error = from + error.
struct PrepareArgs {
  const void* from;
  codec::Source type;
  float* error;  // null: 0
  bool hadamard;
  float* to;
  int64_t n;
};

// error -= Hadamard of what was sent, 0 where that is not finite.
struct KeepErrorArgs {
  const float* sent;
  bool hadamard;
  float* error;
  int64_t n;
};

// to = Hadamard of the sum of the peers, divided.
struct FinishArgs {
  const void* peer[kMostPeers];
  int32_t peers;
  codec::Source type;
  bool hadamard;
  float divisor;
  void* to;
  codec::Source to_type;
  int64_t n;
};

}  // namespace ng::cuda
