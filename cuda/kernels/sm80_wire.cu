// What collectives do with elements besides coding them: Hadamard blocks, error feedback, sums of elements that travel
// as they are. Bit for bit as collective/wire.cpp.
//
// A warp has a block of 64 elements, two in each lane, and reads and writes each once. Lanes speak by shuffles alone:
// there is no shared memory, and nothing waits. All of it moves data; types are looked at when the kernel runs, alike
// for all threads. As many blocks as fit on any multiprocessor leave a thread 40 registers.
#include "kernels/ptx.cuh"
#include "kernels/wire_args.hpp"

namespace ng::cuda {
namespace {

using codec::Source;

constexpr int kLanes = 32;
constexpr float kLargest = 0x1.fffffep127f;

__device__ float read(const void* from, Source type, int64_t i) {
  switch (type) {
    case Source::f16: return ptx::from_f16(static_cast<const uint16_t*>(from)[i]);
    case Source::bf16: return ptx::from_bf16(static_cast<const uint16_t*>(from)[i]);
    case Source::f32: break;
  }
  return static_cast<const float*>(from)[i];
}

__device__ void write(void* to, Source type, int64_t i, float value) {
  switch (type) {
    case Source::f16: static_cast<uint16_t*>(to)[i] = ptx::to_f16(value); return;
    case Source::bf16: static_cast<uint16_t*>(to)[i] = ptx::to_bf16(value); return;
    case Source::f32: static_cast<float*>(to)[i] = value;
  }
}

// The lane's elements of the warp's block; those beyond the last are left alone.
struct Block {
  int64_t first;
  int count;  // of the block

  __device__ explicit Block(int64_t n) {
    first = (int64_t{blockIdx.x} * kWireWarps + threadIdx.x / kLanes) * kWireBlock;
    count = static_cast<int>(max(int64_t{0}, min(int64_t{kWireBlock}, n - first)));
  }
  // f(k, index) for those of the lane's two elements that there are.
  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = k * kLanes + static_cast<int>(threadIdx.x) % kLanes;
      if (at < count) f(k, first + at);
    }
  }
};

// Elements of the Hadamard matrix that element `at` of a block of `count` belongs to: 64, or of what is left over in
// powers of two, the largest first.
__device__ int matrix_of(int at, int count) {
  int begin = 0;
#pragma unroll
  for (int length = kWireBlock; length > 1; length /= 2) {
    if ((count & length) == 0) continue;
    if (at < begin + length) return length;
    begin += length;
  }
  return 1;
}

__device__ void hadamard(float (&x)[2], int count) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int length[2] = {matrix_of(lane, count), matrix_of(kLanes + lane, count)};
#pragma unroll
  for (int half = 1; half < kLanes; half *= 2) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float other = __shfl_xor_sync(0xffffffffu, x[k], half);
      const float result = (lane & half) != 0 ? other - x[k] : x[k] + other;
      x[k] = half < length[k] ? result : x[k];
    }
  }
  if (length[0] == kWireBlock) {
    const float sum = x[0] + x[1];
    x[1] = x[0] - x[1];
    x[0] = sum;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) x[k] *= __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(length[k])));
}

}  // namespace
}  // namespace ng::cuda

extern "C" {

__global__ void __launch_bounds__(256, 6) prepare(const __grid_constant__ ng::cuda::PrepareArgs args) {
  const ng::cuda::Block block(args.n);
  float x[2] = {};
  block.each([&](int k, int64_t i) {
    x[k] = ng::cuda::read(args.from, args.type, i);
    if (args.error != nullptr) args.error[i] = x[k] += args.error[i];
  });
  if (args.hadamard) ng::cuda::hadamard(x, block.count);
  block.each([&](int k, int64_t i) { args.to[i] = x[k]; });
}

__global__ void __launch_bounds__(256, 6) keep_error(const __grid_constant__ ng::cuda::KeepErrorArgs args) {
  const ng::cuda::Block block(args.n);
  float x[2] = {};
  block.each([&](int k, int64_t i) { x[k] = args.sent[i]; });
  if (args.hadamard) ng::cuda::hadamard(x, block.count);
  block.each([&](int k, int64_t i) {
    const float left = args.error[i] - x[k];
    args.error[i] = fabsf(left) <= ng::cuda::kLargest ? left : 0.0f;
  });
}

__global__ void __launch_bounds__(256, 6) finish(const __grid_constant__ ng::cuda::FinishArgs args) {
  const ng::cuda::Block block(args.n);
  float x[2] = {};
  block.each([&](int k, int64_t i) {
    x[k] = ng::cuda::read(args.peer[0], args.type, i);
    for (int p = 1; p < args.peers; ++p) x[k] += ng::cuda::read(args.peer[p], args.type, i);
  });
  if (args.hadamard) ng::cuda::hadamard(x, block.count);
  block.each([&](int k, int64_t i) { ng::cuda::write(args.to, args.to_type, i, __fdiv_rn(x[k], args.divisor)); });
}
}
