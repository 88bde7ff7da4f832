// PTX by hand, for tests of the simulated device: no compiler is needed.
#pragma once

namespace ng::cuda {

// y[i] += a * x[i] for i < n.
inline constexpr char kAxpy[] = R"(
.version 7.0
.target sm_80
.address_size 64
.visible .entry axpy(.param .f32 a, .param .u64 x, .param .u64 y, .param .u32 n)
{
  .reg .pred %p<2>;
  .reg .f32 %f<5>;
  .reg .b32 %r<6>;
  .reg .b64 %rd<8>;
  .loc 1 7 0
  ld.param.f32 %f1, [a];
  ld.param.u64 %rd1, [x];
  ld.param.u64 %rd2, [y];
  ld.param.u32 %r5, [n];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.s32 %r4, %r1, %r2, %r3;
  setp.ge.u32 %p1, %r4, %r5;
  @%p1 bra DONE;
  .loc 1 9 0
  mul.wide.u32 %rd3, %r4, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.f32 %f2, [%rd4];
  ld.global.f32 %f3, [%rd5];
  fma.rn.f32 %f4, %f1, %f2, %f3;
  st.global.f32 [%rd5], %f4;
DONE:
  ret;
}
.file 1 "axpy.cu"
)";

// calls += step; *out = calls * factor.
inline constexpr char kCounter[] = R"(
.version 7.0
.target sm_70
.address_size 64
.visible .global .align 4 .u32 calls = 40;
.visible .const .align 4 .u32 factor = 10;
.visible .entry count(.param .u32 step, .param .u64 out)
{
  .reg .b32 %r<6>;
  .reg .b64 %rd<2>;
  ld.param.u32 %r1, [step];
  ld.param.u64 %rd1, [out];
  ld.global.u32 %r2, [calls];
  add.u32 %r3, %r2, %r1;
  st.global.u32 [calls], %r3;
  ld.const.u32 %r4, [factor];
  mul.lo.u32 %r5, %r3, %r4;
  st.global.u32 [%rd1], %r5;
  ret;
}
)";

// out[i] = i of the block: every block stores to the same bytes.
inline constexpr char kSameBytes[] = R"(
.version 7.0
.target sm_80
.address_size 64
.visible .entry same_bytes(.param .u64 out)
{
  .reg .b32 %r<2>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r1;
  ret;
}
)";

// out[i] = i + 1 of the block, through shared memory, without the barrier that this needs.
inline constexpr char kMissingBarrier[] = R"(
.version 7.0
.target sm_80
.address_size 64
.visible .entry missing_barrier(.param .u64 out)
{
  .reg .b32 %r<8>;
  .reg .b64 %rd<4>;
  .shared .align 4 .b8 slots[512];
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, slots;
  shl.b32 %r3, %r1, 2;
  add.u32 %r4, %r2, %r3;
  st.shared.u32 [%r4], %r1;
  xor.b32 %r5, %r3, 256;
  add.u32 %r6, %r2, %r5;
  ld.shared.u32 %r7, [%r6];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r7;
  ret;
}
)";

}  // namespace ng::cuda
