// The packed layout of GPUs: every element, scale and ragged shape comes back bit for bit, and the block is determined.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

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

}  // namespace
}  // namespace ng
