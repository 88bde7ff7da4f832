// dequantize_sum on the CPU: the specification of the device's, in runs that stay in the first cache.
#include "quantize/sum.hpp"

#include <algorithm>
#include <array>
#include <numeric>

#include "narrowgauge/error.hpp"
#include "quantize/arguments.hpp"

namespace ng {
namespace {

constexpr int64_t kGrain = 8;  // runs

using Run = std::array<float, codec::kRun>;

// The caller's thread alone: a run is one thread's already.
class Serial final : public Executor {
 public:
  int threads() const override { return 1; }
  void set_threads(int) override {}
  std::string name() const override { return "serial"; }

 private:
  void run(int64_t count, int64_t, Body body, const void* context) override { body(context, 0, count); }
};

// Columns [first, first + n) of a row; `first` starts a group and a byte.
CanonicalView part_of(const CanonicalView& matrix, int64_t row, int64_t first, int64_t n) {
  const Format& format = matrix.format;
  const int64_t group = row * format.groups(matrix.cols) + (format.group == 0 ? 0 : first / format.group);
  CanonicalView part = matrix;
  part.rows = 1;
  part.cols = n;
  part.codes += row * format.row_bytes(matrix.cols) + first * format.element.bits / 8;
  part.scales = static_cast<std::byte*>(matrix.scales) + group * static_cast<int64_t>(scale_bytes(format.scale));
  if (matrix.zeros != nullptr) part.zeros += group;
  return part;
}

int64_t run_length(const Format& format) {
  if (format.group == 0) return codec::kRun;
  const int64_t unit = std::lcm(int64_t{format.group}, codec::kBlock);
  return codec::kRun / unit * unit;
}

}  // namespace

void codec::check_peers(std::span<const CanonicalView> peers) {
  NG_CHECK(!peers.empty(), InvalidArgument, "dequantize_sum of no matrices; expected at least one");
  const CanonicalView& first = peers[0];
  for (size_t i = 0; i < peers.size(); ++i) {
    check_canonical(peers[i]);
    const CanonicalView& peer = peers[i];
    NG_CHECK(peer.format == first.format && peer.rows == first.rows && peer.cols == first.cols, InvalidArgument,
             "peers[", i, "] is ", peer.rows, " x ", peer.cols, " in ", peer.format.str(),
             "; expected what peers[0] is, ", first.rows, " x ", first.cols, " in ", first.format.str());
  }
}

void codec::store_quotients(const float* from, int64_t n, int divisor, DType dtype, void* to) {
  const auto over = static_cast<float>(divisor);
  switch (dtype) {
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) static_cast<f16*>(to)[i] = to_f16(from[i] / over);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<bf16*>(to)[i] = to_bf16(from[i] / over);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = from[i] / over;
  }
}

void codec::dequantize_sum(std::span<const CanonicalView> peers, int divisor, const TensorView& out,
                           Executor& executor) {
  check_peers(peers);
  source_of(out.dtype, "out");
  const MatrixView dense = check_dense(out, "out", peers[0]);
  const int64_t rows = dense.rows, cols = dense.cols;
  if (rows == 0 || cols == 0) return;
  const int64_t length = run_length(peers[0].format), runs = (cols + length - 1) / length;
  const auto size = static_cast<int64_t>(dtype_bytes(dense.dtype));
  executor.parallel_for(rows * runs, kGrain, [&](int64_t begin, int64_t end) {
    Serial serial;
    alignas(64) Run sum, values;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / runs, first = unit % runs * length, n = std::min(length, cols - first);
      dequantize(part_of(peers[0], row, first, n), {sum.data(), DType::f32, {1, n}}, serial);
      for (const CanonicalView& peer : peers.subspan(1)) {
        dequantize(part_of(peer, row, first, n), {values.data(), DType::f32, {1, n}}, serial);
        for (size_t i = 0; i < static_cast<size_t>(n); ++i) sum[i] += values[i];
      }
      store_quotients(sum.data(), n, divisor, dense.dtype,
                      static_cast<std::byte*>(dense.data) + (row * dense.row_stride + first) * size);
    }
  });
}

void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, Executor& executor) {
  codec::dequantize_sum(peers, 1, out, executor);
}

}  // namespace ng
