// The primary context of a device, current for the length of a scope.
//
// It is retained on first use and kept until the process ends, as the CUDA runtime does: whoever uses the device at
// exit still finds it.
#pragma once

#include "driver/driver.hpp"

namespace ng::cuda {

class ContextScope {
 public:
  // Throws CudaError if there is no driver, after fork, or if the device gives no context; InvalidArgument if there is
  // no device of this index.
  explicit ContextScope(int device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  const Driver* operator->() const noexcept { return &driver_; }
  const Driver& driver() const noexcept { return driver_; }

 private:
  const Driver& driver_;
};

// While it lives, calls of this thread that could wait, such as those for memory, do not end the captures of graphs
// that are in progress. pre: a context is current
class CaptureExemption {
 public:
  explicit CaptureExemption(const Driver& driver) : driver_(driver) {
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~CaptureExemption() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  CaptureExemption(const CaptureExemption&) = delete;
  CaptureExemption& operator=(const CaptureExemption&) = delete;

 private:
  const Driver& driver_;
  CaptureMode mode_ = CaptureMode::relaxed;
};

// Calls f(context) with the device's context current, and leaves it at that if something fails: for what is given back.
// In a child that was forked, and when the driver has gone at the end of the process, there is nothing to give back.
template <typename F>
void where_possible(int device, const F& f) noexcept {
  try {
    const ContextScope context(device);
    f(context);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
  }
}

// Notes what a device was last asked to run, for the messages of errors that show later. `name` lives for ever.
void note_kernel(int device, const char* name) noexcept;

// As check(), with the device's last kernel in the message.
void check_device(Result result, const char* what, int device);

// Called on every Stream::synchronize() of the device, once for each `check` however often it is registered: throws
// what kernels have found in their input. `check` lives for ever and is called with the context current.
class DeviceCheck {
 public:
  virtual ~DeviceCheck() = default;
  virtual void operator()(int device) = 0;
};
void register_check(DeviceCheck& check);
void run_checks(int device);

}  // namespace ng::cuda
