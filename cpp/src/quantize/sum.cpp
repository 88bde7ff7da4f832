// dequantize_sum on the CPU: the specification of the device's, in bands of rows that stay in the cache.
#include <algorithm>
#include <vector>

#include "narrowgauge/error.hpp"
#include "quantize/arguments.hpp"

namespace ng {
namespace {

// Elements of a band; a longer row is a band too.
constexpr int64_t kBand = 65536;
constexpr int64_t kGrain = 4096;

CanonicalView rows_of(const CanonicalView& matrix, int64_t first, int64_t count) {
  const Format& format = matrix.format;
  const int64_t groups = first * format.groups(matrix.cols);
  CanonicalView band = matrix;
  band.rows = count;
  band.codes += first * format.row_bytes(matrix.cols);
  band.scales = static_cast<std::byte*>(matrix.scales) + groups * static_cast<int64_t>(scale_bytes(format.scale));
  if (matrix.zeros != nullptr) band.zeros += groups;
  return band;
}

void store(const float* from, int64_t n, DType dtype, void* to) {
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case DType::f16: static_cast<f16*>(to)[i] = to_f16(from[i]); break;
      case DType::bf16: static_cast<bf16*>(to)[i] = to_bf16(from[i]); break;
      default: static_cast<float*>(to)[i] = from[i];
    }
  }
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

void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, Executor& executor) {
  codec::check_peers(peers);
  codec::source_of(out.dtype, "out");
  const MatrixView dense = codec::check_dense(out, "out", peers[0]);
  const int64_t rows = dense.rows, cols = dense.cols;
  if (rows == 0 || cols == 0) return;
  const int64_t band = std::min(rows, std::max<int64_t>(1, kBand / cols));
  std::vector<float> sum(static_cast<size_t>(band * cols)), values(sum.size());
  for (int64_t row = 0; row < rows; row += band) {
    const int64_t count = std::min(band, rows - row);
    for (const CanonicalView& peer : peers) {
      const bool first = &peer == peers.data();
      dequantize(rows_of(peer, row, count), {first ? sum.data() : values.data(), DType::f32, {count, cols}}, executor);
      if (first) continue;
      executor.parallel_for(count * cols, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum[static_cast<size_t>(i)] += values[static_cast<size_t>(i)];
      });
    }
    const auto size = static_cast<int64_t>(dtype_bytes(dense.dtype));
    executor.parallel_for(count, std::max<int64_t>(1, kGrain / cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        store(sum.data() + i * cols, cols, dense.dtype,
              static_cast<std::byte*>(dense.data) + (row + i) * dense.row_stride * size);
      }
    });
  }
}

}  // namespace ng
