// pack, unpack and gather_rows: between the canonical and the packed layout (layout.hpp).
//
// pack runs for every product where weights are gathered from ranks, so it makes a unit's bytes one after the other;
// unpack runs once per matrix and gather_rows once per token, code by code. All by the layout's map.
#include <algorithm>
#include <cstring>

#include "layout.hpp"
#include "narrowgauge/error.hpp"
#include "quantize/codec.hpp"

namespace ng {
namespace {

constexpr int64_t align64(int64_t bytes) noexcept { return (bytes + 63) / 64 * 64; }

// Codes of a row are spread to bytes through a window of this many columns: whole units and whole codec blocks.
constexpr int64_t kWindow = 64 * kUnitCols;
static_assert(kWindow % codec::kBlock == 0);

uint8_t read_unit(const UnitMap& map, const uint8_t* unit, size_t index) noexcept {
  unsigned code = 0;
  for (int p = 0; p < map.planes; ++p) {
    const UnitMap::Plane& plane = map.plane[static_cast<size_t>(p)];
    const unsigned field = (unsigned{unit[plane.byte[index]]} >> plane.shift[index]) & ((1u << plane.bits) - 1u);
    code |= field << plane.first_bit;
  }
  return static_cast<uint8_t>(code);
}

// The codes of a block's rows, a window of columns of each.
using Window = std::array<uint8_t, static_cast<size_t>(kBlockRows* kWindow)>;

// Makes units of codes, plane by plane.
class UnitWriter {
 public:
  explicit UnitWriter(const UnitMap& map) : map_(map) {
    for (int p = 0; p < map.planes; ++p) {
      const UnitMap::Plane& plane = map.plane[static_cast<size_t>(p)];
      const int first = *std::min_element(plane.byte.begin(), plane.byte.end()), slots = 8 / plane.bits;
      for (int index = 0; index < kUnitCodes; ++index) {
        const int byte = plane.byte[static_cast<size_t>(index)] - first;
        const int slot = plane.shift[static_cast<size_t>(index)] / plane.bits;
        sources_[static_cast<size_t>(p)][static_cast<size_t>(byte * slots + slot)] =
            static_cast<uint16_t>(index / kUnitCols * kWindow + index % kUnitCols);
      }
    }
  }

  // codes: of the unit's first row and column in a Window.
  void operator()(const uint8_t* codes, uint8_t* unit) const noexcept {
    for (int p = 0; p < map_.planes; ++p) {
      switch (map_.plane[static_cast<size_t>(p)].bits) {
        case 8: unit = write<8>(p, codes, unit); break;
        case 4: unit = write<4>(p, codes, unit); break;
        case 2: unit = write<2>(p, codes, unit); break;
        default: unit = write<1>(p, codes, unit); break;
      }
    }
  }

 private:
  // Returns where the plane ends.
  template <int kBits>
  uint8_t* write(int p, const uint8_t* codes, uint8_t* out) const noexcept {
    const int first_bit = map_.plane[static_cast<size_t>(p)].first_bit;
    const uint16_t* source = sources_[static_cast<size_t>(p)].data();
    for (int i = 0; i < kUnitCodes * kBits / 8; ++i) {
      unsigned byte = 0;
      for (int slot = 0; slot < 8 / kBits; ++slot) {
        byte |= (unsigned{codes[*source++]} >> first_bit & ((1u << kBits) - 1u)) << (slot * kBits);
      }
      *out++ = static_cast<uint8_t>(byte);
    }
    return out;
  }

  const UnitMap& map_;
  // By plane: for each of its bytes, from the low bits on, where in a Window the codes are.
  std::array<std::array<uint16_t, kUnitCodes>, 3> sources_{};
};

void check_canonical(const CanonicalView& matrix, const char* what) {
  const CanonicalBytes bytes = canonical_bytes(matrix.format, matrix.rows, matrix.cols);
  const auto check = [&](int64_t size, const void* data, const char* name) {
    NG_CHECK(size == 0 || data != nullptr, InvalidArgument, what, ": ", name, " is null; expected ", size, " bytes");
  };
  check(bytes.codes, matrix.codes, "codes");
  check(bytes.scales, matrix.scales, "scales");
  check(bytes.zeros, matrix.zeros, "zeros");
  check(bytes.global_scale, matrix.global_scale, "global_scale");
}

void check_packed(const void* data, const char* what) {
  NG_CHECK(data != nullptr, InvalidArgument, what, ": the packed block is null");
  NG_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0, InvalidArgument, what, ": the packed block is at address ",
           data, "; expected alignment to 64 bytes");
}

// Transposes per-group values between canonical [rows, groups] and packed [block, group, 16].
void pack_groups(const uint8_t* canonical, uint8_t* packed, const PackedLayout& layout, int64_t rows, size_t width,
                 int64_t block) noexcept {
  const int64_t row_count = std::min<int64_t>(kBlockRows, rows - block * kBlockRows);
  uint8_t* out = packed + static_cast<size_t>(block * layout.groups * kBlockRows) * width;
  std::memset(out, 0, static_cast<size_t>(layout.groups * kBlockRows) * width);
  for (int64_t row = 0; row < row_count; ++row) {
    for (int64_t group = 0; group < layout.groups; ++group) {
      const auto from = static_cast<size_t>((block * kBlockRows + row) * layout.groups + group);
      std::memcpy(out + static_cast<size_t>(group * kBlockRows + row) * width, canonical + from * width, width);
    }
  }
}

void unpack_groups(const uint8_t* packed, uint8_t* canonical, const PackedLayout& layout, int64_t rows, size_t width,
                   int64_t block) noexcept {
  const int64_t row_count = std::min<int64_t>(kBlockRows, rows - block * kBlockRows);
  const uint8_t* in = packed + static_cast<size_t>(block * layout.groups * kBlockRows) * width;
  for (int64_t row = 0; row < row_count; ++row) {
    for (int64_t group = 0; group < layout.groups; ++group) {
      const auto to = static_cast<size_t>((block * kBlockRows + row) * layout.groups + group);
      std::memcpy(canonical + to * width, in + static_cast<size_t>(group * kBlockRows + row) * width, width);
    }
  }
}

template <typename T>
void store_row(const float* values, int64_t count, T* out) noexcept {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = values[i];
    } else if constexpr (std::is_same_v<T, bf16>) {
      out[i] = to_bf16(values[i]);
    } else {
      out[i] = to_f16(values[i]);
    }
  }
}

}  // namespace

const UnitMap& UnitMap::of(const Element& element) {
  // By order and width: nibble 2..4, pair 5..8, quad 8.
  static const std::array<UnitMap, 8> kMaps = {
      make(UnitOrder::nibble, 2), make(UnitOrder::nibble, 3), make(UnitOrder::nibble, 4), make(UnitOrder::pair, 5),
      make(UnitOrder::pair, 6),   make(UnitOrder::pair, 7),   make(UnitOrder::pair, 8),   make(UnitOrder::quad, 8)};
  return unit_order(element) == UnitOrder::quad ? kMaps.back() : kMaps[static_cast<size_t>(element.bits - 2)];
}

PackedLayout::PackedLayout(const Format& format, int64_t rows, int64_t cols) {
  const CanonicalBytes canonical = canonical_bytes(format, rows, cols);  // checks rows and cols
  blocks = (rows + kBlockRows - 1) / kBlockRows;
  units = (cols + kUnitCols - 1) / kUnitCols;
  groups = format.groups(cols);
  units_per_group = format.group == 0 ? units : format.group / kUnitCols;
  unit_bytes = kUnitCodes * format.element.bits / 8;
  // Padding can make a thin matrix up to 256 times larger than what canonical_bytes() checked.
  const double codes = static_cast<double>(blocks) * static_cast<double>(units) * static_cast<double>(unit_bytes);
  const double group_bytes = static_cast<double>(blocks) * static_cast<double>(groups) * kBlockRows * sizeof(float);
  NG_CHECK(codes < 0x1p60 && group_bytes < 0x1p60, InvalidArgument, "a packed matrix of ", rows, " x ", cols,
           " elements in ", format.str(), " has more bytes than can be counted");
  const int64_t per_group = blocks * groups * kBlockRows;
  scales = align64(blocks * units * unit_bytes);
  zeros = scales + align64(per_group * static_cast<int64_t>(scale_bytes(format.scale)));
  global_scale = zeros + (format.element.has_zero_point() ? align64(per_group) : 0);
  total = global_scale + align64(canonical.global_scale);
}

int64_t packed_bytes(const Format& format, int64_t rows, int64_t cols) {
  return PackedLayout(format, rows, cols).total;
}

void pack(const CanonicalView& matrix, uint8_t* packed, Executor& executor) {
  check_canonical(matrix, "pack");
  const PackedLayout layout(matrix.format, matrix.rows, matrix.cols);
  if (layout.total == 0) return;
  check_packed(packed, "pack");
  const Element& element = matrix.format.element;
  const UnitWriter write(UnitMap::of(element));
  const codec::Table& codec = codec::table();
  const size_t scale_width = scale_bytes(matrix.format.scale);
  const int64_t row_bytes = matrix.format.row_bytes(matrix.cols);

  executor.parallel_for(layout.blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Window codes;
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* unit = packed + block * layout.block_bytes();
      const int64_t row_count = std::min<int64_t>(kBlockRows, matrix.rows - block * kBlockRows);
      for (int64_t col = 0; col < matrix.cols; col += kWindow) {
        const int64_t count = std::min(kWindow, matrix.cols - col);
        for (int64_t row = 0; row < kBlockRows; ++row) {
          uint8_t* line = codes.data() + row * kWindow;
          const int64_t known = row < row_count ? count : 0;
          if (known != 0) {
            const uint8_t* stream = matrix.codes + (block * kBlockRows + row) * row_bytes;
            codec.unpack(stream + col / 8 * element.bits, count, element.bits, line);
          }
          std::fill(line + known, line + kWindow, uint8_t{0});
        }
        for (int64_t i = 0; i < count; i += kUnitCols, unit += layout.unit_bytes) write(codes.data() + i, unit);
      }
      pack_groups(static_cast<const uint8_t*>(matrix.scales), packed + layout.scales, layout, matrix.rows, scale_width,
                  block);
      if (element.has_zero_point()) {
        pack_groups(matrix.zeros, packed + layout.zeros, layout, matrix.rows, 1, block);
      }
    }
  });
  if (matrix.format.has_global_scale()) {
    std::memcpy(packed + layout.global_scale, matrix.global_scale, sizeof(float));
  }
}

void unpack(const PackedView& packed, const CanonicalView& out, Executor& executor) {
  NG_CHECK(packed.format == out.format && packed.rows == out.rows && packed.cols == out.cols, InvalidArgument,
           "unpack: the packed matrix is ", packed.format.str(), " [", packed.rows, ", ", packed.cols, "], the output ",
           out.format.str(), " [", out.rows, ", ", out.cols, "]");
  check_canonical(out, "unpack");
  const PackedLayout layout(packed.format, packed.rows, packed.cols);
  if (layout.total == 0) return;
  check_packed(packed.data, "unpack");
  const Element& element = packed.format.element;
  const UnitMap& map = UnitMap::of(element);
  const codec::Table& codec = codec::table();
  const size_t scale_width = scale_bytes(packed.format.scale);
  const int64_t row_bytes = packed.format.row_bytes(packed.cols);

  executor.parallel_for(layout.blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) std::array<uint8_t, kWindow> codes;
    for (int64_t block = begin; block < end; ++block) {
      const uint8_t* units = packed.data + block * layout.block_bytes();
      const int64_t row_count = std::min<int64_t>(kBlockRows, out.rows - block * kBlockRows);
      for (int64_t row = 0; row < row_count; ++row) {
        uint8_t* stream = out.codes + (block * kBlockRows + row) * row_bytes;
        for (int64_t col = 0; col < out.cols; col += kWindow) {
          const int64_t count = std::min(kWindow, out.cols - col);
          for (int64_t i = 0; i < count; ++i) {
            const uint8_t* unit = units + (col + i) / kUnitCols * layout.unit_bytes;
            codes[static_cast<size_t>(i)] =
                read_unit(map, unit, static_cast<size_t>(row * kUnitCols + (col + i) % kUnitCols));
          }
          std::fill(codes.begin() + count, codes.end(), uint8_t{0});
          codec.pack(codes.data(), count, element.bits, stream + col / 8 * element.bits);
        }
      }
      unpack_groups(packed.data + layout.scales, static_cast<uint8_t*>(out.scales), layout, out.rows, scale_width,
                    block);
      if (element.has_zero_point()) {
        unpack_groups(packed.data + layout.zeros, out.zeros, layout, out.rows, 1, block);
      }
    }
  });
  if (packed.format.has_global_scale()) {
    std::memcpy(out.global_scale, packed.data + layout.global_scale, sizeof(float));
  }
}

void gather_rows(const PackedView& packed, const int64_t* indices, int64_t count, const TensorView& out,
                 Executor& executor) {
  const MatrixView target = as_matrix(out, "out");
  NG_CHECK(target.rows == count && target.cols == packed.cols, InvalidArgument, "gather_rows: out is ", out.shape_str(),
           "; expected [", count, ", ", packed.cols, "]");
  NG_CHECK(target.dtype == DType::f32 || target.dtype == DType::f16 || target.dtype == DType::bf16, InvalidArgument,
           "gather_rows: out is ", dtype_name(target.dtype), "; expected float32, float16 or bfloat16");
  for (int64_t i = 0; i < count; ++i) {
    NG_CHECK(indices[i] >= 0 && indices[i] < packed.rows, InvalidArgument, "gather_rows: index ", i, " is ", indices[i],
             "; expected 0 <= index < ", packed.rows);
  }
  if (count == 0 || packed.cols == 0) return;
  check_packed(packed.data, "gather_rows");

  const PackedLayout layout(packed.format, packed.rows, packed.cols);
  const Element& element = packed.format.element;
  const UnitMap& map = UnitMap::of(element);
  const std::array<float, 256> values = element_values(element);
  const size_t scale_width = scale_bytes(packed.format.scale);
  float global = 1.0f;
  if (packed.format.has_global_scale()) std::memcpy(&global, packed.data + layout.global_scale, sizeof global);

  executor.parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    std::array<float, kUnitCols> row_values;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = indices[i] / kBlockRows;
      const auto row = static_cast<size_t>(indices[i] % kBlockRows);
      for (int64_t unit = 0; unit < layout.units; ++unit) {
        const int64_t group = unit / layout.units_per_group;
        const auto at = static_cast<size_t>((block * layout.groups + group) * kBlockRows) + row;
        uint32_t bits = 0;
        std::memcpy(&bits, packed.data + layout.scales + at * scale_width, scale_width);
        float scale = scale_decode(packed.format.scale, bits);
        if (packed.format.has_global_scale()) scale *= global;
        const uint8_t zero_point = element.has_zero_point() ? packed.data[layout.zeros + static_cast<int64_t>(at)] : 0;
        const auto zero = static_cast<float>(zero_point);
        const uint8_t* codes = packed.data + block * layout.block_bytes() + unit * layout.unit_bytes;
        for (size_t col = 0; col < kUnitCols; ++col) {
          row_values[col] = (values[read_unit(map, codes, row * kUnitCols + col)] - zero) * scale;
        }
        const int64_t first = unit * kUnitCols;
        const int64_t valid = std::min<int64_t>(kUnitCols, packed.cols - first);
        switch (target.dtype) {
          case DType::f32: store_row(row_values.data(), valid, target.row<float>(i) + first); break;
          case DType::bf16: store_row(row_values.data(), valid, target.row<bf16>(i) + first); break;
          default: store_row(row_values.data(), valid, target.row<f16>(i) + first); break;
        }
      }
    }
  });
}

}  // namespace ng
