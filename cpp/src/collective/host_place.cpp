// The host as a place.
#include <cstring>
#include <utility>

#include "collective/place.hpp"

namespace ng::collective {
namespace {

class HostPlace final : public Place {
 public:
  HostPlace(Executor& executor, std::shared_ptr<Pool> pool) : executor_(executor), pool_(std::move(pool)) {}

  const std::shared_ptr<Pool>& pool() const override { return pool_; }
  void clear(std::byte* data, size_t bytes) const override {
    if (bytes != 0) std::memset(data, 0, bytes);
  }
  void copy(std::byte* to, const std::byte* from, size_t bytes) const override {
    if (bytes != 0) std::memcpy(to, from, bytes);
  }
  void upload(std::byte* to, std::span<const std::byte> from) const override {
    std::memcpy(to, from.data(), from.size());
  }
  void download(std::span<std::byte> to, const std::byte* from) const override {
    std::memcpy(to.data(), from, to.size());
  }
  void check(const void*, const char*, size_t) const override {}

  void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error,
              std::byte* to) const override {
    collective::encode(wire, from, dtype, n, random, error, to, executor_);
  }
  void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to,
              DType to_dtype) const override {
    collective::decode(wire, from, dtype, n, to, to_dtype, executor_);
  }
  void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) const override {
    collective::copy_codes(from, n, first, to);
  }
  void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor,
                  void* to, DType to_dtype) const override {
    collective::decode_sum(wire, from, dtype, n, divisor, to, to_dtype, executor_);
  }

 private:
  Executor& executor_;
  const std::shared_ptr<Pool> pool_;
};

}  // namespace

std::shared_ptr<Place> host_place(Executor& executor, std::shared_ptr<Pool> pool) {
  return std::make_shared<HostPlace>(executor, std::move(pool));
}

}  // namespace ng::collective
