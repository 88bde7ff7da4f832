// Inline PTX under plain names. Nothing else in the kernels of matrix products is assembly.
#pragma once

#include <stdint.h>

namespace ng::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- copies to shared memory ---------------------------------------------------------------------------------------

// 16 bytes at the offsets, of which the first `bytes` are read and the others become 0.
template <int kTo = 0>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0+%3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes), "n"(kTo)
               : "memory");
}
template <int kTo = 0, int kFrom = 0>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0+%2], [%1+%3], 16;" ::"r"(to), "l"(from), "n"(kTo), "n"(kFrom)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last kPending commits are not done.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- shared memory -------------------------------------------------------------------------------------------------

// 1, 2 or 4 words, aligned to their size.
template <int kWords, int kOffset = 0>
__device__ __forceinline__ void load_shared(uint32_t from, uint32_t* out) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from), "n"(kOffset)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2+%3];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from), "n"(kOffset)
                 : "memory");
  } else {
    asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(out[0]) : "r"(from), "n"(kOffset) : "memory");
  }
}
template <int kWords, int kOffset = 0>
__device__ __forceinline__ void load_shared(uint32_t from, float* out) {
  uint32_t bits[kWords];
  load_shared<kWords, kOffset>(from, bits);
  for (int i = 0; i < kWords; ++i) out[i] = __uint_as_float(bits[i]);
}
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t from) {
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1+%2];" : "=h"(half) : "r"(from), "n"(kOffset) : "memory");
  return half;
}
template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_u8(uint32_t from) {
  uint32_t byte;
  asm volatile("ld.shared.u8 %0, [%1+%2];" : "=r"(byte) : "r"(from), "n"(kOffset) : "memory");
  return byte;
}
template <int kWords>
__device__ __forceinline__ void store_shared(uint32_t to, const float* values) {
  static_assert(kWords == 1 || kWords == 2);
  if constexpr (kWords == 2) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(values[0]), "f"(values[1]) : "memory");
  } else {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(values[0]) : "memory");
  }
}
__device__ __forceinline__ void store_shared_u16(uint32_t to, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory");
}

// --- matrices ------------------------------------------------------------------------------------------------------

// Four matrices of 8 x 8 halves; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
template <int kOffset = 0>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row), "n"(kOffset)
               : "memory");
}

// c += a * b for a [16, 16] and b [16, 8]. Not volatile: it only computes.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- arithmetic on pairs -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// The bf16 numbers nearest to two floats.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint16_t to_bf16(float value) { return static_cast<uint16_t>(to_bf16x2(value, 0.0f)); }
__device__ __forceinline__ uint16_t to_f16(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
__device__ __forceinline__ float from_f16(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}
__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

// NaN if one is NaN.
__device__ __forceinline__ float min_nan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}

// A number that is not computed again wherever it is used, but kept in a register.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Zero, made where it stands: the compiler would make one on each path that leads there, and copy it.
__device__ __forceinline__ float zero() {
  float value;
  asm volatile("mov.f32 %0, 0f00000000;" : "=f"(value));
  return value;
}

// --- bits ----------------------------------------------------------------------------------------------------------

template <int kBits>
__device__ __forceinline__ uint32_t rotate_right(uint32_t word) {
  constexpr int kShift = (kBits % 32 + 32) % 32;
  if constexpr (kShift == 0) return word;
  return __funnelshift_r(word, word, kShift);
}
// Four bytes of the eight of `low` and `high`, by the nibbles of the selector.
__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

}  // namespace ng::cuda::ptx
