// A GPU as a place of collectives: coding by the kernels of quantize.hpp, and the launches of those of sm80_wire.cu.
#include <algorithm>

#include "collective/place.hpp"
#include "driver/kernel.hpp"
#include "driver/pointer.hpp"
#include "kernels/wire_args.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"
#include "quantize/arguments.hpp"
#include "quantize/sum.hpp"

namespace ng {

namespace cuda::images {
extern const Image sm80_wire;
}

namespace collective {
namespace {

using cuda::ContextScope;

class DevicePlace final : public Place {
 public:
  explicit DevicePlace(const Stream& stream)
      : stream_(stream), pool_(std::make_shared<StreamPool>(default_device_pool(stream.device()), stream)) {}

  const std::shared_ptr<Pool>& pool() const override { return pool_; }

  void clear(std::byte* data, size_t bytes) const override {
    if (bytes == 0) return;
    const ContextScope context(stream_.device());
    NG_CUDA(context.driver(), cuMemsetD8Async(reinterpret_cast<cuda::DevicePtr>(data), 0, bytes, handle_of(stream_)));
  }

  void copy(std::byte* to, const std::byte* from, size_t bytes) const override { ng::copy(to, from, bytes, stream_); }
  void upload(std::byte* to, std::span<const std::byte> from) const override { copy(to, from.data(), from.size()); }
  void download(std::span<std::byte> to, const std::byte* from) const override {
    copy(to.data(), from, to.size());
    stream_.synchronize();
  }

  void check(const void* pointer, const char* name, size_t alignment) const override {
    const ContextScope context(stream_.device());
    cuda::check_pointer(pointer, name, stream_.device(), alignment);
  }

  void encode(const Wire& wire, const void* from, DType dtype, int64_t n, Randomness random, float* error,
              std::byte* to) const override {
    const int64_t bytes = unit_bytes(wire, dtype, n);
    clear(to + bytes, static_cast<size_t>(wire_bytes(wire, dtype, n) - bytes));
    if (n == 0) return;
    if (!wire.format) {
      ng::copy(to, from, static_cast<size_t>(bytes), stream_);
      return;
    }
    const CanonicalView codes = unit_part(*wire.format, to, n, 0, n);
    QuantizeOptions options{.nan = NanPolicy::keep, .stochastic = wire.stochastic, .seed = random.seed};
    options.first_index = random.first;
    if (!wire.hadamard && error == nullptr) {
      quantize(unit_row(from, dtype, n), codes, options, stream_);
      return;
    }
    SharedBytes wide = floats(n);
    launch("prepare", n,
           cuda::PrepareArgs{.from = from,
                             .type = codec::source_of(dtype, "input"),
                             .error = error,
                             .hadamard = wire.hadamard,
                             .to = reinterpret_cast<float*>(wide.data()),
                             .n = n});
    quantize(unit_row(wide.data(), DType::f32, n), codes, options, stream_);
    if (error == nullptr) return;
    dequantize(codes, unit_row(wide.data(), DType::f32, n), stream_);
    launch("keep_error", n,
           cuda::KeepErrorArgs{
               .sent = reinterpret_cast<const float*>(wide.data()), .hadamard = wire.hadamard, .error = error, .n = n});
  }

  void decode(const Wire& wire, const std::byte* from, DType dtype, int64_t n, void* to,
              DType to_dtype) const override {
    if (n == 0) return;
    if (!wire.format && dtype == to_dtype) {
      ng::copy(to, from, static_cast<size_t>(unit_bytes(wire, dtype, n)), stream_);
    } else {
      decode_sum(wire, std::span(&from, 1), dtype, n, 1, to, to_dtype);
    }
  }

  void copy_codes(const std::byte* from, int64_t n, int64_t first, const CanonicalView& to) const override {
    for (const CodesPart& part : codes_parts(from, n, first, to)) copy(part.to, part.from, part.bytes);
  }

  void decode_sum(const Wire& wire, std::span<const std::byte* const> from, DType dtype, int64_t n, int divisor,
                  void* to, DType to_dtype) const override {
    if (n == 0) return;
    NG_CHECK(from.size() <= cuda::kMostPeers, InvalidArgument, "a sum of ", from.size(),
             " ranks in one level on a device; expected at most ", cuda::kMostPeers);
    cuda::FinishArgs finish{};
    finish.peers = 1;
    finish.type = codec::Source::f32;
    finish.hadamard = wire.hadamard;
    finish.divisor = static_cast<float>(divisor);
    finish.to = to;
    finish.to_type = codec::source_of(to_dtype, "out");
    finish.n = n;
    SharedBytes sum;
    if (wire.format) {
      std::vector<CanonicalView> peers;
      for (const std::byte* unit : from) peers.push_back(unit_part(*wire.format, unit, n, 0, n));
      if (!wire.hadamard) {
        codec::dequantize_sum(peers, divisor, unit_row(to, to_dtype, n), stream_);
        return;
      }
      sum = floats(n);
      dequantize_sum(peers, unit_row(sum.data(), DType::f32, n), stream_);
      finish.peer[0] = sum.data();
    } else {
      std::copy(from.begin(), from.end(), finish.peer);
      finish.peers = static_cast<int32_t>(from.size());
      finish.type = codec::source_of(dtype, "input");
    }
    launch("finish", n, finish);
  }

 private:
  SharedBytes floats(int64_t n) const { return {pool_, static_cast<size_t>(n) * sizeof(float)}; }

  // A warp for each block of elements.
  template <typename Arguments>
  void launch(const char* name, int64_t n, const Arguments& arguments) const {
    constexpr int64_t kElements = cuda::kWireBlock * cuda::kWireWarps;
    const ContextScope context(stream_.device());
    const cuda::Function kernel = cuda::find_kernel(cuda::images::sm80_wire, name, stream_.device());
    cuda::launch({.name = name,
                  .kernel = kernel,
                  .grid = {static_cast<unsigned>((n + kElements - 1) / kElements), 1, 1},
                  .block = {32 * cuda::kWireWarps, 1, 1}},
                 stream_, arguments);
  }

  static cuda::StreamHandle handle_of(const Stream& stream) { return cuda::handle_of(stream); }

  const Stream stream_;
  const std::shared_ptr<Pool> pool_;
};

}  // namespace

std::shared_ptr<Place> device_place(const Stream& stream) { return std::make_shared<DevicePlace>(stream); }

}  // namespace collective
}  // namespace ng
