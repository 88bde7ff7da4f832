// The processes that run kernels: python3 server.py, started when they are first needed, at most SIMGPU_PROCESSES.
//
// A process has one Unix socket to this one and serves one request at a time, so kernels of several streams run at the
// same time in several processes. Their atomic operations are atomic within a kernel only. Little-endian protocol:
//
//   request   u32 kind, u32 bytes, body      load:   u64 module, PTX text
//                                            launch: u64 module, u32 device, u32 grid[3], u32 block[3],
//                                                    u32 dynamic shared bytes, u32 variables, u32 name bytes,
//                                                    u64 address of each variable, name, parameters as in memory
//   reply     i32 CUDA result, u32 bytes, text      load: what is wrong, or the module in lines (see module.cpp)
//
// Device memory is shared, see memory.hpp. A process that has ended is reported, and its request has failed.
#pragma once

#include <cstdint>
#include <string>

#include "core/shim/cuda.hpp"

namespace ng::cuda {

struct Reply {
  Result result;
  std::string text;
};

// The PTX of a module, which each process loads when it first needs it.
struct ModuleText {
  uint64_t id;
  std::string ptx;
};

// Both run in any process, wait for one if all are busy, and fail with launch_failed if the process ends.
Reply load_module(const ModuleText& module);
Result launch_kernel(const ModuleText& module, const std::string& body);

// Values in the bytes of a message.
template <typename Number>
void append(std::string& message, Number value) {
  message.append(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace ng::cuda
