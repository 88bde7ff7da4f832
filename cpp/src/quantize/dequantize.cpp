// dequantize and dequantize_sum: matrices cut into runs for the codec's kernels, checked here and nowhere below. On the
// CPU they are the specification of the device's.
#include <algorithm>
#include <array>

#include "narrowgauge/error.hpp"
#include "quantize/arguments.hpp"
#include "quantize/run.hpp"
#include "quantize/sum.hpp"

namespace ng {
namespace {

using codec::check_canonical;
using codec::check_dense;
using codec::kRun;
using codec::Source;
using codec::source_of;

// Work handed to a thread at a time, in elements: enough to hide the hand-over.
constexpr int64_t kGrain = 65536;

// Decodes runs of matrices that have one Format and one shape. For one thread.
class RunDecoder {
 public:
  RunDecoder(const Format& format, int64_t cols)
      : element_(codec::element_of(format.element, false)),
        has_zeros_(format.element.has_zero_point()),
        row_bytes_(format.row_bytes(cols)),
        groups_(format.groups(cols)),
        group_(format.group == 0 ? kRun : format.group),
        scale_(static_cast<codec::Scale>(format.scale)),
        scale_size_(static_cast<int64_t>(scale_bytes(format.scale))),
        has_groups_(format.group != 0) {}

  // Columns [begin, begin + n) of a row, a run.
  void operator()(const CanonicalView& matrix, int64_t row, int64_t begin, int64_t n, Source type, void* out) {
    const int64_t count = (n + group_ - 1) / group_;
    const int64_t at = row * groups_ + (has_groups_ ? begin / group_ : 0);
    const float global = matrix.format.has_global_scale() ? *matrix.global_scale : 1.0f;
    kernels_.scale_values(static_cast<const std::byte*>(matrix.scales) + at * scale_size_, scale_, count, global,
                          scales_.scale.data());
    for (int64_t g = 0; has_zeros_ && g < count; ++g) scales_.zero[static_cast<size_t>(g)] = matrix.zeros[at + g];
    const codec::Spread spread = scales_.spread(kernels_, count, group_, n, has_zeros_, false);
    const uint8_t* packed = matrix.codes + row * row_bytes_ + begin / 8 * element_.bits;
    if (element_.bits != 8 || n % codec::kBlock != 0) {
      kernels_.unpack(packed, n, element_.bits, codes_.data());
      packed = codes_.data();
    }
    kernels_.decode(packed, n, element_, spread, type, out);
  }

 private:
  const codec::Table& kernels_ = codec::table();
  const codec::Element element_;
  const bool has_zeros_;
  const int64_t row_bytes_, groups_, group_;
  const codec::Scale scale_;
  const int64_t scale_size_;
  const bool has_groups_;
  codec::Scales scales_;
  alignas(64) std::array<uint8_t, kRun> codes_;
};

// body(decoder, row, first column, columns, where they go in `dense`) for all runs, those of one call by one thread.
template <typename Body>
void for_runs(const CanonicalView& matrix, const MatrixView& dense, Executor& executor, const Body& body) {
  if (dense.rows == 0 || dense.cols == 0) return;
  const int64_t length = codec::run_length(matrix.format), runs = (dense.cols + length - 1) / length;
  const auto size = static_cast<int64_t>(dtype_bytes(dense.dtype));
  executor.parallel_for(dense.rows * runs, std::max<int64_t>(1, kGrain / std::min(length, dense.cols)),
                        [&](int64_t first, int64_t last) {
                          RunDecoder decode(matrix.format, dense.cols);
                          for (int64_t unit = first; unit < last; ++unit) {
                            const int64_t row = unit / runs, begin = unit % runs * length;
                            auto* to = static_cast<std::byte*>(dense.data) + (row * dense.row_stride + begin) * size;
                            body(decode, row, begin, std::min(length, dense.cols - begin), to);
                          }
                        });
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

void dequantize(const CanonicalView& matrix, const TensorView& out, Executor& executor) {
  check_canonical(matrix);
  const Source type = source_of(out.dtype, "out");
  for_runs(matrix, check_dense(out, "out", matrix), executor,
           [&](RunDecoder& decode, int64_t row, int64_t begin, int64_t n, void* to) {
             decode(matrix, row, begin, n, type, to);
           });
}

void codec::dequantize_sum(std::span<const CanonicalView> peers, int divisor, const TensorView& out,
                           Executor& executor) {
  check_peers(peers);
  const Source type = source_of(out.dtype, "out");
  const Table& kernels = table();
  for_runs(peers[0], check_dense(out, "out", peers[0]), executor,
           [&](RunDecoder& decode, int64_t row, int64_t begin, int64_t n, void* to) {
             alignas(64) std::array<float, kRun> sum, values;
             decode(peers[0], row, begin, n, Source::f32, sum.data());
             for (const CanonicalView& peer : peers.subspan(1)) {
               decode(peer, row, begin, n, Source::f32, values.data());
               kernels.add(values.data(), n, sum.data());
             }
             kernels.narrow(sum.data(), n, static_cast<float>(divisor), type, to);
           });
}

void dequantize_sum(std::span<const CanonicalView> peers, const TensorView& out, Executor& executor) {
  codec::dequantize_sum(peers, 1, out, executor);
}

}  // namespace ng
