// Stream and Event: ordered work on a GPU, and a point in that order.
//
// A Stream is the caller's (torch's current stream, a CUstream or cudaStream_t of an engine) or one of our own. Work
// that is given to a stream starts when all that was given before it is done; nothing here waits for the GPU but the
// functions called synchronize(). All of it may be captured into a CUDA graph.
//
// Everything works in the device's primary context, the one that the CUDA runtime and torch use, and leaves the
// caller's current context as it was. Functions throw CudaError, also in a child that was forked after CUDA had been
// started. Handles may be used from several threads at once.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

struct CUstream_st;  // of the CUDA driver: a CUstream is a pointer to one
struct CUevent_st;

namespace ng {

class Event;

class Stream {
 public:
  // The caller's stream on cuda:`device`, which must outlive this; null is the default stream. Nothing is checked.
  Stream(int device, CUstream_st* handle) noexcept : device_(device), handle_(handle) {}
  // A stream of our own, which does not wait for the default stream. Copies share it: it goes with the last of them,
  // and the work that it was given goes on.
  static Stream create(int device);

  int device() const noexcept { return device_; }
  CUstream_st* handle() const noexcept { return handle_; }

  // Waits until all work is done, and throws what went wrong on the device since the last time: CudaError for a kernel
  // that failed, InvalidArgument for what a kernel found in its input (quantize.hpp).
  void synchronize() const;
  // Whether all work is done.
  bool is_done() const;
  // Work that is given to this stream from now on starts after the event.
  void wait(const Event& event) const;
  // Whether work is being recorded into a graph: it does not run then, and synchronize() is an error.
  bool is_capturing() const;

 private:
  int device_;
  CUstream_st* handle_;
  std::shared_ptr<CUstream_st> owner_;  // of a stream of our own
};

// A point in a stream's order: where it was last recorded. Without timing. Move-only.
class Event {
 public:
  explicit Event(int device);
  ~Event();
  Event(Event&& other) noexcept : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }

  int device() const noexcept { return device_; }
  CUevent_st* handle() const noexcept { return handle_; }

  // Moves the point to behind all work that the stream has been given. The stream must be of the event's device.
  void record(const Stream& stream);
  // Waits for the work before the point, none if it was never recorded. Throws CudaError if a kernel failed; what
  // kernels found in their input is left to Stream::synchronize().
  void synchronize() const;
  bool is_done() const;

 private:
  int device_;
  CUevent_st* handle_ = nullptr;
};

// Copies bytes in the stream's order, from and to memory of its GPU or the host's. Both must stay until it is done.
// Only pinned host memory is copied in the background; with other memory the call may wait until the bytes have been
// read or written. Throws CudaError.
void copy(void* to, const void* from, size_t bytes, const Stream& stream);

}  // namespace ng
