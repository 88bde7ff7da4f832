// The table of dtypes: width, DLPack code and name.
#include "narrowgauge/dtype.hpp"

#include <array>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

// DLPack 1.x type codes.
enum : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct Entry {
  DType dtype;
  DLType dlpack;
  std::string_view name;
};

// In the order of the enum.
constexpr std::array kEntries = {
    Entry{DType::f32, {kDLFloat, 32}, "float32"},    Entry{DType::f16, {kDLFloat, 16}, "float16"},
    Entry{DType::bf16, {kDLBfloat, 16}, "bfloat16"}, Entry{DType::f64, {kDLFloat, 64}, "float64"},
    Entry{DType::u8, {kDLUInt, 8}, "uint8"},         Entry{DType::i8, {kDLInt, 8}, "int8"},
    Entry{DType::u16, {kDLUInt, 16}, "uint16"},      Entry{DType::i16, {kDLInt, 16}, "int16"},
    Entry{DType::u32, {kDLUInt, 32}, "uint32"},      Entry{DType::i32, {kDLInt, 32}, "int32"},
    Entry{DType::u64, {kDLUInt, 64}, "uint64"},      Entry{DType::i64, {kDLInt, 64}, "int64"},
    Entry{DType::boolean, {kDLBool, 8}, "bool"},
};

const Entry& entry(DType dtype) noexcept { return kEntries[static_cast<size_t>(dtype)]; }

}  // namespace

size_t dtype_bytes(DType dtype) noexcept { return entry(dtype).dlpack.bits / 8u; }
DLType dtype_dlpack(DType dtype) noexcept { return entry(dtype).dlpack; }
std::string_view dtype_name(DType dtype) noexcept { return entry(dtype).name; }

DType dtype_from_dlpack(DLType type) {
  for (const Entry& e : kEntries) {
    if (e.dlpack == type) return e.dtype;
  }
  throw InvalidArgument(concat("unsupported dtype (DLPack code ", int{type.code}, ", ", int{type.bits},
                               " bits); supported are float32, float16, bfloat16, float64, bool and the integers"));
}

}  // namespace ng
