// quantize: matrices cut into runs for the codec's kernels, checked here and nowhere below.
#include "narrowgauge/quantize.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "quantize/arguments.hpp"
#include "quantize/codec.hpp"
#include "quantize/run.hpp"
#include "quantize/stochastic.hpp"

namespace ng {
namespace {

using codec::check_canonical;
using codec::check_dense;
using codec::kBlock;
using codec::kRun;
using codec::run_length;
using codec::Scales;
using codec::Source;
using codec::source_of;

// Work handed to a thread at a time, in elements: enough to hide the hand-over.
constexpr int64_t kGrain = 65536;
// The scale search tries these multiples of absmax in 64ths. Above 1 nothing saturates and the group's largest element
// may land on a code; below 1 it saturates and all others get finer steps.
constexpr std::array<int, 20> kMultiples{64, 80, 76, 72, 70, 68, 66, 62, 60, 58,
                                         56, 54, 52, 50, 48, 46, 44, 40, 36, 32};

// --- quantize -------------------------------------------------------------------------------------------------

struct Range {
  float low = 0, high = 0;  // uintN
  float absmax = 0;
};

class Quantizer {
 public:
  Quantizer(const MatrixView& weights, Source type, const CanonicalView& out, const QuantizeOptions& options)
      : weights_(weights),
        type_(type),
        out_(out),
        options_(options),
        format_(out.format),
        element_(codec::element_of(format_.element, options.full_range)),
        has_zeros_(format_.element.has_zero_point()),
        row_bytes_(format_.row_bytes(weights.cols)),
        groups_(format_.groups(weights.cols)),
        scale_size_(static_cast<int64_t>(scale_bytes(format_.scale))),
        few_bits_(format_.scale != ScaleType::fp32 && !format_.has_global_scale()),
        run_(run_length(format_)),
        runs_((weights.cols + run_ - 1) / run_),
        group_(format_.group == 0 ? weights.cols : format_.group) {}

  void operator()(Executor& executor) {
    float global = 1;
    if (format_.has_global_scale()) {
      global = global_scale(executor);
      check_finite();
      *out_.global_scale = global;
    }
    rule_ = codec::scale_rule(format_, options_.e8m0_ceil, global);
    if (format_.group != 0) {
      executor.parallel_for(out_.rows * runs_, std::max<int64_t>(1, kGrain / std::min(run_, weights_.cols)),
                            [&](int64_t begin, int64_t end) {
                              for (int64_t unit = begin; unit < end; ++unit) group_run(unit / runs_, unit % runs_);
                            });
    } else if (out_.rows >= 4 * executor.threads() || runs_ < 4 || options_.search != ScaleSearch::absmax) {
      executor.parallel_for(out_.rows, std::max<int64_t>(1, kGrain / weights_.cols), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) whole_row(row);
      });
    } else {
      // Few long rows: all threads share each.
      for (int64_t row = 0; row < out_.rows; ++row) split_row(row, executor);
    }
    check_finite();
  }

 private:
  // The elements of a run as the kernels read them.
  struct Run {
    const void* data;
    Source type;
    int64_t n;
  };
  using Scratch = std::array<float, kRun>;

  int64_t run_begin(int64_t run) const { return run * run_; }
  int64_t run_size(int64_t run) const { return std::min(run_, weights_.cols - run * run_); }
  const std::byte* source(int64_t row, int64_t col) const {
    const auto bytes = static_cast<int64_t>(dtype_bytes(weights_.dtype));
    return static_cast<const std::byte*>(weights_.data) + (row * weights_.row_stride + col) * bytes;
  }

  static void to_floats(const void* data, Source type, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = type == Source::f32   ? static_cast<const float*>(data)[i]
               : type == Source::f16 ? to_float(static_cast<const f16*>(data)[i])
                                     : to_float(static_cast<const bf16*>(data)[i]);
    }
  }

  Run load(int64_t row, int64_t begin, int64_t n, Scratch& scratch) const {
    const void* data = source(row, begin);
    const bool saturate = options_.nan == NanPolicy::saturate;
    if (type_ == Source::f32 && !saturate) return {data, type_, n};
    // The kernels read 16-bit floats where speed counts; the rarer ways take floats.
    if (!saturate && options_.search == ScaleSearch::absmax && !options_.stochastic && !has_zeros_) {
      return {data, type_, n};
    }
    to_floats(data, type_, n, scratch.data());
    if (saturate) {
      for (float& x : std::span(scratch).first(static_cast<size_t>(n))) {
        constexpr float kMost = std::numeric_limits<float>::max();
        x = std::isnan(x) ? 0.0f : std::clamp(x, -kMost, kMost);
      }
    }
    return {scratch.data(), Source::f32, n};
  }

  // Remembers the first element of the run that is not finite.
  void report(int64_t row, int64_t begin, const Run& run) {
    Scratch values;
    to_floats(run.data, run.type, run.n, values.data());
    const auto* bad =
        std::find_if_not(values.begin(), values.begin() + run.n, [](float x) { return std::isfinite(x); });
    const int64_t index = row * weights_.cols + begin + (bad - values.begin());
    int64_t first = first_bad_.load();
    while (index < first && !first_bad_.compare_exchange_weak(first, index)) {
    }
  }

  void check_finite() const {
    const int64_t index = first_bad_.load();
    if (index == kNone) return;
    const int64_t row = index / weights_.cols, col = index % weights_.cols;
    float value = 0;
    to_floats(source(row, col), type_, 1, &value);
    throw InvalidArgument(codec::not_finite(row, col, index, value));
  }

  // The ranges of the groups of a run; that of a group with NaN or Inf is infinite.
  void ranges(int64_t row, int64_t begin, const Run& run, int64_t group, float* absmax, float* low, float* high) {
    const float most = table_.absmax(run.data, run.type, run.n, group, absmax);
    const auto* data = static_cast<const float*>(run.data);
    if (std::isfinite(most)) {
      if (has_zeros_) table_.range(data, run.n, group, low, high);
      return;
    }
    if (options_.nan == NanPolicy::error) report(row, begin, run);
    for (int64_t g = 0; g * group < run.n; ++g) {
      if (!std::isfinite(absmax[g])) {
        absmax[g] = kInfinity;
        if (has_zeros_) {
          low[g] = 0;
          high[g] = kInfinity;
        }
      } else if (has_zeros_) {
        table_.range(data + g * group, std::min(group, run.n - g * group), group, low + g, high + g);
      }
    }
  }

  // That of the run's finite elements.
  Range finite_range(int64_t row, int64_t run_index) {
    const int64_t begin = run_begin(run_index), n = run_size(run_index);
    Scratch values;
    to_floats(source(row, begin), type_, n, values.data());
    std::replace_if(values.begin(), values.begin() + n, [](float x) { return !std::isfinite(x); }, 0.0f);
    Range range;
    ranges(row, begin, {values.data(), Source::f32, n}, n, &range.absmax, &range.low, &range.high);
    return range;
  }

  // What the scale divides: hi - lo where there is a zero point, else the largest magnitude.
  double width(const Range& range) const {
    return has_zeros_ ? static_cast<double>(range.high) - static_cast<double>(range.low) : range.absmax;
  }

  int32_t zero_point(float low, float scale) const {
    if (scale == 0) return 0;
    return static_cast<int32_t>(std::nearbyint(std::min(-low / scale, static_cast<float>(element_.high))));
  }

  Range run_range(int64_t row, int64_t run_index) {
    Scratch scratch;
    const Run run = load(row, run_begin(run_index), run_size(run_index), scratch);
    Range range;
    ranges(row, run_begin(run_index), run, run.n, &range.absmax, &range.low, &range.high);
    return range;
  }

  static Range join(const Range& a, const Range& b) {
    return {std::min(a.low, b.low), std::max(a.high, b.high), std::max(a.absmax, b.absmax)};
  }

  // The range of the runs [0, count), found in parallel. The order of the joins does not matter.
  template <typename F>
  Range parallel_range(int64_t count, Executor& executor, const F& range_of) {
    std::atomic<float> low{0}, high{0}, absmax{0};
    const auto raise = [](std::atomic<float>& most, float value) {
      float seen = most.load();
      while (value > seen && !most.compare_exchange_weak(seen, value)) {
      }
    };
    executor.parallel_for(count, std::max<int64_t>(1, kGrain / std::min(run_, weights_.cols)),
                          [&](int64_t begin, int64_t end) {
                            Range range;
                            for (int64_t i = begin; i < end; ++i) range = join(range, range_of(i));
                            raise(low, -range.low);
                            raise(high, range.high);
                            raise(absmax, range.absmax);
                          });
    return {-low.load(), high.load(), absmax.load()};
  }

  float global_scale(Executor& executor) {
    const Range range = parallel_range(out_.rows * runs_, executor, [this](int64_t unit) {
      const Range all = run_range(unit / runs_, unit % runs_);
      return all.absmax == kInfinity ? finite_range(unit / runs_, unit % runs_) : all;
    });
    return static_cast<float>(width(range) / (static_cast<double>(element_max(format_.element)) * 448.0));
  }

  void store_scales(int64_t row, int64_t first, int64_t count, const Scales& scales) const {
    const int64_t at = row * groups_ + first;
    std::memcpy(static_cast<std::byte*>(out_.scales) + at * scale_size_, scales.stored.data(),
                static_cast<size_t>(count * scale_size_));
    if (!has_zeros_) return;
    for (int64_t g = 0; g < count; ++g) out_.zeros[at + g] = static_cast<uint8_t>(scales.zero[static_cast<size_t>(g)]);
  }

  // The scales tried by a search, the plain one first, without repetitions; error[i] is the squared error of each.
  struct Candidates {
    size_t count = 0;
    std::array<double, kMultiples.size()> width{};
    std::array<float, kMultiples.size()> scale{};
    std::array<int32_t, kMultiples.size()> zero{};
    std::array<double, kMultiples.size()> error{};
  };

  Candidates candidates(const Range& range) const {
    std::array<double, kMultiples.size()> widths;
    std::array<float, kMultiples.size()> scale, inverse, inverse_low;
    std::array<std::byte, 4 * kMultiples.size()> stored;
    for (size_t i = 0; i < widths.size(); ++i) widths[i] = width(range) * kMultiples[i] / 64;
    table_.scales(widths.data(), widths.size(), rule_, stored.data(),
                  {scale.data(), inverse.data(), inverse_low.data()});
    Candidates all;
    for (size_t i = 0; i < widths.size(); ++i) {
      if (i != 0 && scale[i] == 0) continue;
      const auto known = all.scale.begin() + static_cast<std::ptrdiff_t>(all.count);
      if (std::find(all.scale.begin(), known, scale[i]) != known) continue;
      all.width[all.count] = widths[i];
      all.scale[all.count] = scale[i];
      all.zero[all.count] = has_zeros_ ? zero_point(range.low, scale[i]) : 0;
      ++all.count;
    }
    return all;
  }

  void add_errors(const float* data, int64_t n, Candidates& tried) const {
    std::array<double, kMultiples.size()> error;
    table_.errors(data, n, element_, static_cast<int64_t>(tried.count), tried.scale.data(), tried.zero.data(),
                  error.data());
    for (size_t i = 0; i < tried.count; ++i) tried.error[i] += error[i];
  }

  // The width whose scale had the least error; the first of equals.
  static double best_width(const Candidates& tried) {
    const auto* end = tried.error.begin() + tried.count;
    return tried.width[static_cast<size_t>(std::min_element(tried.error.begin(), end) - tried.error.begin())];
  }

  // Scales and zero points of `count` groups from what they divide and the groups' lowest elements.
  void make_scales(const double* widths, const float* low, int64_t count, Scales& scales) const {
    const bool inside = table_.scales(widths, count, rule_, scales.stored.data(), scales.arrays());
    scales.division = !inside     ? codec::Division::plain
                      : few_bits_ ? codec::Division::few_bits
                                  : codec::Division::corrected;
    for (size_t g = 0; has_zeros_ && g < static_cast<size_t>(count); ++g) {
      scales.zero[g] = zero_point(low[g], scales.scale[g]);
    }
  }

  codec::Spread spread(int64_t count, int64_t group, int64_t n, Scales& scales) const {
    return scales.spread(table_, count, group, n, has_zeros_, true);
  }

  // Codes of a run whose scales are known, those of groups of `group` elements, spread.
  void encode(int64_t row, int64_t begin, const Run& run, int64_t group, const Scales& scales,
              const codec::Spread& spread, const void* next) const {
    alignas(64) std::array<uint8_t, kRun> unpacked;
    uint8_t* const packed = out_.codes + row * row_bytes_ + begin / 8 * element_.bits;
    const bool in_place = element_.bits == 8 && run.n % kBlock == 0;
    uint8_t* const codes = in_place ? packed : unpacked.data();
    if (options_.stochastic) {
      std::fill_n(codes, (run.n + kBlock - 1) / kBlock * kBlock, uint8_t{0});
      encode_stochastic(static_cast<const float*>(run.data), run.n, options_.first_index + row * weights_.cols + begin,
                        options_.seed, element_, spread, codes);
    } else {
      table_.encode(run.data, run.type, run.n, element_, spread, codes, next);
    }
    for (int64_t g = 0; g * group < run.n; ++g) {
      if (scales.inverse[static_cast<size_t>(g)] != 0) continue;
      std::fill(codes + g * group, codes + std::min((g + 1) * group, run.n), uint8_t{0});
    }
    if (!in_place) table_.pack(codes, run.n, element_.bits, packed);
  }

  void group_run(int64_t row, int64_t run_index) {
    Scratch scratch;
    Scales scales;
    const int64_t begin = run_begin(run_index);
    const Run run = load(row, begin, run_size(run_index), scratch);
    const int64_t count = (run.n + group_ - 1) / group_;
    std::array<float, Scales::kMost> absmax, low, high;
    ranges(row, begin, run, group_, absmax.data(), low.data(), high.data());
    std::array<double, Scales::kMost> widths;
    for (size_t g = 0; g < static_cast<size_t>(count); ++g) {
      widths[g] = has_zeros_ ? static_cast<double>(high[g]) - static_cast<double>(low[g]) : absmax[g];
    }
    if (options_.search == ScaleSearch::mse) {
      const auto* data = static_cast<const float*>(run.data);
      for (int64_t g = 0; g < count; ++g) {
        const auto i = static_cast<size_t>(g);
        if (absmax[i] == kInfinity) continue;
        Candidates tried = candidates(has_zeros_ ? Range{low[i], high[i], absmax[i]} : Range{0, 0, absmax[i]});
        add_errors(data + g * group_, std::min(group_, run.n - g * group_), tried);
        widths[i] = best_width(tried);
      }
    }
    make_scales(widths.data(), low.data(), count, scales);
    store_scales(row, begin / group_, count, scales);
    encode(row, begin, run, group_, scales, spread(count, group_, run.n, scales), source(row, begin + run.n));
  }

  codec::Spread set_row_scale(int64_t row, const Range& range, Scales& scales) {
    double widest = width(range);
    if (options_.search == ScaleSearch::mse && range.absmax != kInfinity) {
      Candidates tried = candidates(range);
      Scratch scratch;
      for (int64_t i = 0; i < runs_; ++i) {
        const Run run = load(row, run_begin(i), run_size(i), scratch);
        add_errors(static_cast<const float*>(run.data), run.n, tried);
      }
      widest = best_width(tried);
    }
    make_scales(&widest, &range.low, 1, scales);
    store_scales(row, 0, 1, scales);
    return spread(1, kRun, kRun, scales);
  }

  void encode_row_run(int64_t row, int64_t run_index, const Scales& scales, const codec::Spread& spread,
                      const void* next) const {
    Scratch scratch;
    const Run run = load(row, run_begin(run_index), run_size(run_index), scratch);
    encode(row, run_begin(run_index), run, run.n, scales, spread, next);
  }

  void whole_row(int64_t row) {
    Range range;
    for (int64_t run = 0; run < runs_; ++run) range = join(range, run_range(row, run));
    Scales scales;
    const codec::Spread spread = set_row_scale(row, range, scales);
    for (int64_t run = 0; run < runs_; ++run) {
      encode_row_run(row, run, scales, spread, source(row + 1, run_begin(run)));
    }
  }

  void split_row(int64_t row, Executor& executor) {
    Scales scales;
    const Range range = parallel_range(runs_, executor, [&](int64_t run) { return run_range(row, run); });
    const codec::Spread spread = set_row_scale(row, range, scales);
    executor.parallel_for(runs_, kGrain / kRun, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) encode_row_run(row, run, scales, spread, nullptr);
    });
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  const codec::Table& table_ = codec::table();
  MatrixView weights_;
  Source type_;
  CanonicalView out_;
  QuantizeOptions options_;
  Format format_;
  codec::Element element_;
  codec::ScaleRule rule_{};
  bool has_zeros_;
  int64_t row_bytes_;
  int64_t groups_;
  int64_t scale_size_;
  bool few_bits_;
  int64_t run_;
  int64_t runs_;   // of a row
  int64_t group_;  // elements of a group
  std::atomic<int64_t> first_bad_{kNone};
};

// --- sections of a QTensor ------------------------------------------------------------------------------------

constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

CanonicalView sections(const Format& format, int64_t rows, int64_t cols, std::byte* storage) {
  const CanonicalBytes bytes = canonical_bytes(format, rows, cols);
  auto* at = reinterpret_cast<uint8_t*>(storage);
  const auto next = [&](int64_t size) {
    uint8_t* section = size == 0 ? nullptr : at;
    at += padded(size);
    return section;
  };
  CanonicalView view{format, rows, cols};
  view.codes = next(bytes.codes);
  view.scales = next(bytes.scales);
  view.zeros = next(bytes.zeros);
  view.global_scale = reinterpret_cast<float*>(next(bytes.global_scale));
  return view;
}

Buffer section_storage(const CanonicalBytes& bytes) {
  return Buffer(static_cast<size_t>(padded(bytes.codes) + padded(bytes.scales) + padded(bytes.zeros) +
                                    padded(bytes.global_scale)));
}

}  // namespace

const codec::Table& codec::table() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::amx:
    case Isa::avx512: return kAvx512;
    case Isa::avx2: return kAvx2;
    case Isa::portable: break;
  }
#endif
  return kPortable;
}

// --- public ---------------------------------------------------------------------------------------------------

CanonicalBytes canonical_bytes(const Format& format, int64_t rows, int64_t cols) {
  codec::check_format(format);
  NG_CHECK(rows >= 0 && cols >= 0, InvalidArgument, "a matrix of ", rows, " x ", cols, " elements; expected >= 0");
  CanonicalBytes bytes;
  int64_t groups = 0;
  bool overflow = __builtin_mul_overflow(rows, format.row_bytes(cols), &bytes.codes);
  overflow |= __builtin_mul_overflow(rows, format.groups(cols), &groups);
  overflow |= __builtin_mul_overflow(groups, static_cast<int64_t>(scale_bytes(format.scale)), &bytes.scales);
  if (format.element.has_zero_point()) bytes.zeros = groups;
  if (format.has_global_scale()) bytes.global_scale = sizeof(float);
  // Half of the range leaves room for any sum and padding.
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 8;
  NG_CHECK(!overflow && bytes.codes <= kMost && bytes.scales <= kMost, InvalidArgument, "a matrix of ", rows, " x ",
           cols, " elements in ", format.str(), " has more bytes than can be counted");
  return bytes;
}

void quantize(const TensorView& weights, const CanonicalView& out, const QuantizeOptions& options, Executor& executor) {
  check_canonical(out);
  const Source type = source_of(weights.dtype, "weights");
  const MatrixView matrix = check_dense(weights, "weights", out);
  if (matrix.rows == 0 || matrix.cols == 0) {
    if (out.global_scale != nullptr) *out.global_scale = 0;
    return;
  }
  Quantizer(matrix, type, out, options)(executor);
}

QTensor QTensor::quantize(const TensorView& weights, const Format& format, const QuantizeOptions& options,
                          Executor& executor) {
  const MatrixView matrix = as_matrix(weights, "weights");
  QTensor tensor;
  tensor.format_ = format;
  tensor.shape_.assign(weights.shape.begin(), weights.shape.begin() + weights.ndim);
  tensor.rows_ = matrix.rows;
  tensor.cols_ = matrix.cols;
  tensor.storage_ = section_storage(canonical_bytes(format, matrix.rows, matrix.cols));
  ng::quantize(weights, tensor.canonical_view(), options, executor);
  return tensor;
}

QTensor QTensor::copy_of(const CanonicalView& matrix, std::vector<int64_t> shape) {
  check_canonical(matrix);
  NG_CHECK(!shape.empty(), InvalidArgument, "a QTensor needs at least one axis");
  int64_t rows = 1;
  bool fits = true;
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) {
    fits = fits && shape[axis] >= 0 && !__builtin_mul_overflow(rows, shape[axis], &rows);
  }
  NG_CHECK(fits && rows == matrix.rows && shape.back() == matrix.cols, InvalidArgument, "a shape of ", rows, " x ",
           shape.back(), " elements for a matrix of ", matrix.rows, " x ", matrix.cols);
  QTensor tensor;
  tensor.format_ = matrix.format;
  tensor.shape_ = std::move(shape);
  tensor.rows_ = matrix.rows;
  tensor.cols_ = matrix.cols;
  const CanonicalBytes bytes = canonical_bytes(matrix.format, matrix.rows, matrix.cols);
  tensor.storage_ = section_storage(bytes);
  const CanonicalView view = tensor.canonical_view();
  const auto copy = [](void* to, const void* from, int64_t size) {
    if (size != 0) std::memcpy(to, from, static_cast<size_t>(size));
  };
  copy(view.codes, matrix.codes, bytes.codes);
  copy(view.scales, matrix.scales, bytes.scales);
  copy(view.zeros, matrix.zeros, bytes.zeros);
  copy(view.global_scale, matrix.global_scale, bytes.global_scale);
  return tensor;
}

int64_t QTensor::nbytes() const { return canonical_bytes(format_, rows_, cols_).total(); }

CanonicalView QTensor::canonical_view() const {
  NG_CHECK(!packed_, InvalidArgument, "the matrix is packed; unpack it first");
  return sections(format_, rows_, cols_, const_cast<std::byte*>(storage_.data()));
}

PackedView QTensor::packed_view() const {
  NG_CHECK(packed_, InvalidArgument, "the matrix is not packed; pack it first");
  return {format_, rows_, cols_, reinterpret_cast<const uint8_t*>(storage_.data())};
}

QTensor pack(QTensor&& tensor, Executor& executor) {
  // The argument is taken last: what throws before leaves it as it was.
  if (tensor.packed_) return std::move(tensor);
  Buffer block(static_cast<size_t>(packed_bytes(tensor.format_, tensor.rows_, tensor.cols_)));
  pack(tensor.canonical_view(), reinterpret_cast<uint8_t*>(block.data()), executor);
  QTensor result(std::move(tensor));
  result.storage_ = std::move(block);
  result.packed_ = true;
  return result;
}

QTensor unpack(QTensor&& tensor, Executor& executor) {
  if (!tensor.packed_) return std::move(tensor);
  Buffer storage = section_storage(canonical_bytes(tensor.format_, tensor.rows_, tensor.cols_));
  unpack(tensor.packed_view(), sections(tensor.format_, tensor.rows_, tensor.cols_, storage.data()), executor);
  QTensor result(std::move(tensor));
  result.storage_ = std::move(storage);
  result.packed_ = false;
  return result;
}

}  // namespace ng
