// Small kernels that exercise threads, warps and atomics, some with a planted fault.
#include <cassert>
#include <cstdint>
#include <cstdio>
extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
template <bool SYNC>
__device__ void reduce_(const float* a, float* out, int n) {
  __shared__ float s[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += a[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = v;
  if (SYNC) __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x == 0) atomicAdd(out, v);
  }
}
extern "C" __global__ void reduce(const float* a, float* out, int n) { reduce_<true>(a, out, n); }
extern "C" __global__ void reduce_race(const float* a, float* out, int n) { reduce_<false>(a, out, n); }
extern "C" __global__ void hist(const int* a, int* h, int n) {
  __shared__ int s[64];
  for (int i = threadIdx.x; i < 64; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&s[a[i]], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 64; i += blockDim.x) atomicAdd(&h[i], s[i]);
}
extern "C" __global__ void lock(int* l, int* n) {  // spin lock, every thread of every block
  bool done = false;
  while (!done)
    if (atomicCAS(l, 0, 1) == 0) {
      *(volatile int*)n = *(volatile int*)n + 1;
      __threadfence();  // sync: the count is visible before the lock is open; weak ordering is not simulated
      atomicExch(l, 0);
      done = true;
    }
}
extern "C" __global__ void collatz(const int* a, int* steps, int n) {  // data-dependent divergence
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int x = a[i], k = 0;
  while (x != 1) {
    x = x & 1 ? 3 * x + 1 : x >> 1;
    k++;
  }
  steps[i] = k;
}
extern "C" __global__ void half_warp_shfl(int* o) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_sync(0xffff, v, 20);
  o[threadIdx.x] = v;
}
extern "C" __global__ void local_array(int* o, int n) {
  int t[16];
  for (int i = 0; i < 16; i++) t[i] = i * threadIdx.x;
  int s = 0;
  for (int i = 0; i < n; i++) s += t[(i * 7) & 15];
  o[threadIdx.x] = s;
}
extern "C" __global__ void warp_votes(unsigned* o) {
  unsigned b = __ballot_sync(~0u, threadIdx.x % 3 == 0), m = __match_any_sync(~0u, threadIdx.x % 5),
           r = __reduce_add_sync(~0u, threadIdx.x);
  o[threadIdx.x * 4] = b;
  o[threadIdx.x * 4 + 1] = m;
  o[threadIdx.x * 4 + 2] = r;
  o[threadIdx.x * 4 + 3] = __syncthreads_count(threadIdx.x & 1);
}
extern "C" __global__ void strided(const float* a, float* b) { b[threadIdx.x] = a[threadIdx.x * 32]; }
extern "C" __global__ void talk(int bad) {
  if (threadIdx.x == 0) printf("%d\n", bad);
  assert(threadIdx.x != bad);
}
__device__ int counter = 41;
__constant__ int table[4] = {2, 3, 5, 7};
extern "C" __global__ void variables(int* o) { o[threadIdx.x] = table[threadIdx.x] + atomicAdd(&counter, 1) * 0; }
