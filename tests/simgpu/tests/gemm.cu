// Matrix multiplications for sm_80: fp16, bf16 and 6-bit weights, with cp.async, ldmatrix and mma. FAULT plants a bug.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

__device__ __forceinline__ uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
template <int N>
__device__ __forceinline__ void cp_async(uint32_t dst, const void* src, bool ok = true) {
  int n = ok ? N : 0;
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(n) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(N), "r"(n) : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void ldsm4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
__device__ __forceinline__ void ldsm4t(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// y[M,N] = x[M,K] w[K,N]; tile 64 x 64 x 32, 4 warps, two cp.async stages.
template <typename T, int FAULT>
__device__ void gemm_body(const T* x, const T* w, float* y, int M, int N, int K) {
  constexpr int PA = FAULT == 3 ? 32 : 40, PB = 72;  // row pitches in elements; 32 has bank conflicts
  __shared__ __align__(16) T sa[2][64 * PA];
  __shared__ __align__(16) T sb[2][32 * PB];
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  float c[2][4][4] = {};
  auto load = [&](int s, int k0) {
    for (int i = tid; i < 64 * 4; i += 128) {
      int r = i >> 2, q = i & 3;
      cp_async<16>(smem_u32(&sa[s][r * PA + q * 8]), x + (size_t)(m0 + r) * K + k0 + q * 8, m0 + r < M);
    }
    for (int i = tid; i < 32 * 8; i += 128) {
      int r = i >> 3, q = i & 7;
      cp_async<16>(smem_u32(&sb[s][r * PB + q * 8]), w + (size_t)(k0 + r) * N + n0 + q * 8);
    }
    cp_commit();
  };
  int wm = (warp & 1) * 32, wn = (warp >> 1) * 32, nk = K / 32;
  load(0, 0);
  for (int kt = 0; kt < nk; kt++) {
    if (kt + 1 < nk)
      load((kt + 1) & 1, (kt + 1) * 32);
    else
      cp_commit();
    if (FAULT != 2) cp_wait<1>();
    __syncthreads();
    const T* A = sa[kt & 1];
    const T* B = sb[kt & 1];
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
      uint32_t a[2][4], b[2][4];
      for (int i = 0; i < 2; i++) ldsm4(a[i], smem_u32(A + (wm + i * 16 + (lane & 15)) * PA + k + (lane >> 4) * 8));
      for (int j = 0; j < 2; j++) ldsm4t(b[j], smem_u32(B + (k + (lane & 15)) * PB + wn + j * 16 + (lane >> 4) * 8));
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) mma<T>(c[i][j], a[i], b[j >> 1][(j & 1) * 2], b[j >> 1][(j & 1) * 2 + 1]);
    }
    if (FAULT != 1) __syncthreads();
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int h = 0; h < 2; h++) {
        int r = m0 + wm + i * 16 + h * 8 + lane / 4, n = n0 + wn + j * 8 + (lane & 3) * 2;
        if (r < M) *(float2*)(y + (size_t)r * N + n) = make_float2(c[i][j][2 * h], c[i][j][2 * h + 1]);
      }
}
#define GEMM(NAME, T, F)                                                                   \
  extern "C" __global__ void NAME(const T* x, const T* w, float* y, int M, int N, int K) { \
    gemm_body<T, F>(x, w, y, M, N, K);                                                     \
  }
GEMM(gemm_f16, half, 0)
GEMM(gemm_bf16, __nv_bfloat16, 0)
GEMM(gemm_no_barrier, half, 1)
GEMM(gemm_no_wait, half, 2)
GEMM(gemm_conflicts, half, 3)

// y[M,N] = x[M,K] W[N,K]^T * scale[n], W in 6-bit e3m2 split in 4-bit (sign, exponent) and 2-bit (mantissa) segments
// that are stored in fragment order.  One warp owns 16 columns; tile 64 x 64 x 64.
extern "C" __global__ void gemm_fp6(const half* x, const uint4* w4, const uint2* w2, const float* scale, half* y, int M,
                                    int N, int K) {
  extern __shared__ __align__(128) uint8_t smem[];
  half* sx = (half*)smem;                        // [2][64][64], 16-byte chunks xor-swizzled by row
  uint4* s4 = (uint4*)(smem + 2 * 64 * 64 * 2);  // [2][4 warps][32]
  uint2* s2 = (uint2*)(s4 + 2 * 128);            // [2][4 warps][32]
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, nk = K / 64;
  int m0 = blockIdx.y * 64, n16 = blockIdx.x * 4 + warp;
  float c[4][2][4] = {};
  auto load = [&](int s, int kt) {
    for (int i = tid; i < 512; i += 128) {
      int r = i >> 3, q = i & 7;
      cp_async<16>(smem_u32(sx + s * 4096 + r * 64 + (q ^ (r & 7)) * 8), x + (size_t)(m0 + r) * K + kt * 64 + q * 8,
                   m0 + r < M);
    }
    size_t t = ((size_t)n16 * nk + kt) * 32 + lane;
    cp_async<16>(smem_u32(s4 + s * 128 + tid), w4 + t);
    cp_async<8>(smem_u32(s2 + s * 128 + tid), w2 + t);
    cp_commit();
  };
  load(0, 0);
  for (int kt = 0; kt < nk; kt++) {
    if (kt + 1 < nk)
      load((kt + 1) & 1, kt + 1);
    else
      cp_commit();
    cp_wait<1>();
    __syncthreads();
    int s = kt & 1;
    uint4 q4 = s4[s * 128 + tid];
    uint2 q2 = s2[s * 128 + tid];
    uint32_t hi[4] = {q4.x, q4.y, q4.z, q4.w}, lo[2] = {q2.x, q2.y};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint32_t b[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {  // pair j of the 16 x 16 block
        uint32_t h = hi[k] << (4 * j), m = lo[k >> 1] << (2 * ((k & 1) * 4 + j));
        b[j] = (h & 0x80008000u) | ((h & 0x70007000u) >> 2) | ((m & 0xc000c000u) >> 6);
        half2 v = __hmul2(*(half2*)&b[j], __float2half2_rn(4096.f));  // exponent bias 3 -> 15
        b[j] = *(uint32_t*)&v;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        int r = i * 16 + (lane & 15), q = k * 2 + (lane >> 4);
        ldsm4(a, smem_u32(sx + s * 4096 + r * 64 + (q ^ (r & 7)) * 8));
        mma<half>(c[i][0], a, b[0], b[1]);
        mma<half>(c[i][1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 2; j++) {
    int n = n16 * 16 + j * 8 + (lane & 3) * 2;
    float s0 = scale[n], s1 = scale[n + 1];
    for (int i = 0; i < 4; i++)
      for (int h = 0; h < 2; h++) {
        int r = m0 + i * 16 + h * 8 + lane / 4;
        if (r < M) *(half2*)(y + (size_t)r * N + n) = __floats2half2_rn(c[i][j][2 * h] * s0, c[i][j][2 * h + 1] * s1);
      }
  }
}
