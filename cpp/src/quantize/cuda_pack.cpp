// pack_cuda and unpack_cuda on the host: between the canonical layout and the packed one of GPUs (cuda_layout.hpp).
//
// They run once per matrix, so they go code by code through the layout's pieces.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cuda_layout.hpp"
#include "narrowgauge/error.hpp"
#include "quantize/arguments.hpp"
#include "quantize/codec.hpp"

namespace ng {
namespace {

using lane_order::kLanes;
using lane_order::Order;

constexpr int kUnits = 4;  // of a tile in a stage
constexpr int kMaxBits = 8;

// Codes of a tile's rows are spread to bytes through a window of this many columns.
constexpr int64_t kWindow = 8 * int64_t{kCudaStageCols};
static_assert(kWindow % codec::kBlock == 0);
using Window = std::array<std::array<uint8_t, kWindow>, kCudaTileRows>;

constexpr int64_t align(int64_t bytes) noexcept {
  return (bytes + kCudaAlignment - 1) / kCudaAlignment * kCudaAlignment;
}

// --- codes ---------------------------------------------------------------------------------------------------------

using Words = std::array<uint32_t, kMaxBits>;

Order order_of(const Element& element) noexcept {
  return lane_order::order_of(element.bits, element.kind == ElementKind::nf4);
}

// Calls use(word, shift, code, bits of it, their first) for every piece of the lane's codes in a stage of the window.
template <typename Window, typename Use>
void for_each_piece(const Order& order, Window& window, int unit, int lane, int64_t first_col, const Use& use) {
  for (int pair = 0; pair < lane_order::kPairs; ++pair) {
    const lane_order::Pieces& pieces = order.pair[pair];
    auto& row = window[static_cast<size_t>(unit * lane_order::kUnitRows + lane_order::code_row(lane, pair))];
    for (int half = 0; half < 2; ++half) {
      auto& code = row[static_cast<size_t>(first_col + lane_order::code_col(lane, pair) + half)];
      for (int i = 0; i < pieces.count; ++i) {
        const lane_order::Piece& piece = pieces.piece[i];
        use(static_cast<size_t>(piece.word), piece.source + half * order.half_step, code, piece.bits, piece.target);
      }
    }
  }
}

void pack_unit(const Order& order, const Element& element, const Window& window, int unit, int64_t first_col,
               uint8_t* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    Words words{};
    for_each_piece(order, window, unit, lane, first_col,
                   [&](size_t word, int shift, unsigned code, int count, int target) {
                     words[word] |= (code >> target & ((1u << count) - 1u)) << shift;
                   });
    for (int word = 0; word < element.bits; ++word) {
      const uint32_t rotated = std::rotl(words[static_cast<size_t>(word)], cuda_base(element));
      std::memcpy(out + lane_order::word_place(element.bits, lane, word), &rotated, sizeof rotated);
    }
  }
}

// pre: the window's codes are 0.
void unpack_unit(const Order& order, const Element& element, const uint8_t* unit_data, int unit, int64_t first_col,
                 Window& window) {
  for (int lane = 0; lane < kLanes; ++lane) {
    Words words{};
    for (int word = 0; word < element.bits; ++word) {
      uint32_t rotated;
      std::memcpy(&rotated, unit_data + lane_order::word_place(element.bits, lane, word), sizeof rotated);
      words[static_cast<size_t>(word)] = std::rotr(rotated, cuda_base(element));
    }
    for_each_piece(order, window, unit, lane, first_col,
                   [&](size_t word, int shift, uint8_t& code, int count, int target) {
                     const uint32_t piece = words[word] >> shift & ((1u << count) - 1u);
                     code = static_cast<uint8_t>(code | piece << target);
                   });
  }
}

// --- scales --------------------------------------------------------------------------------------------------------

// The bits of a scale as a float's, and back, NaN and Inf and all.
uint32_t widen(ScaleType type, uint32_t bits) noexcept {
  if (type == ScaleType::e4m3 && (bits & 0x7fu) == 0x7fu) return (bits & 0x80u) << 24 | 0x7fc00000u;
  return std::bit_cast<uint32_t>(scale_decode(type, bits));
}
uint32_t narrow(ScaleType type, uint32_t bits) noexcept {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  switch (type) {
    case ScaleType::fp32: return bits;
    case ScaleType::bf16: return bits >> 16;
    case ScaleType::fp16:
      if (!finite) return (bits >> 16 & 0x8000u) | 0x7c00u | (bits >> 13 & 0x3ffu);
      break;
    case ScaleType::e4m3:
      if (!finite) return (bits >> 24 & 0x80u) | 0x7fu;
      break;
    case ScaleType::e8m0: break;
  }
  return scale_encode(type, std::bit_cast<float>(bits));
}

uint32_t read_bits(const void* from, int64_t index, size_t width) noexcept {
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const uint8_t*>(from) + static_cast<size_t>(index) * width, width);
  return bits;
}
void write_bits(void* to, int64_t index, size_t width, uint32_t bits) noexcept {
  std::memcpy(static_cast<uint8_t*>(to) + static_cast<size_t>(index) * width, &bits, width);
}

// --- tiles ---------------------------------------------------------------------------------------------------------

struct Matrix {
  const CanonicalView& view;
  const CudaLayout& layout;
  size_t scale_width = scale_bytes(view.format.scale);
  bool grouped = view.format.group != 0;

  int64_t tile_rows(int64_t tile) const noexcept {
    return std::min<int64_t>(kCudaTileRows, view.rows - tile * kCudaTileRows);
  }
};

void pack_codes(const Matrix& m, const Order& order, int64_t tile, uint8_t* packed) {
  const Element& element = m.view.format.element;
  const codec::Table& codec = codec::table();
  const int64_t row_bytes = m.view.format.row_bytes(m.view.cols), rows = m.tile_rows(tile);
  const unsigned flip = cuda_flip(element);
  const std::array<float, 256> values = element_values(element);
  auto* specials = reinterpret_cast<float*>(packed + m.layout.specials) + tile * kCudaTileRows;
  uint8_t* out = packed + tile * m.layout.stages * m.layout.stage_bytes();
  alignas(64) Window window;
  for (auto& row : window) row.fill(0);
  for (int64_t col = 0; col < m.view.cols; col += kWindow) {
    const int64_t count = std::min(kWindow, m.view.cols - col);
    for (int64_t row = 0; row < rows; ++row) {
      auto& line = window[static_cast<size_t>(row)];
      codec.unpack(m.view.codes + (tile * kCudaTileRows + row) * row_bytes + col / 8 * element.bits, count,
                   element.bits, line.data());
      std::fill(line.begin() + count, line.end(), uint8_t{0});
      for (int64_t i = 0; i < count; ++i) {
        uint8_t& code = line[static_cast<size_t>(i)];
        if (has_special_codes(element) && !std::isfinite(values[code])) {
          specials[row] = std::numeric_limits<float>::quiet_NaN();
        }
        code = static_cast<uint8_t>(code ^ flip);
      }
    }
    for (int64_t first = 0; first < count; first += kCudaStageCols) {
      for (int unit = 0; unit < kUnits; ++unit, out += m.layout.unit_bytes) {
        pack_unit(order, element, window, unit, first, out);
      }
    }
  }
}

void unpack_codes(const Matrix& m, const Order& order, int64_t tile, const uint8_t* packed) {
  const Element& element = m.view.format.element;
  const codec::Table& codec = codec::table();
  const int64_t row_bytes = m.view.format.row_bytes(m.view.cols), rows = m.tile_rows(tile);
  const unsigned flip = cuda_flip(element);
  const uint8_t* in = packed + tile * m.layout.stages * m.layout.stage_bytes();
  alignas(64) Window window;
  for (int64_t col = 0; col < m.view.cols; col += kWindow) {
    const int64_t count = std::min(kWindow, m.view.cols - col);
    for (auto& row : window) row.fill(0);
    for (int64_t first = 0; first < count; first += kCudaStageCols) {
      for (int unit = 0; unit < kUnits; ++unit, in += m.layout.unit_bytes) {
        unpack_unit(order, element, in, unit, first, window);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      auto& line = window[static_cast<size_t>(row)];
      for (int64_t i = 0; i < count; ++i) {
        line[static_cast<size_t>(i)] = static_cast<uint8_t>(line[static_cast<size_t>(i)] ^ flip);
      }
      std::fill(line.begin() + count, line.end(), uint8_t{0});
      codec.pack(line.data(), count, element.bits,
                 m.view.codes + (tile * kCudaTileRows + row) * row_bytes + col / 8 * element.bits);
    }
  }
}

// Calls use(row of the matrix and group: canonical index, record, entry in it) for the groups of a tile.
template <typename Use>
void for_each_group(const Matrix& m, int64_t tile, const Use& use) {
  for (int64_t row = 0; row < m.tile_rows(tile); ++row) {
    for (int64_t group = 0; group < m.layout.groups; ++group) {
      use((tile * kCudaTileRows + row) * m.layout.groups + group,
          (tile * m.layout.groups + group) * m.layout.record_bytes, lane_order::record_entry(static_cast<int>(row)));
    }
  }
}

}  // namespace

CudaLayout::CudaLayout(const Format& format, int64_t rows, int64_t cols) {
  const CanonicalBytes canonical = canonical_bytes(format, rows, cols);  // checks rows and cols
  tiles = (rows + kCudaTileRows - 1) / kCudaTileRows;
  stages = (cols + kCudaStageCols - 1) / kCudaStageCols;
  groups = format.groups(cols);
  unit_bytes = int64_t{kLanes} * 4 * format.element.bits;
  record_zeros = format.group == 0 ? 0 : kCudaTileRows * static_cast<int64_t>(scale_bytes(format.scale));
  record_bytes = record_zeros + (format.element.has_zero_point() ? kCudaTileRows : 0);
  const double codes = static_cast<double>(tiles) * static_cast<double>(stages) * static_cast<double>(stage_bytes());
  const double group_bytes =
      static_cast<double>(tiles) * static_cast<double>(groups) * static_cast<double>(record_bytes);
  NG_CHECK(codes < 0x1p60 && group_bytes < 0x1p60, InvalidArgument, "a packed matrix of ", rows, " x ", cols,
           " elements in ", format.str(), " has more bytes than can be counted");
  const int64_t per_row = cols == 0 ? 0 : tiles * kCudaTileRows * static_cast<int64_t>(sizeof(float));
  records = align(tiles * stages * stage_bytes());
  row_scales = records + align(tiles * groups * record_bytes);
  specials = row_scales + (format.group == 0 ? align(per_row) : 0);
  global_scale = specials + (has_special_codes(format.element) ? align(per_row) : 0);
  total = global_scale + align(canonical.global_scale);
}

int64_t cuda_packed_bytes(const Format& format, int64_t rows, int64_t cols) {
  return CudaLayout(format, rows, cols).total;
}

CudaLayout codec::check_pack_cuda(const CanonicalView& matrix, const uint8_t* packed) {
  check_canonical(matrix);
  const CudaLayout layout(matrix.format, matrix.rows, matrix.cols);
  NG_CHECK(packed != nullptr || layout.total == 0, InvalidArgument, "pack_cuda: the packed block is null");
  return layout;
}

CudaLayout codec::check_unpack_cuda(const PackedView& packed, const CanonicalView& out) {
  NG_CHECK(packed.format == out.format && packed.rows == out.rows && packed.cols == out.cols, InvalidArgument,
           "unpack_cuda: the packed matrix is ", packed.format.str(), " [", packed.rows, ", ", packed.cols,
           "], the output ", out.format.str(), " [", out.rows, ", ", out.cols, "]");
  check_canonical(out);
  const CudaLayout layout(packed.format, packed.rows, packed.cols);
  NG_CHECK(packed.data != nullptr || layout.total == 0, InvalidArgument, "unpack_cuda: the packed block is null");
  return layout;
}

void pack_cuda(const CanonicalView& matrix, uint8_t* packed, Executor& executor) {
  const CudaLayout layout = codec::check_pack_cuda(matrix, packed);
  if (layout.total == 0) return;
  const Matrix m{matrix, layout};
  const Order order = order_of(matrix.format.element);
  std::memset(packed + layout.records, 0, static_cast<size_t>(layout.total - layout.records));
  executor.parallel_for(layout.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      pack_codes(m, order, tile, packed);
      for_each_group(m, tile, [&](int64_t index, int64_t record, int64_t entry) {
        uint8_t* to = packed + layout.records + record;
        const uint32_t bits = read_bits(matrix.scales, index, m.scale_width);
        if (m.grouped) {
          write_bits(to, entry, m.scale_width, bits);
        } else {
          write_bits(packed + layout.row_scales, index, sizeof(float), widen(matrix.format.scale, bits));
        }
        if (matrix.zeros != nullptr) to[layout.record_zeros + entry] = matrix.zeros[index];
      });
    }
  });
  const int64_t codes_end = layout.tiles * layout.stages * layout.stage_bytes();
  std::memset(packed + codes_end, 0, static_cast<size_t>(layout.records - codes_end));
  if (matrix.format.has_global_scale()) {
    std::memcpy(packed + layout.global_scale, matrix.global_scale, sizeof(float));
  }
}

void unpack_cuda(const PackedView& packed, const CanonicalView& out, Executor& executor) {
  const CudaLayout layout = codec::check_unpack_cuda(packed, out);
  if (layout.total == 0) return;
  const Matrix m{out, layout};
  const Order order = order_of(out.format.element);
  executor.parallel_for(layout.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      unpack_codes(m, order, tile, packed.data);
      for_each_group(m, tile, [&](int64_t index, int64_t record, int64_t entry) {
        const uint8_t* from = packed.data + layout.records + record;
        if (m.grouped) {
          write_bits(out.scales, index, m.scale_width, read_bits(from, entry, m.scale_width));
        } else {
          const uint32_t wide = read_bits(packed.data + layout.row_scales, index, sizeof(float));
          write_bits(out.scales, index, m.scale_width, narrow(out.format.scale, wide));
        }
        if (out.zeros != nullptr) out.zeros[index] = from[layout.record_zeros + entry];
      });
    }
  });
  if (out.format.has_global_scale()) {
    std::memcpy(out.global_scale, packed.data + layout.global_scale, sizeof(float));
  }
}

}  // namespace ng
