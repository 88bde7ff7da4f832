// Streams and events over the driver's.
#include "narrowgauge/stream.hpp"

#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace ng {

using cuda::ContextScope;
using cuda::Result;

namespace {

// cuStreamQuery and cuEventQuery.
bool done(Result result, const char* what, int device) {
  if (result == Result::not_ready) return false;
  cuda::check_device(result, what, device);
  return true;
}

void destroy(int device, CUstream_st* stream) noexcept {
  try {
    const ContextScope context(device);
    context->cuStreamDestroy_v2(reinterpret_cast<cuda::StreamHandle>(stream));
  } catch (const Error&) {
    return;  // a forked child, whose parent has the stream
  }
}

}  // namespace

// --- Stream ------------------------------------------------------------------------------------------------------

Stream Stream::create(int device) {
  const ContextScope context(device);
  cuda::StreamHandle handle = nullptr;
  NG_CUDA(context.driver(), cuStreamCreate(&handle, cuda::kStreamNonBlocking));
  Stream stream(device, reinterpret_cast<CUstream_st*>(handle));
  stream.owner_ = {stream.handle_, [device](CUstream_st* owned) { destroy(device, owned); }};
  return stream;
}

void Stream::synchronize() const {
  const ContextScope context(device_);
  cuda::check_device(context->cuStreamSynchronize(cuda::handle_of(*this)), "cuStreamSynchronize", device_);
  cuda::run_checks(device_);
}

bool Stream::is_done() const {
  const ContextScope context(device_);
  return done(context->cuStreamQuery(cuda::handle_of(*this)), "cuStreamQuery", device_);
}

void Stream::wait(const Event& event) const {
  const ContextScope context(device_);
  NG_CUDA(context.driver(), cuStreamWaitEvent(cuda::handle_of(*this), cuda::handle_of(event), 0));
}

bool Stream::is_capturing() const {
  const ContextScope context(device_);
  auto status = cuda::CaptureStatus::none;
  NG_CUDA(context.driver(), cuStreamIsCapturing(cuda::handle_of(*this), &status));
  return status != cuda::CaptureStatus::none;
}

// --- Event -------------------------------------------------------------------------------------------------------

Event::Event(int device) : device_(device) {
  const ContextScope context(device);
  cuda::EventHandle handle = nullptr;
  NG_CUDA(context.driver(), cuEventCreate(&handle, cuda::kEventDisableTiming));
  handle_ = reinterpret_cast<CUevent_st*>(handle);
}

Event::~Event() {
  if (handle_ == nullptr) return;
  try {
    const ContextScope context(device_);
    context->cuEventDestroy_v2(cuda::handle_of(*this));
  } catch (const Error&) {
    return;  // as for streams
  }
}

void Event::record(const Stream& stream) {
  NG_CHECK(stream.device() == device_, InvalidArgument, "an event of cuda:", device_,
           " is recorded in a stream of cuda:", stream.device());
  const ContextScope context(device_);
  NG_CUDA(context.driver(), cuEventRecord(cuda::handle_of(*this), cuda::handle_of(stream)));
}

void Event::synchronize() const {
  const ContextScope context(device_);
  cuda::check_device(context->cuEventSynchronize(cuda::handle_of(*this)), "cuEventSynchronize", device_);
}

bool Event::is_done() const {
  const ContextScope context(device_);
  return done(context->cuEventQuery(cuda::handle_of(*this)), "cuEventQuery", device_);
}

void copy(void* to, const void* from, size_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  const ContextScope context(stream.device());
  const auto address = [](const void* pointer) { return reinterpret_cast<cuda::DevicePtr>(pointer); };
  NG_CUDA(context.driver(), cuMemcpyAsync(address(to), address(from), bytes, cuda::handle_of(stream)));
}

}  // namespace ng
