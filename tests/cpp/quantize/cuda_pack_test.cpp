// The packed layout of GPUs: every element, scale and ragged shape comes back bit for bit, and the block is determined;
// on a device it is what the host makes.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda_memory.hpp"
#include "linear/reference.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "quantize/cuda_layout.hpp"

namespace ng {
namespace {

using test::Matrix;

// All bits of a matrix random: codes and scales without a value too. The padding of codes is zero.
Matrix any_matrix(const Format& format, int64_t rows, int64_t cols, std::mt19937& random) {
  Matrix matrix(format, rows, cols);
  for (auto* bytes : {&matrix.scales, &matrix.zeros}) {
    for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(random());
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      matrix.set_code(row, col, static_cast<int>(random() % static_cast<unsigned>(format.element.codes())));
    }
  }
  for (float& global : matrix.global_scale) global = 0.37f;
  return matrix;
}

std::vector<uint8_t> pack_all(Matrix& matrix, uint8_t fill) {
  std::vector<uint8_t> packed(static_cast<size_t>(cuda_packed_bytes(matrix.format, matrix.rows, matrix.cols)), fill);
  pack_cuda(matrix.view(), packed.data(), default_executor());
  return packed;
}

void expect_round_trip(const Format& format, int64_t rows, int64_t cols, std::mt19937& random) {
  SCOPED_TRACE(format.str() + " " + std::to_string(rows) + " x " + std::to_string(cols));
  Matrix matrix = any_matrix(format, rows, cols, random);
  const std::vector<uint8_t> packed = pack_all(matrix, 0xa5);
  EXPECT_EQ(packed, pack_all(matrix, 0x5a));
  Matrix back(format, rows, cols);
  unpack_cuda({format, rows, cols, packed.data()}, back.view(), default_executor());
  EXPECT_EQ(back.codes, matrix.codes);
  EXPECT_EQ(back.scales, matrix.scales);
  EXPECT_EQ(back.zeros, matrix.zeros);
  EXPECT_EQ(back.global_scale, matrix.global_scale);
}

TEST(CudaPack, EveryFormatComesBack) {
  std::mt19937 random(1);
  for (const std::string& element : test::all_elements()) {
    for (const char* rest : {"row:fp32", "row:fp16", "row:bf16", "row:e8m0", "row:e4m3", "g16:e4m3", "g48:fp16",
                             "g32:e8m0", "g128:bf16", "g1024:fp32"}) {
      expect_round_trip(Format::parse(element + ":" + rest), 67, 131, random);
    }
  }
}

TEST(CudaPack, RaggedShapesComeBack) {
  std::mt19937 random(2);
  for (const char* format : {"fp6_e2m3:g128:fp16", "uint3:g16:bf16", "nf4:row:fp32", "int8:g32:e8m0"}) {
    for (const int64_t rows : {0, 1, 15, 64, 65, 128}) {
      for (const int64_t cols : {0, 1, 63, 64, 65, 513, 1030}) {
        expect_round_trip(Format::parse(format), rows, cols, random);
      }
    }
  }
}

// The layout's drawing: 16 x 64 codes of 6 bits, of which only one is not zero.
TEST(CudaPack, CodesLieWhereTheDrawingSays) {
  const Format format = Format::parse("fp6_e2m3:row:fp32");
  Matrix matrix(format, 16, 64);
  matrix.set_code(9, 16 + 2, 0x2a);  // slice 1, operand 1, lane 5, first half: pair 5, word 2, bits 6 to 11
  const std::vector<uint8_t> packed = pack_all(matrix, 0);
  uint32_t word;
  std::memcpy(&word, packed.data() + 5 * 16 + 2 * 4, sizeof word);
  EXPECT_EQ(word, 0x2au << 6 << 7);  // the base of 3 mantissa bits is 7
  EXPECT_EQ(std::count(packed.begin(), packed.begin() + 768, 0), 768 - 2);
}

TEST(CudaPack, RowsWithSpecialCodesAreMarked) {
  for (const char* element : {"fp8_e4m3", "fp8_e5m2"}) {
    const Format format = Format::parse(std::string(element) + ":row:fp32");
    Matrix matrix(format, 70, 40);
    matrix.set_code(66, 39, 0xff);
    const std::vector<uint8_t> packed = pack_all(matrix, 0xee);
    const CudaLayout layout(format, 70, 40);
    std::vector<float> specials(128);
    std::memcpy(specials.data(), packed.data() + layout.specials, 512);
    for (size_t row = 0; row < 128; ++row) EXPECT_EQ(std::isnan(specials[row]), row == 66) << row;
  }
}

TEST(CudaPack, RefusesWhatDoesNotFit) {
  Matrix matrix(Format::parse("fp6"), 4, 64);
  std::vector<uint8_t> packed = pack_all(matrix, 0);
  EXPECT_THROW(pack_cuda(matrix.view(), nullptr, default_executor()), InvalidArgument);
  Matrix other(Format::parse("fp6"), 5, 64);
  EXPECT_THROW(unpack_cuda({matrix.format, 4, 64, packed.data()}, other.view(), default_executor()), InvalidArgument);
  EXPECT_THROW(cuda_packed_bytes(matrix.format, -1, 64), InvalidArgument);
}

// --- on a device ---------------------------------------------------------------------------------------------------

class CudaPackOnDevice : public CudaKernelTest {
 protected:
  static constexpr std::byte kCanary{0xcd};

  // A range of the device's memory, surrounded by bytes that nothing may touch.
  std::byte* take(size_t bytes, size_t alignment, size_t skew) {
    next_ += 64;
    next_ += (alignment - reinterpret_cast<uintptr_t>(next_) % alignment) % alignment + skew;
    std::byte* at = next_;
    next_ += bytes;
    return at;
  }

  // The arrays of a matrix on the device, each `skew` elements of its own from where all accesses are wide.
  CanonicalView place(const Matrix& matrix, size_t skew) {
    const auto array = [&](size_t bytes, size_t element) { return take(bytes, 64, skew * element); };
    CanonicalView view{matrix.format, matrix.rows, matrix.cols};
    view.codes = reinterpret_cast<uint8_t*>(array(matrix.codes.size(), 1));
    view.scales = array(matrix.scales.size(), scale_bytes(matrix.format.scale));
    if (!matrix.zeros.empty()) view.zeros = reinterpret_cast<uint8_t*>(array(matrix.zeros.size(), 1));
    if (!matrix.global_scale.empty()) view.global_scale = reinterpret_cast<float*>(array(4, 4));
    return view;
  }

  static void upload(const CanonicalView& to, Matrix& from, const Stream& stream) {
    const CanonicalView host = from.view();
    const CanonicalBytes bytes = canonical_bytes(host.format, host.rows, host.cols);
    const auto each = [&](void* there, const void* here, int64_t size) {
      CudaMemory::upload(static_cast<std::byte*>(there),
                         {static_cast<const std::byte*>(here), static_cast<size_t>(size)}, stream);
    };
    each(to.codes, host.codes, bytes.codes);
    each(to.scales, host.scales, bytes.scales);
    each(to.zeros, host.zeros, bytes.zeros);
    each(to.global_scale, host.global_scale, bytes.global_scale);
  }

  // All memory from where it is given out to `end`.
  std::vector<std::byte> all(const std::byte* end) {
    return CudaMemory::download(memory_->data(), static_cast<size_t>(end - memory_->data()), *stream_);
  }

  // Packs and unpacks on the device. What the memory holds is compared with what it should hold, canaries and all.
  void expect_as_on_the_host(const Format& format, int64_t rows, int64_t cols, size_t skew, std::mt19937& random) {
    SCOPED_TRACE(format.str() + " " + std::to_string(rows) + " x " + std::to_string(cols) + " skewed by " +
                 std::to_string(skew));
    Matrix matrix = any_matrix(format, rows, cols, random);
    const std::vector<uint8_t> expected = pack_all(matrix, 0);
    next_ = memory_->data();
    const CanonicalView there = place(matrix, skew);
    auto* packed = reinterpret_cast<uint8_t*>(take(expected.size(), kCudaAlignment, 0));
    const CanonicalView back = place(matrix, skew);
    std::byte* end = next_ + 64;
    const auto clear = [&] {
      CudaMemory::fill(memory_->data(), static_cast<unsigned char>(kCanary), static_cast<size_t>(end - memory_->data()),
                       *stream_);
      upload(there, matrix, *stream_);
    };
    clear();
    upload(back, matrix, *stream_);
    CudaMemory::upload(reinterpret_cast<std::byte*>(packed), std::as_bytes(std::span(expected)), *stream_);
    const std::vector<std::byte> wanted = all(end);
    clear();
    pack_cuda(there, packed, *stream_);
    unpack_cuda({format, rows, cols, packed}, back, *stream_);
    const std::vector<std::byte> seen = all(end);
    stream_->synchronize();
    const auto differ = std::mismatch(seen.begin(), seen.end(), wanted.begin()).first - seen.begin();
    EXPECT_EQ(differ, static_cast<std::ptrdiff_t>(seen.size()))
        << "the block begins at " << reinterpret_cast<std::byte*>(packed) - memory_->data() << ", what comes back at "
        << reinterpret_cast<std::byte*>(back.codes) - memory_->data();
  }
};

TEST_F(CudaPackOnDevice, EveryElementAndScale) {
  std::mt19937 random(3);
  constexpr const char* kRest[] = {"row:fp32", "g16:e4m3", "row:fp16",  "g48:fp16", "row:bf16",
                                   "g32:e8m0", "row:e8m0", "g128:bf16", "row:e4m3", "g1024:fp32"};
  size_t i = 0;
  for (const std::string& element : test::all_elements()) {
    expect_as_on_the_host(Format::parse(element + ":" + kRest[i++ % 10]), 18, 131, 0, random);
  }
  for (const char* rest : kRest) expect_as_on_the_host(Format::parse(std::string("uint5:") + rest), 67, 70, 0, random);
}

TEST_F(CudaPackOnDevice, RaggedShapes) {
  std::mt19937 random(4);
  for (const char* format : {"fp6_e2m3:g128:fp16", "uint3:g16:bf16", "nf4:row:fp32", "fp8_e4m3:g32:e8m0"}) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 64}, {3, 0}, {1, 1}, {65, 64}, {5, 1030}}) {
      expect_as_on_the_host(Format::parse(format), rows, cols, 0, random);
    }
    expect_as_on_the_host(Format::parse(format), 17, 600, 1, random);
  }
}

TEST_F(CudaPackOnDevice, RefusesWhatDoesNotFit) {
  const Format format = Format::parse("uint4:g32:fp16");
  std::mt19937 random(5);
  Matrix matrix = any_matrix(format, 4, 64, random);
  const CanonicalView there = place(matrix, 0);
  auto* packed =
      reinterpret_cast<uint8_t*>(take(static_cast<size_t>(cuda_packed_bytes(format, 4, 64)), kCudaAlignment, 0));
  const auto expect = [&](const char* part, const CanonicalView& view, uint8_t* block) {
    for (const bool back : {false, true}) {
      try {
        back ? unpack_cuda({format, 4, 64, block}, view, *stream_) : pack_cuda(view, block, *stream_);
        ADD_FAILURE() << part;
      } catch (const InvalidArgument& error) {
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      }
    }
  };
  expect("the packed block is null", there, nullptr);
  expect("the packed block is at address", there, packed + 64);
  expect("codes lies in host memory", matrix.view(), packed);
  std::vector<uint8_t> here(static_cast<size_t>(cuda_packed_bytes(format, 4, 64)));
  expect("the packed block lies in host memory", there, here.data());
  CanonicalView broken = there;
  broken.zeros = nullptr;
  expect("no zeros", broken, packed);
  EXPECT_THROW(unpack_cuda({format, 5, 64, packed}, there, *stream_), InvalidArgument);
}

}  // namespace
}  // namespace ng
