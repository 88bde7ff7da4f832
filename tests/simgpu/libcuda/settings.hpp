// What the environment says about the simulated GPU, read once, and the report of what went wrong.
//
//   SIMGPU_DEVICES         devices, default 1
//   SIMGPU_CC              compute capability of each, 80 by default: 80 86 89 90 100 103 120
//   SIMGPU_MEMORY          bytes of memory of each, default 1 GiB; only what is mapped takes memory of the host
//   SIMGPU_DRIVER_VERSION  what cuDriverGetVersion says, default 13000
//   SIMGPU_PROCESSES       simulator processes at most, default the number of cores
//   SIMGPU_DELAY           `adversarial`: nothing runs until somebody waits for it
//   SIMGPU_REPORT          the file that reports are appended to, default the standard error output
//   SIMGPU_COUNTERS        the file that each launch appends its counters to, a line of JSON: read by server.py
//   SIMGPU_PYTHON          the interpreter of the simulator processes, default python3
#pragma once

#include <cstddef>
#include <string>

#include "core/shim/cuda.hpp"

namespace ng::cuda {

struct Settings {
  int devices = 1;
  int compute_capability = 80;
  size_t memory = size_t{1} << 30;
  int driver_version = 13000;
  int processes = 1;
  bool adversarial = false;
  std::string report;
  std::string python = "python3";
};

const Settings& settings();

// The value of an attribute of the devices; -1 if it is not known.
int device_attribute(DeviceAttribute attribute);

// Adds a line to the report.
void report(const std::string& text);

// How functions of this library fail: entry points return the result.
struct Failure {
  Result result;
};
[[noreturn]] inline void fail(Result result) { throw Failure{result}; }
inline void require(bool condition, Result otherwise = Result::invalid_value) {
  if (!condition) fail(otherwise);
}

// Results that the library's own code has no name for.
inline constexpr Result kIllegalState{401};
inline constexpr Result kCaptureImplicit{906};
inline constexpr Result kCaptureWrongThread{908};

}  // namespace ng::cuda
