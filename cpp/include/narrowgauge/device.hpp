// Devices: the CPU that the process runs on, its features, and the instruction set whose kernels are used; and the
// NVIDIA GPUs, if there are any.
//
// Each room keeps one table of functions per instruction set; the choice is made once, by CPUID, and can be
// asked, printed and forced: NARROWGAUGE_ISA=portable|avx2|avx512|amx forces a lower one for the whole process.
//
// GPUs are reached through the driver's library, libcuda.so.1, which is looked for when they are first asked for:
// nothing is linked, and a process that never asks never loads it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ng {

// Ordered: each includes all before it.
//   avx2    AVX2, FMA, F16C, BMI2, SSE4.2, PCLMULQDQ
//   avx512  F, BW, DQ, VL, VBMI, VBMI2, VNNI; a CPU that lacks one of them runs avx2
//   amx     TILE, INT8, BF16, and the system's permission to use tiles, which isa_supported() asks for once in a
//   process
enum class Isa : uint8_t { portable, avx2, avx512, amx };

std::string_view isa_name(Isa isa) noexcept;
Isa isa_from_name(std::string_view name);  // throws InvalidArgument naming the choices

// The best one that this CPU and operating system can run.
Isa isa_supported() noexcept;

// The one in use. Throws InvalidArgument if NARROWGAUGE_ISA names none or one that the CPU lacks.
Isa isa();

// Changes the one in use, for tests and benchmarks. Throws InvalidArgument if the CPU lacks it.
// Thread-safe, but calls that are already running finish with the old one.
void force_isa(Isa isa);

// Why a CPU that has AMX does not run it, in a sentence for users: the system's permission, or the compiler's
// assembler. Empty if it does, or has none.
std::string why_no_amx();

// The CPU's model name and the features that matter here ("avx2", "avx512_vbmi", "amx_bf16", ...).
std::string cpu_name();
std::vector<std::string> cpu_features();

// Where memory lies, and work on it runs.
struct Device {
  int gpu = -1;  // its index; -1: the CPU

  // "cpu", "cuda:1"; "cuda" is cuda:0. Throws InvalidArgument.
  static Device parse(std::string_view text);
  std::string str() const;
  bool is_cpu() const noexcept { return gpu < 0; }
  friend bool operator==(Device, Device) = default;
};

// --- GPUs --------------------------------------------------------------------------------------------------------

// Why no GPU can be used, in a sentence for users; empty if one can.
std::string why_no_cuda();

// GPUs that the driver shows (CUDA_VISIBLE_DEVICES chooses); 0 where there is none. Like the two below it throws
// CudaError in a child that was forked after CUDA had been started. All four are thread-safe.
int cuda_device_count();

struct CudaDevice {
  std::string name;
  int capability = 0;  // compute capability: 80 for 8.0
  int multiprocessors = 0;
  uint64_t memory_bytes = 0;
  uint64_t l2_bytes = 0;
  uint64_t shared_bytes = 0;  // that a block may ask for
};

// Throws CudaError, with why_no_cuda(), if there is no GPU; InvalidArgument if there is none of this index.
CudaDevice cuda_device(int index);

// CUDA version that the driver is for: 13000 for 13.0. Throws CudaError.
int cuda_driver_version();

// The architectures that this build has kernels for, such as "sm_80 sm_90 compute_80"; empty if it was made without
// nvcc. compute_80 is PTX, which the driver compiles for any later GPU when it is first used.
std::string_view cuda_architectures() noexcept;

}  // namespace ng
