// quantize, dequantize and dequantize_sum on a device against the CPU's, every byte; on the simulated device or a real
// one. CPU codes have tests of their own (codec_test.cpp), so they are the specification here.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_memory.hpp"
#include "narrowgauge/device.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"

namespace ng {
namespace {

constexpr std::byte kCanary{0xcd};

std::vector<Element> all_elements() {
  std::vector<Element> all;
  for (uint8_t bits = 3; bits <= 8; ++bits) {
    for (uint8_t exponent = 1; exponent < bits; ++exponent) {
      all.push_back({ElementKind::fp, bits, exponent, static_cast<uint8_t>(bits - 1 - exponent)});
    }
  }
  for (uint8_t bits = 2; bits <= 8; ++bits) {
    all.push_back({ElementKind::signed_int, bits});
    all.push_back({ElementKind::unsigned_int, bits});
  }
  all.push_back({ElementKind::nf4, 4});
  return all;
}

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// Floats in rows of one kind each: weights, tiny and subnormal and huge ones, zeros of both signs, all mixed.
struct Floats {
  DType dtype;
  int64_t rows, cols, stride;
  std::vector<std::byte> bytes;

  Floats(DType type, int64_t row_count, int64_t col_count, int64_t row_stride, uint32_t seed)
      : dtype(type), rows(row_count), cols(col_count), stride(row_stride) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    bytes.resize(static_cast<size_t>(rows * stride) * dtype_bytes(dtype));
    for (int64_t i = 0; i < rows * stride; ++i) {
      constexpr float kSizes[] = {0.02f, 1e-5f, 1e-41f, 4e37f, 0.0f, 300.0f, 1e-3f};
      const auto row = static_cast<uint32_t>(i / stride) + seed;
      float size = kSizes[row % 7];
      if (row % 7 == 6) size = std::ldexp(1.0f, static_cast<int>(engine() % 60) - 40);
      if (row % 7 == 4 && engine() % 64 == 0) size = 1e-39f;
      set(i, std::copysign(std::min(std::fabs(normal(engine) * size), most()), engine() % 2 != 0 ? 1.0f : -1.0f));
    }
  }
  float most() const { return dtype == DType::f16 ? 65504.0f : 0x1.fep127f; }
  void set(int64_t index, float value) {
    std::byte* at = bytes.data() + static_cast<size_t>(index) * dtype_bytes(dtype);
    const uint16_t half = dtype == DType::f16 ? to_f16(value).bits : to_bf16(value).bits;
    dtype == DType::f32 ? std::memcpy(at, &value, 4) : std::memcpy(at, &half, 2);
  }
  TensorView view(void* data) const {
    TensorView all(data, dtype, {rows, cols});
    all.strides[0] = stride;
    return all;
  }
  TensorView view() { return view(bytes.data()); }
};

bool is_nan(const std::byte* at, DType dtype) {
  float value = 0;
  uint16_t half = 0;
  std::memcpy(&half, at, 2);
  if (dtype == DType::f32) std::memcpy(&value, at, 4);
  if (dtype == DType::f16) value = to_float(f16{half});
  if (dtype == DType::bf16) value = to_float(bf16{half});
  return std::isnan(value);
}

// Where two arrays of floats differ first, NaNs being equal; their size if nowhere.
size_t difference(const std::vector<std::byte>& a, const std::vector<std::byte>& b, DType dtype) {
  const size_t size = dtype_bytes(dtype);
  for (size_t i = 0; i + size <= a.size(); i += size) {
    if (std::memcmp(&a[i], &b[i], size) != 0 && !(is_nan(&a[i], dtype) && is_nan(&b[i], dtype))) return i / size;
  }
  return a.size() / size;
}

// A canonical matrix on the device, surrounded by bytes that nothing may touch.
class OnDevice {
 public:
  // A distance between the arrays that leaves them as unaligned as `skew`, in elements of theirs.
  OnDevice(const Format& format, int64_t rows, int64_t cols, std::byte*& memory, int64_t skew = 0)
      : sizes_(canonical_bytes(format, rows, cols)), begin_(memory) {
    view_.format = format;
    view_.rows = rows;
    view_.cols = cols;
    const auto take = [&](int64_t bytes, size_t element) {
      std::byte* at = memory + 64 + static_cast<size_t>(skew) * element;
      memory = at + (bytes + 127) / 64 * 64 - reinterpret_cast<uintptr_t>(at) % 64;
      return at;
    };
    view_.codes = reinterpret_cast<uint8_t*>(take(sizes_.codes, 1));
    view_.scales = take(sizes_.scales, scale_bytes(format.scale));
    if (sizes_.zeros != 0) view_.zeros = reinterpret_cast<uint8_t*>(take(sizes_.zeros, 1));
    if (sizes_.global_scale != 0) view_.global_scale = reinterpret_cast<float*>(take(sizes_.global_scale, 4));
    end_ = memory + 64;
    memory = end_;
  }
  const CanonicalView& view() const { return view_; }

  void clear(const Stream& stream) const {
    CudaMemory::fill(begin_, static_cast<unsigned char>(kCanary), static_cast<size_t>(end_ - begin_), stream);
  }
  void upload(const CanonicalView& from, const Stream& stream) const {
    each(
        [&](const void* host, const void* device, int64_t bytes) {
          CudaMemory::upload(const_cast<std::byte*>(static_cast<const std::byte*>(device)),
                             {static_cast<const std::byte*>(host), static_cast<size_t>(bytes)}, stream);
        },
        from);
  }
  // Empty if all arrays equal those of `expected` and nothing else was written.
  std::string compare(const CanonicalView& expected, const Stream& stream) const {
    std::vector<std::byte> all = CudaMemory::download(begin_, static_cast<size_t>(end_ - begin_), stream);
    stream.synchronize();
    std::string text;
    const char* names[] = {"codes", "scales", "zeros", "global_scale"};
    int name = 0;
    each(
        [&](const void* host, const void* device, int64_t bytes) {
          auto* seen = all.data() + (static_cast<const std::byte*>(device) - begin_);
          for (int64_t i = 0; i < bytes; ++i) {
            if (seen[i] != static_cast<const std::byte*>(host)[i] && text.empty()) {
              text = std::string(names[name]) + " differ at byte " + std::to_string(i) + ": " +
                     std::to_string(static_cast<int>(seen[i])) + " is not " +
                     std::to_string(static_cast<int>(static_cast<const std::byte*>(host)[i]));
            }
            seen[i] = kCanary;
          }
          ++name;
        },
        expected);
    for (size_t i = 0; i < all.size() && text.empty(); ++i) {
      if (all[i] != kCanary) text = "byte " + std::to_string(i) + " beside the arrays was written";
    }
    return text;
  }

 private:
  template <typename F>
  void each(const F& f, const CanonicalView& host) const {
    f(host.codes, view_.codes, sizes_.codes);
    f(host.scales, view_.scales, sizes_.scales);
    f(host.zeros, view_.zeros, sizes_.zeros);
    f(host.global_scale, view_.global_scale, sizes_.global_scale);
  }

  CanonicalView view_;
  CanonicalBytes sizes_;
  std::byte* begin_;
  std::byte* end_;
};

class CudaQuantizeTest : public CudaKernelTest {
 protected:
  std::byte* put(const std::vector<std::byte>& bytes, size_t skew = 0) {
    std::byte* at = next_ + 64 + skew;
    CudaMemory::upload(at, bytes, *stream_);
    next_ += (bytes.size() + skew + 191) / 64 * 64;
    return at;
  }

  // Quantizes on both sides. Empty if they agree.
  std::string quantized(Floats& weights, const Format& format, const QuantizeOptions& options = {}, int64_t skew = 0) {
    next_ = memory_->data();
    const QTensor expected = QTensor::quantize(weights.view(), format, options);
    std::byte* device = put(weights.bytes, static_cast<size_t>(skew) * dtype_bytes(weights.dtype));
    const OnDevice out(format, weights.rows, weights.cols, next_, skew);
    out.clear(*stream_);
    quantize(weights.view(device), out.view(), options, *stream_);
    const std::string text = out.compare(expected.canonical_view(), *stream_);
    return text.empty() ? text
                        : format.str() + " of " + std::string(dtype_name(weights.dtype)) + ' ' +
                              std::to_string(weights.rows) + 'x' + std::to_string(weights.cols) + ": " + text;
  }

  // The same for values, of `peers` matrices, summed if there are several.
  std::string dequantized(const std::vector<CanonicalView>& peers, DType dtype, int64_t stride, int64_t skew = 0) {
    next_ = memory_->data();
    const Format& format = peers[0].format;
    const int64_t rows = peers[0].rows, cols = peers[0].cols;
    std::vector<CanonicalView> there;
    for (const CanonicalView& peer : peers) {
      const OnDevice device(format, rows, cols, next_, skew);
      device.upload(peer, *stream_);
      there.push_back(device.view());
    }
    std::vector<std::byte> expected(static_cast<size_t>(rows * stride) * dtype_bytes(dtype), kCanary);
    std::byte* out = put(expected, static_cast<size_t>(skew) * dtype_bytes(dtype));
    TensorView here(expected.data(), dtype, {rows, cols}), device(out, dtype, {rows, cols});
    here.strides[0] = device.strides[0] = stride;
    if (peers.size() == 1) {
      dequantize(peers[0], here, default_executor());
      dequantize(there[0], device, *stream_);
    } else {
      dequantize_sum(peers, here, default_executor());
      dequantize_sum(there, device, *stream_);
    }
    const std::vector<std::byte> seen = CudaMemory::download(out, expected.size(), *stream_);
    stream_->synchronize();
    const size_t at = difference(seen, expected, dtype);
    if (at == seen.size() / dtype_bytes(dtype)) return "";
    return format.str() + " to " + std::string(dtype_name(dtype)) + ' ' + std::to_string(rows) + 'x' +
           std::to_string(cols) + ": element " + std::to_string(at) + " differs";
  }

  // Quantizes, dequantizes, and compares all bytes.
  void expect_equal(const Format& format, DType dtype, int64_t rows, int64_t cols, uint32_t seed,
                    const QuantizeOptions& options = {}) {
    // Every other matrix has aligned rows.
    const int64_t skew = seed / 7 % 2 == 0 ? 0 : 1, stride = skew == 0 ? (cols + 15) / 16 * 16 : cols + seed % 5;
    Floats weights(dtype, rows, cols, stride, seed);
    EXPECT_EQ(quantized(weights, format, options, skew), "");
    const QTensor q = QTensor::quantize(weights.view(), format, options);
    EXPECT_EQ(dequantized({q.canonical_view()}, kTypes[seed % 3], stride, skew), "");
  }

  // One of so many parts of all cases.
  void sweep(uint32_t part, uint32_t parts) {
    constexpr std::pair<int64_t, int64_t> kShapes[] = {{16, 64}, {3, 257}, {7, 1041}, {2, 4048}, {9, 31}, {1, 2048}};
    constexpr int32_t kGroups[] = {0, 16, 48, 128, 32, 1024, 64, 528};
    uint32_t seed = 0;
    for (const Element& element : all_elements()) {
      for (int scale = 0; scale < 5; ++scale) {
        for (const int32_t group : kGroups) {
          for (const DType dtype : kTypes) {
            for (const auto& [rows, cols] : kShapes) {
              ++seed;
              if (seed % parts != part) continue;
              const Format format{element, group, static_cast<ScaleType>(scale)};
              expect_equal(format, dtype, rows, cols, seed, {.full_range = seed % 2 == 0, .e8m0_ceil = seed % 4 < 2});
              if (HasFailure()) return;
            }
          }
        }
      }
    }
  }
};

// Of the 144 cases of each element and scale every 143rd, which goes through them all.
TEST_F(CudaQuantizeTest, EveryElementAndScaleEqualsTheCpu) { sweep(0, 143); }

// Hours on the simulated device; NARROWGAUGE_SWEEP=7/47 takes part 7 of 0 to 46.
TEST_F(CudaQuantizeTest, DISABLED_EverythingEqualsTheCpu) {
  uint32_t part = 0, parts = 1;
  if (const char* text = std::getenv("NARROWGAUGE_SWEEP")) {
    ASSERT_EQ(std::sscanf(text, "%u/%u", &part, &parts), 2) << text;
    ASSERT_LT(part, parts);
  }
  sweep(part, parts);
}

TEST_F(CudaQuantizeTest, EveryCodeHasTheCpusValue) {
  // Each row counts through the codes, with another scale; NaN and infinite ones and their signs too.
  constexpr float kScales[] = {1.0f, 0.37f, 0x1p-140f, 3e38f, NAN, -2.0f, INFINITY, 1e-3f};
  constexpr int64_t kRows = 8, kCols = 256 + 3;
  uint32_t seed = 0;
  for (const Element& e : all_elements()) {
    const Format format{e, seed % 2 == 0 ? 16 : 0, static_cast<ScaleType>(seed % 5)};
    const CanonicalBytes sizes = canonical_bytes(format, kRows, kCols);
    std::vector<uint8_t> codes(static_cast<size_t>(sizes.codes)), zeros(static_cast<size_t>(sizes.zeros));
    std::vector<std::byte> scales(static_cast<size_t>(sizes.scales));
    float global = 0.7f;
    const size_t size = scale_bytes(format.scale), groups = static_cast<size_t>(format.groups(kCols));
    for (size_t row = 0; row < kRows; ++row) {
      for (int64_t bit = 0; bit < kCols * e.bits; ++bit) {
        if ((bit / e.bits % e.codes() >> bit % e.bits & 1) == 0) continue;
        codes[row * static_cast<size_t>(format.row_bytes(kCols)) + static_cast<size_t>(bit / 8)] |=
            static_cast<uint8_t>(1 << bit % 8);
      }
      for (size_t g = 0; g < groups; ++g) {
        const uint32_t bits = scale_encode(format.scale, kScales[(row + g) % 8]);
        std::memcpy(&scales[(row * groups + g) * size], &bits, size);
        if (!zeros.empty())
          zeros[row * groups + g] = static_cast<uint8_t>((row * 37 + g) % static_cast<size_t>(e.codes()));
      }
    }
    const CanonicalView matrix{format,
                               kRows,
                               kCols,
                               codes.data(),
                               scales.data(),
                               zeros.empty() ? nullptr : zeros.data(),
                               format.has_global_scale() ? &global : nullptr};
    EXPECT_EQ(dequantized({matrix}, kTypes[seed % 3], kCols, seed / 2 % 2), "");
    ++seed;
  }
}

TEST_F(CudaQuantizeTest, EveryStochasticCodeEqualsTheCpus) {
  uint32_t seed = 0;
  for (const Element& e : all_elements()) {
    ++seed;
    // The second element of a row starts anywhere among the four that share random numbers.
    Floats weights(kTypes[seed % 3], 7, 65 + seed % 4, 80, seed);
    const Format format{e, seed % 2 == 0 ? 32 : 0, static_cast<ScaleType>(seed % 5)};
    EXPECT_EQ(quantized(weights, format, {.stochastic = true, .seed = 0x123456789abcdefULL * seed}), "");
  }
}

TEST_F(CudaQuantizeTest, SumsOfPeersEqualTheCpus) {
  for (const auto& [text, count] : {std::pair<const char*, int>{"int8:g64:bf16", 2},
                                    {"fp6", 5},
                                    {"uint4:g32:e4m3", 3},
                                    {"nf4:row:fp32", 4},
                                    {"mxfp4", 64}}) {
    const Format format = Format::parse(text);
    for (const DType dtype : kTypes) {
      std::vector<QTensor> matrices;
      std::vector<CanonicalView> peers;
      for (int p = 0; p < count; ++p) {
        Floats weights(DType::f32, 3, 200, 200, static_cast<uint32_t>(7 * p));
        matrices.push_back(QTensor::quantize(weights.view(), format));
        peers.push_back(matrices.back().canonical_view());
      }
      EXPECT_EQ(dequantized(peers, dtype, 208), "") << count;
    }
  }
}

TEST_F(CudaQuantizeTest, EmptyMatrices) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 16}, {16, 0}, {0, 0}}) {
    for (const char* text : {"int8", "fp6", "nvfp4", "uint4:g32"}) {
      Floats weights(DType::bf16, rows, cols, cols, 1);
      EXPECT_EQ(quantized(weights, Format::parse(text)), "");
      const QTensor q = QTensor::quantize(weights.view(), Format::parse(text));
      EXPECT_EQ(dequantized({q.canonical_view()}, DType::f16, cols), "");
    }
  }
}

TEST_F(CudaQuantizeTest, WhatIsNotFiniteIsRaisedOnceByTheNextWait) {
  for (const char* text : {"int8", "fp6", "uint4:g32", "nvfp4", "fp8_e4m3:row:bf16", "uint8:g16:e4m3"}) {
    const Format format = Format::parse(text);
    for (const DType dtype : kTypes) {
      Floats weights(dtype, 4, 1500, 1500, 7);
      weights.set(1500 + 1421, -INFINITY);
      weights.set(4500, NAN);
      std::string expected;
      try {
        QTensor::quantize(weights.view(), format);
      } catch (const InvalidArgument& error) {
        expected = error.what();
      }
      EXPECT_NE(expected.find("weights[1, 1421] (element 2921) is -inf"), std::string::npos) << expected;
      next_ = memory_->data();
      const std::byte* device = put(weights.bytes);
      const OnDevice out(format, 4, 1500, next_);
      quantize(weights.view(const_cast<std::byte*>(device)), out.view(), {}, *stream_);
      try {
        stream_->synchronize();
        ADD_FAILURE() << text;
      } catch (const InvalidArgument& error) {
        EXPECT_EQ(error.what(), expected);
      }
      EXPECT_NO_THROW(stream_->synchronize());
      EXPECT_EQ(quantized(weights, format, {.nan = NanPolicy::saturate}), "");
    }
  }
}

TEST_F(CudaQuantizeTest, GroupsWithNanOrInfinityAreKeptAsNan) {
  std::vector<Format> formats;
  for (const ScaleType scale : {ScaleType::fp32, ScaleType::fp16, ScaleType::bf16, ScaleType::e8m0, ScaleType::e4m3}) {
    formats.push_back({Format::parse("fp6_e2m3").element, 128, scale});
    formats.push_back({Format::parse("uint4").element, 0, scale});
  }
  for (const char* text : {"int8:g16:bf16", "int8:row:fp32", "nf4:g64:fp16", "fp8_e4m3:g48:fp16", "uint3:g32:e4m3"}) {
    formats.push_back(Format::parse(text));
  }
  for (size_t i = 0; i < formats.size(); ++i) {
    const int64_t cols = formats[i].group == 0 ? 1100 : 300;  // several tiles where they share a scale
    Floats weights(kTypes[i % 3], 4, cols, cols, 7);
    weights.set(1, NAN);
    weights.set(cols + cols - 1, -INFINITY);
    weights.set(3 * cols + 100, INFINITY);
    weights.set(3 * cols + 101, NAN);
    const QuantizeOptions keep{.nan = NanPolicy::keep, .stochastic = i % 4 == 0, .seed = 3};
    EXPECT_EQ(quantized(weights, formats[i], keep), "");
    const QTensor q = QTensor::quantize(weights.view(), formats[i], keep);
    EXPECT_EQ(dequantized({q.canonical_view()}, kTypes[(i + 1) % 3], cols), "");
    if (i % 4 == 1) {
      EXPECT_EQ(dequantized({q.canonical_view(), q.canonical_view()}, kTypes[i % 3], cols), "");
    }
  }
}

TEST_F(CudaQuantizeTest, ReplaysInAGraph) {
  const Format format = Format::parse("nvfp4");
  Floats weights(DType::f16, 5, 300, 300, 8);
  EXPECT_EQ(quantized(weights, format), "");  // loads the kernels
  next_ = memory_->data();
  std::byte* device = put(weights.bytes);
  const OnDevice out(format, 5, 300, next_);
  out.clear(*stream_);
  const auto& driver = *cuda::driver();
  const auto handle = reinterpret_cast<cuda::StreamHandle>(stream_->handle());
  cuda::Graph graph = nullptr;
  cuda::GraphExec replay = nullptr;
  ASSERT_EQ(driver.cuStreamBeginCapture_v2(handle, cuda::CaptureMode::global), cuda::Result::success);
  quantize(weights.view(device), out.view(), {}, *stream_);
  ASSERT_EQ(driver.cuStreamEndCapture(handle, &graph), cuda::Result::success);
  ASSERT_EQ(driver.cuGraphInstantiateWithFlags(&replay, graph, 0), cuda::Result::success);
  ASSERT_EQ(driver.cuGraphLaunch(replay, handle), cuda::Result::success);
  EXPECT_EQ(out.compare(QTensor::quantize(weights.view(), format).canonical_view(), *stream_), "");
  weights.set(299, INFINITY);
  CudaMemory::upload(device, weights.bytes, *stream_);
  ASSERT_EQ(driver.cuGraphLaunch(replay, handle), cuda::Result::success);
  EXPECT_THROW(stream_->synchronize(), InvalidArgument);
  driver.cuGraphExecDestroy(replay);
  driver.cuGraphDestroy(graph);
}

// The comparisons notice a single bit.
TEST_F(CudaQuantizeTest, FaultsAreNoticed) {
  const Format format = Format::parse("uint4:g32:e4m3");
  Floats weights(DType::f32, 3, 77, 77, 14);
  QTensor q = QTensor::quantize(weights.view(), format);
  const CanonicalView matrix = q.canonical_view();
  const OnDevice out(format, 3, 77, next_);
  out.clear(*stream_);
  out.upload(matrix, *stream_);
  EXPECT_EQ(out.compare(matrix, *stream_), "");
  const CanonicalBytes sizes = canonical_bytes(format, 3, 77);
  for (uint8_t* byte : {matrix.codes + sizes.codes - 1, matrix.codes, static_cast<uint8_t*>(matrix.scales) + 4,
                        matrix.zeros + 8, reinterpret_cast<uint8_t*>(matrix.global_scale)}) {
    *byte ^= 1;
    EXPECT_NE(out.compare(matrix, *stream_), "");
    *byte ^= 1;
  }
  CudaMemory::fill(reinterpret_cast<std::byte*>(out.view().codes + sizes.codes), 0, 1, *stream_);
  EXPECT_NE(out.compare(matrix, *stream_), "");
  std::vector<std::byte> floats(64), others(64);
  EXPECT_EQ(difference(floats, others, DType::f16), 32u);
  others[63] = std::byte{1};
  EXPECT_EQ(difference(floats, others, DType::f16), 31u);
}

TEST_F(CudaQuantizeTest, BadArgumentsAreRefused) {
  const Format format = Format::parse("uint4:g32:fp32");
  Floats weights(DType::f32, 2, 64, 64, 3);
  std::byte* device = put(weights.bytes);
  const OnDevice out(format, 2, 64, next_);
  const TensorView view = weights.view(device);
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  const auto expect = [&](const char* part, const TensorView& from, const CanonicalView& to,
                          QuantizeOptions options = {}) {
    const std::string text = message([&] { quantize(from, to, options, *stream_); });
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect("weights lies in host memory", weights.view(), out.view());
  expect("weights is at address", weights.view(device + 2), out.view());
  expect("mse", view, out.view(), {.search = ScaleSearch::mse});
  CanonicalView broken = out.view();
  broken.scales = static_cast<std::byte*>(broken.scales) + 2;
  expect("scales is at address", view, broken);
  broken = out.view();
  broken.zeros = nullptr;
  expect("no zeros", view, broken);
  uint8_t here = 0;
  broken.zeros = &here;
  expect("zeros lies in host memory", view, broken);
  expect("2 x 64", TensorView(device, DType::f32, {64, 2}), out.view());
  expect("float64", TensorView(device, DType::f64, {2, 64}), out.view());

  const auto expect_sum = [&](const char* part, const std::vector<CanonicalView>& peers) {
    const std::string text = message([&] { dequantize_sum(peers, view, *stream_); });
    EXPECT_NE(text.find(part), std::string::npos) << text;
    if (peers.size() <= 64) {
      EXPECT_NE(message([&] { dequantize_sum(peers, weights.view(), default_executor()); }).find(part),
                std::string::npos);
    }
  };
  expect_sum("no matrices", {});
  expect_sum("at most 64", std::vector<CanonicalView>(65, out.view()));
  broken = out.view();
  broken.format = Format::parse("uint4:g64:fp32");
  expect_sum("peers[1]", {out.view(), broken});
  EXPECT_NE(message([&] { dequantize(out.view(), weights.view(), *stream_); }), "");
  EXPECT_THROW(dequantize(out.view(), view, Stream(99, nullptr)), InvalidArgument);
}

}  // namespace
}  // namespace ng
