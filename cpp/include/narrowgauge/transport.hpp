// Transport: what carries the bytes of a collective from rank to rank: a library that is there anyway
// (torch.distributed, MPI, NCCL), or memory, where the ranks are threads of one process. Never sockets of our own.
//
// All ranks start the same transfers in the same order. A rank's transport is used by one thread at a time.
//
// One that carries memory of a GPU works in the order of a stream: a transfer follows what the stream has been given
// before, and what "is received" or "may be written again" is so for work that the stream is given from then on.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "narrowgauge/device.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/stream.hpp"

namespace ng {

// Memory of a transfer, shared between who started it and, until its bytes have come, what carries them: MPI and
// torch.distributed cannot be told to stop, so what a transfer that is given up still reads and writes must have no
// other use. Copies share; it is freed with the last, in any thread.
class SharedBytes {
 public:
  SharedBytes() = default;
  SharedBytes(std::shared_ptr<std::byte> data, size_t size) : data_(std::move(data)), size_(size) {}
  // Of a pool, contents undefined.
  SharedBytes(const std::shared_ptr<Pool>& pool, size_t size) : size_(size) {
    if (size == 0) return;
    data_ = {static_cast<std::byte*>(pool->allocate(size)),
             [pool, size](std::byte* data) { pool->deallocate(data, size); }};
  }

  std::byte* data() const noexcept { return data_.get(); }
  size_t size() const noexcept { return size_; }
  const std::shared_ptr<std::byte>& owner() const noexcept { return data_; }
  SharedBytes part(size_t first, size_t bytes) const { return {{data_, data() + first}, bytes}; }

 private:
  std::shared_ptr<std::byte> data_;
  size_t size_ = 0;
};

// One that was started. It may be destroyed at any time.
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Returns when all has been received, and what was sent may be written again. Throws Timeout, which names the ranks
  // that are missing where that is known, and TransportError.
  virtual void wait() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string name() const = 0;
  // Of what memory it carries the bytes.
  virtual Device device() const { return {}; }
  // The same ranks and transfers, in the order of another stream of the device. Throws InvalidArgument for host memory.
  virtual std::shared_ptr<Transport> on(const Stream& stream);

  // Waits, within the timeout, until a GPU has done all transfers. Throws what Transfer::wait() throws.
  virtual void synchronize() {}

  // Both return when the transfer has been started. `operation` is what errors call it.

  // Every rank sends the same number of bytes to all. received: those of rank 0, of rank 1, and so on.
  virtual std::unique_ptr<Transfer> all_gather(const SharedBytes& sent, const SharedBytes& received,
                                               std::string_view operation) = 0;
  // sent: first the sent_bytes[0] bytes for rank 0, then those for rank 1, and so on; received likewise.
  virtual std::unique_ptr<Transfer> all_to_all(const SharedBytes& sent, std::span<const int64_t> sent_bytes,
                                               const SharedBytes& received, std::span<const int64_t> received_bytes,
                                               std::string_view operation) = 0;

  // Called by all ranks: a transport among those that give the same color, in the order of their ranks here.
  virtual std::shared_ptr<Transport> split(int color) = 0;
};

// Transports of `size` ranks within this process, each for a thread of its own. A rank whose transport is destroyed has
// gone: transfers that still need it throw TransportError.
std::vector<std::shared_ptr<Transport>> in_process_transports(
    int size, std::chrono::milliseconds timeout = std::chrono::minutes(5));

}  // namespace ng
