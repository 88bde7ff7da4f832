// PackedMatrix: a packed block that lives in a Python array, with its Format and size.
//
// The handle that linear and gather_rows take, so that a call need not parse a Format. It keeps the array alive and
// asks it for its address at every use, since a framework may move the memory behind an array (torch's
// share_memory_ does). Immutable; may be used from many threads.
#pragma once

#include "narrowgauge/error.hpp"
#include "narrowgauge/quantize.hpp"
#include "tensor_view.hpp"

namespace ng::python {

class PackedMatrix {
 public:
  // array: u8, packed_bytes() long, aligned to 64; ValueError otherwise.
  PackedMatrix(nb::object array, const Format& format, int64_t rows, int64_t cols)
      : array_(std::move(array)), format_(format), rows_(rows), cols_(cols), bytes_(packed_bytes(format, rows, cols)) {
    check(BorrowedTensor(array_, "packed"));
  }

  // pre: `borrowed` is of array() and lives as long as the view.
  PackedView view(const BorrowedTensor& borrowed) const { return {format_, rows_, cols_, check(borrowed)}; }

  const nb::object& array() const noexcept { return array_; }
  const Format& format() const noexcept { return format_; }
  int64_t rows() const noexcept { return rows_; }
  int64_t cols() const noexcept { return cols_; }

 private:
  const uint8_t* check(const BorrowedTensor& borrowed) const {
    const uint8_t* data = dense_bytes(borrowed.view(), "packed", bytes_);
    NG_CHECK(reinterpret_cast<uintptr_t>(data) % 64 == 0 || bytes_ == 0, InvalidArgument,
             "packed is not aligned to 64 bytes");
    return data;
  }

  nb::object array_;
  Format format_;
  int64_t rows_;
  int64_t cols_;
  int64_t bytes_;
};

}  // namespace ng::python
