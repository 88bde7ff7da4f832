// PackedMatrix: a packed block that lives in a Python array, with its Format and size. The array's device says which
// layout the block has: that of quantize/layout.hpp in host memory, of quantize/cuda_layout.hpp on a GPU.
//
// The handle that linear and gather_rows take, so that a call need not parse a Format. It keeps the array alive and
// asks it for its address at every use, since a framework may move the memory behind an array (torch's
// share_memory_ does). Immutable; may be used from many threads.
#pragma once

#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "tensor_view.hpp"

namespace ng::python {

// Size of the block of a matrix that is packed for a device.
inline int64_t packed_bytes(const Format& format, int64_t rows, int64_t cols, Device device) {
  return device.is_cpu() ? packed_bytes(format, rows, cols) : cuda_packed_bytes(format, rows, cols);
}

class PackedMatrix {
 public:
  // array: u8, packed_bytes() of its device long, aligned to 64, on a GPU to 128; ValueError otherwise.
  PackedMatrix(nb::object array, const Format& format, int64_t rows, int64_t cols)
      : array_(std::move(array)), format_(format), rows_(rows), cols_(cols) {
    const BorrowedTensor borrowed(array_, "packed", Access::read, Where::anywhere);
    device_ = borrowed.device();
    bytes_ = packed_bytes(format, rows, cols, device_);
    check(borrowed);
  }

  // pre: `borrowed` is of array() and lives as long as the view.
  PackedView view(const BorrowedTensor& borrowed) const { return {format_, rows_, cols_, check(borrowed)}; }

  const nb::object& array() const noexcept { return array_; }
  const Format& format() const noexcept { return format_; }
  int64_t rows() const noexcept { return rows_; }
  int64_t cols() const noexcept { return cols_; }

 private:
  const uint8_t* check(const BorrowedTensor& borrowed) const {
    require_device(borrowed, device_, "packed");
    const uint8_t* data = dense_bytes(borrowed.view(), "packed", bytes_);
    const uintptr_t alignment = device_.is_cpu() ? 64 : 128;
    NG_CHECK(reinterpret_cast<uintptr_t>(data) % alignment == 0 || bytes_ == 0, InvalidArgument,
             "packed is not aligned to ", alignment, " bytes");
    return data;
  }

  nb::object array_;
  Format format_;
  int64_t rows_;
  int64_t cols_;
  Device device_;
  int64_t bytes_ = 0;
};

}  // namespace ng::python
