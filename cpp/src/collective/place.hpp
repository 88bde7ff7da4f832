// Where a collective's memory lies and its work is done: on the host, by an executor, or on a GPU, in a stream's order.
// The collectives are the same on both, and so are the bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "collective/wire.hpp"
#include "narrowgauge/collective.hpp"
#include "narrowgauge/memory.hpp"
#include "narrowgauge/stream.hpp"

namespace ng::collective {

// Coding is as in wire.hpp. On a GPU all of it is given to the stream and nothing waits, but for download().
class Place {
 public:
  virtual ~Place() = default;

  // Of the place's memory; on a GPU what is freed goes back in the stream's order.
  virtual const std::shared_ptr<Pool>& pool() const = 0;
  virtual void clear(std::byte* data, size_t bytes) const = 0;
  virtual void copy(std::byte* to, const std::byte* from, size_t bytes) const = 0;
  // From and to memory of the caller's own on the host, which may be changed or read when they return.
  virtual void upload(std::byte* to, std::span<const std::byte> from) const = 0;
  virtual void download(std::span<std::byte> to, const std::byte* from) const = 0;
  // Throws InvalidArgument, with `name`, if `pointer` is known not to be memory of the place, aligned so. Null passes.
  virtual void check(const void* pointer, const char* name, size_t alignment) const = 0;

  virtual void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error,
                      std::byte* to) const = 0;
  virtual void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to,
                      DType to_dtype) const = 0;
  virtual void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) const = 0;
  virtual void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor,
                          void* to, DType to_dtype) const = 0;
};

std::shared_ptr<Place> host_place(Executor& executor, std::shared_ptr<Pool> pool);

// Memory comes from default_device_pool(). Throws CudaError if there is no driver.
std::shared_ptr<Place> device_place(const Stream& stream);

}  // namespace ng::collective
