// A matrix multiplication for sm_90a: a producer warp fills a ring of two stages by cp.async.bulk, with mbarriers for
// full and empty stages; a warpgroup multiplies by wgmma. FAULT plants a bug.
#include <cuda_fp16.h>
#include <cstdint>
__device__ __forceinline__ uint32_t su(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mb_init(uint32_t b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n));
}
__device__ __forceinline__ void mb_expect(uint32_t b, int n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
__device__ __forceinline__ void mb_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
}
__device__ __forceinline__ void mb_wait(uint32_t b, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra "
      "WAIT;\nDONE:\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk(uint32_t d, const void* s, int n, uint32_t b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(d),
               "l"(s), "r"(n), "r"(b)
               : "memory");
}
// swizzle mode 0: core matrices of 8 rows x 16 bytes; mode 1: 128-byte swizzle, rows of 128 bytes
__device__ __forceinline__ uint64_t desc(uint32_t a, int lbo, int sbo, int mode) {
  return (uint64_t)((a & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 |
         (uint64_t)mode << 62;
}
// LEFT multiplications stay in flight from step to step; without, the sum so far is multiplied by decay in each step.
template <int MODE, int FAULT, int LEFT>
__device__ void body(const half* a, const half* b, float* y, int K, float decay) {
  extern __shared__ __align__(1024) uint8_t smem[];  // [2] x { A 64x64, B 64x64 } = 2 x 16 KiB
  __shared__ __align__(8) uint64_t full[2], empty[2];
  int tid = threadIdx.x, nk = K / 64;
  if (tid == 0) {
    for (int i = 0; i < 2; i++) {
      mb_init(su(&full[i]), 1);
      mb_init(su(&empty[i]), 128);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");  // sync: for the asynchronous proxy, not simulated
  }
  __syncthreads();
  if (tid >= 128) {
    if (tid == 128)
      for (int t = 0; t < nk; t++) {
        int s = t & 1;
        if (FAULT != 1) mb_wait(su(&empty[s]), ((t >> 1) & 1) ^ 1);
        mb_expect(su(&full[s]), 16384);
        bulk(su(smem + s * 16384), a + (size_t)t * 4096, 8192, su(&full[s]));
        bulk(su(smem + s * 16384 + 8192), b + (size_t)t * 4096, 8192, su(&full[s]));
      }
    return;
  }
  float c[32] = {};
  for (int t = 0; t < nk; t++) {
    int s = t & 1;
    mb_wait(su(&full[s]), (t >> 1) & 1);
    if (LEFT == 0)
      for (int i = 0; i < 32; i++) c[i] *= decay;
    // sync: orders accesses to the accumulators' registers before wgmma, which is not simulated
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint32_t pa = su(smem + s * 16384), pb = pa + 8192;
      uint64_t da = MODE ? desc(pa + k * 32, 16, 1024, 1) : desc(pa + k * 256, 128, 1024, 0);
      uint64_t db = MODE ? desc(pb + k * 32, 16, 1024, 1) : desc(pb + k * 256, 128, 1024, 0);
      asm volatile(
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
          "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%"
          "29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]),
            "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),
            "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),
            "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
          : "l"(da), "l"(db), "r"(1));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (FAULT != 2) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    if (LEFT == 0)
      mb_arrive(su(&empty[s]));
    else if (t > 0)
      mb_arrive(su(&empty[s ^ 1]));
  }
  if (LEFT && FAULT != 3) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  int lane = tid & 31, w = tid >> 5;
  for (int j = 0; j < 8; j++)
    for (int h = 0; h < 2; h++)
      *(float2*)(y + (w * 16 + h * 8 + lane / 4) * 64 + j * 8 + (lane & 3) * 2) =
          make_float2(c[4 * j + 2 * h], c[4 * j + 2 * h + 1]);
}
#define KERNEL(NAME, MODE, FAULT, LEFT)                                                         \
  extern "C" __global__ void NAME(const half* a, const half* b, float* y, int K, float decay) { \
    body<MODE, FAULT, LEFT>(a, b, y, K, decay);                                                 \
  }
KERNEL(wgmma_plain, 0, 0, 0)
KERNEL(wgmma_sw128, 1, 0, 0)
KERNEL(wgmma_pipelined, 1, 0, 1)
KERNEL(wgmma_no_empty, 0, 1, 0)
KERNEL(wgmma_no_wait, 0, 2, 0)
KERNEL(wgmma_no_last_wait, 0, 3, 1)
