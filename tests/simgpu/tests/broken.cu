// One kernel for each fault that the simulator reports, compiled twice: with -DBROKEN=1, and repaired with -DBROKEN=0.
// The comment "fault" marks the line that the report must name.
#include <cstdint>

constexpr bool kBroken = BROKEN;
constexpr int kThreads = 128;

// Two blocks of kThreads; `in` and `out` have n elements, one for each thread. `in` is read-only, `out` uninitialised.
#define KERNEL(name) extern "C" __global__ void name(const float* in, float* out, int n)
#define INDEX const int t = threadIdx.x, i = blockIdx.x * kThreads + t

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void cp_async(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT;\n}" ::"r"(
                   shared_address(barrier)),
               "r"(parity)
               : "memory");
}
__device__ void bulk_copy(float* to, const float* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ uint32_t load_row(uint32_t address) {
  uint32_t row;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(row) : "r"(address) : "memory");
  return row;
}

// --- global memory -----------------------------------------------------------------------------------------------

KERNEL(global_out_of_bounds) {
  INDEX;
  out[i] = in[kBroken ? i + 1 : i];  // fault
}

KERNEL(global_misaligned) {
  INDEX;
  const char* bytes = reinterpret_cast<const char*>(in + i);
  out[i] = *reinterpret_cast<const float*>(bytes + (kBroken && t == 3 ? 2 : 0));  // fault
}

KERNEL(null_pointer) {  // of which the host gives one
  INDEX;
  out[i] = in[i];  // fault
}

KERNEL(write_to_read_only) {
  INDEX;
  float* to = kBroken && t == 4 ? const_cast<float*>(in) : out;
  to[i] = 1;  // fault
}

KERNEL(use_after_free) {  // the host frees `in` before
  INDEX;
  out[i] = in[i];  // fault
}

KERNEL(global_uninitialised) {
  INDEX;
  if (!kBroken || t != 6) out[i] = in[i];
  out[i] = out[i ^ 1] + 1;  // fault
}

KERNEL(global_uninitialised_atomic) {
  INDEX;
  if (!kBroken || t != 7) out[i] = 0;
  atomicAdd(out + i, in[i]);  // fault
}

KERNEL(two_blocks_write_one_byte) {
  INDEX;
  out[i] = 0;
  out[kBroken && t == 8 ? t : i] = in[i];  // fault
}

// --- shared and local memory -------------------------------------------------------------------------------------

KERNEL(shared_out_of_bounds) {
  INDEX;
  __shared__ float s[kThreads];
  s[kBroken ? t + 1 : t] = in[i];  // fault
  out[i] = s[t];
}

KERNEL(shared_misaligned) {
  INDEX;
  __shared__ float s[kThreads];
  char* bytes = reinterpret_cast<char*>(s + t);
  *reinterpret_cast<float*>(bytes + (kBroken && t == 9 ? 2 : 0)) = in[i];  // fault
  out[i] = s[t];
}

KERNEL(local_out_of_bounds) {
  INDEX;
  int a[4];
#pragma unroll 1
  for (int k = 0; k < 4; ++k) a[(k + n) & 3] = k;
  out[i] = a[(t & 3) + (kBroken ? 1 : 0)];  // fault
}

KERNEL(shared_uninitialised) {
  INDEX;
  __shared__ float s[kThreads];
  if (!kBroken || t != 7) s[t] = in[i];
  out[i] = s[t];  // fault
}

KERNEL(shared_uninitialised_atomic) {
  INDEX;
  __shared__ int s[kThreads];
  if (!kBroken || t != 7) s[t] = 0;
  atomicAdd(s + t, t);  // fault
  out[i] = s[t];
}

KERNEL(shared_read_after_write) {
  INDEX;
  __shared__ float s[kThreads];
  s[t] = in[i];
  if (!kBroken) __syncthreads();
  out[i] = s[kThreads - 1 - t];  // fault
}

KERNEL(shared_write_after_read) {
  INDEX;
  __shared__ float s[kThreads];
  s[t] = in[i];
  __syncthreads();
  const float other = s[kThreads - 1 - t];
  if (!kBroken) __syncthreads();
  s[t] = other;  // fault
  out[i] = s[t];
}

KERNEL(shared_write_after_write) {
  INDEX;
  __shared__ float s;
  if (t == 0 || (kBroken && t == 32)) s = in[i];  // fault
  __syncthreads();
  out[i] = s;
}

KERNEL(shared_atomic_after_write) {
  INDEX;
  __shared__ int s;
  if (t == 0) s = 0;
  if (!kBroken) __syncthreads();
  atomicAdd(&s, 1);  // fault
  __syncthreads();
  out[i] = s;
}

KERNEL(shared_read_after_atomic) {
  INDEX;
  __shared__ int s;
  if (t == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, 1);
  if (!kBroken) __syncthreads();
  out[i] = s;  // fault
}

KERNEL(shared_two_values) {
  INDEX;
  __shared__ float s[kThreads];
  s[kBroken && t == 11 ? t + 1 : t] = in[i];  // fault
  if (t != 11) out[i] = s[t];
}

KERNEL(warp_read_after_write) {
  INDEX;
  __shared__ float s[kThreads];
  s[t] = in[i];
  if (!kBroken) __syncwarp();
  out[i] = s[t ^ 1];  // fault
}

KERNEL(warp_write_after_read) {
  INDEX;
  __shared__ float s[kThreads];
  s[t] = in[i];
  __syncwarp();
  const float first = s[t & ~31];  // every lane has read it
  if (!kBroken) __syncwarp();
  if ((t & 31) == 31) s[t & ~31] = 0;  // fault
  out[i] = first;
}

// --- warps and barriers ------------------------------------------------------------------------------------------

KERNEL(shuffle_from_absent_lane) {
  INDEX;
  float value = in[i];
  if (t % 32 < 16) value = __shfl_sync(0xffff, value, kBroken ? 20 : 3);  // fault
  out[i] = value;
}

KERNEL(lane_outside_mask) {
  INDEX;
  float value = in[i];
  if (t % 32 < 16) value = __shfl_sync(kBroken ? 0xff : 0xffff, value, 3);  // fault
  out[i] = value;
}

KERNEL(aligned_after_exit) {
  INDEX;
  __shared__ __align__(16) float s[kThreads];
  s[t] = in[i];
  __syncthreads();
  if (kBroken && t == 9) return;
  out[i] = load_row(shared_address(s) + t % 8 * 16);  // fault
}

KERNEL(divergent_barrier) {
  INDEX;
  __shared__ float s[kThreads];
  s[t] = in[i];
  if (kBroken && in[t] > 63) {
    __syncthreads();
    out[i] = s[kThreads - 1 - t] + 1;
  } else {
    __syncthreads();  // fault
    out[i] = s[kThreads - 1 - t];
  }
}

KERNEL(deadlock) {
  INDEX;
  if (!kBroken || t >= 32) asm volatile("bar.sync 1, 128;" ::: "memory");  // fault
  __syncthreads();
  out[i] = in[i];
}

KERNEL(endless_loop) {
  INDEX;
  while (*static_cast<const volatile float*>(in) < (kBroken ? 1 : 0)) out[i] = 1;  // fault
  out[i] = in[i];
}

// --- asynchronous copies and multiplications ---------------------------------------------------------------------

KERNEL(cp_async_without_wait) {
  INDEX;
  __shared__ float s[kThreads];
  cp_async(s + t, in + i);
  if (!kBroken) asm volatile("cp.async.wait_all;" ::: "memory");
  out[i] = s[t];  // fault
}

KERNEL(cp_async_never_waited) {
  INDEX;
  __shared__ float s[kThreads];
  cp_async(s + t, in + i);  // fault
  if (!kBroken) asm volatile("cp.async.wait_all;" ::: "memory");
  out[i] = in[i];
}

KERNEL(cp_async_of_uninitialised) {
  INDEX;
  __shared__ float s[kThreads];
  cp_async(s + t, kBroken && t == 12 ? out + i : in + i);  // fault
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[i] = s[t];
}

KERNEL(bulk_of_uninitialised) {
  INDEX;
  __shared__ __align__(16) float s[kThreads];
  __shared__ uint64_t barrier;
  if (t == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_expect(&barrier, sizeof s);
    bulk_copy(s, kBroken ? out + i : in + i, sizeof s, &barrier);  // fault
    mbarrier_wait(&barrier, 0);
  }
  out[i] = in[i];
}

KERNEL(bulk_without_wait) {
  INDEX;
  __shared__ __align__(16) float s[kThreads];
  __shared__ uint64_t barrier;
  if (t == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (t == 0) {
    mbarrier_expect(&barrier, sizeof s);
    bulk_copy(s, in + i, sizeof s, &barrier);
  }
  if (!kBroken) mbarrier_wait(&barrier, 0);
  out[i] = s[t];  // fault
}

KERNEL(bulk_never_waited) {
  INDEX;
  __shared__ __align__(16) float s[kThreads];
  __shared__ uint64_t barrier;
  if (t == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_expect(&barrier, sizeof s);
    bulk_copy(s, in + i, sizeof s, &barrier);  // fault
    if (!kBroken) mbarrier_wait(&barrier, 0);
  }
  out[i] = in[i];
}

KERNEL(mbarrier_before_init) {
  INDEX;
  __shared__ uint64_t barrier;
  if (t == 0) mbarrier_init(&barrier, 1);
  if (!kBroken) __syncthreads();
  if (t == 32) mbarrier_expect(&barrier, 0);  // fault
  out[i] = in[i];
}

KERNEL(mbarrier_overrun) {
  INDEX;
  __shared__ uint64_t barrier;
  if (t == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (t < (kBroken ? 2 : 1)) mbarrier_expect(&barrier, 16);  // fault
  out[i] = in[i];
}

__device__ uint64_t descriptor(const void* tile) {  // core matrices of 8 rows x 16 bytes, side by side
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
}
__device__ void multiply(float (&c)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;\n"
      "wgmma.commit_group.sync.aligned;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "l"(a), "l"(b)
      : "memory");
}

KERNEL(wgmma_result_before_wait) {
  INDEX;
  __shared__ __align__(128) uint32_t a[512], b[64];
  for (int k = t; k < 512; k += kThreads) a[k] = 0;
  if (t < 64) b[t] = 0;
  __syncthreads();
  float c[4] = {};
  multiply(c, descriptor(a), descriptor(b));
  if (!kBroken) asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(c[0])::"memory");
  out[i] = c[0];  // fault
  if (kBroken) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

KERNEL(wgmma_overwritten) {
  INDEX;
  __shared__ __align__(128) uint32_t a[512], b[64];
  for (int k = t; k < 512; k += kThreads) a[k] = 0;
  if (t < 64) b[t] = 0;
  __syncthreads();
  float c[4] = {};
  multiply(c, descriptor(a), descriptor(b));
  if (!kBroken) asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(c[0])::"memory");
  if (!kBroken) __syncthreads();
  a[t] = 1;  // fault
  if (kBroken) asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(c[0])::"memory");
  out[i] = c[0];
}

KERNEL(wgmma_never_waited) {
  INDEX;
  __shared__ __align__(128) uint32_t a[512], b[64];
  for (int k = t; k < 512; k += kThreads) a[k] = 0;
  if (t < 64) b[t] = 0;
  __syncthreads();
  float c[4] = {};
  multiply(c, descriptor(a), descriptor(b));  // fault
  if (!kBroken) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  out[i] = in[i];
}
