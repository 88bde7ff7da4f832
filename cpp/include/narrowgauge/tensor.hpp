// TensorView: a borrowed, strided view of somebody's array; Tensor: a view that owns its memory, on some device.
//
// A view is only an address and a layout. Functions that take an Executor read and write host memory, those that take a
// Stream the memory of its GPU.
// Shapes and strides count elements. Negative strides are refused by every function here.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "narrowgauge/device.hpp"
#include "narrowgauge/dtype.hpp"

namespace ng {

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};

  TensorView() = default;
  // A dense row-major view. pre: shape has at most kMaxDims entries.
  TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape);

  int64_t numel() const noexcept;
  int64_t bytes() const noexcept { return numel() * static_cast<int64_t>(dtype_bytes(dtype)); }
  bool is_contiguous() const noexcept;
  std::string shape_str() const;  // "[2, 3]"
};

class Pool;

// Memory, and how it is laid out. The memory may have several owners: it goes back when the last one is destroyed, from
// whatever thread, and the pool that it came from lives at least as long. Move-only; share() makes another owner.
class Tensor {
 public:
  Tensor() = default;

  // A dense row-major tensor from `pool`, on its device, contents undefined; without elements it takes no memory.
  // Throws InvalidArgument for more than kMaxDims axes, a negative length or a size that overflows; OutOfMemory.
  static Tensor empty(std::shared_ptr<Pool> pool, std::span<const int64_t> shape, DType dtype);

  // Memory that `owner` keeps alive: another library's, or a part of another tensor's.
  Tensor(const TensorView& view, std::shared_ptr<void> owner, Device device = {})
      : view_(view), device_(device), owner_(std::move(owner)) {}

  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(Tensor&&) noexcept = default;

  Tensor share() const { return {view_, owner_, device_}; }

  const TensorView& view() const noexcept { return view_; }
  const TensorView* operator->() const noexcept { return &view_; }
  Device device() const noexcept { return device_; }
  const std::shared_ptr<void>& owner() const noexcept { return owner_; }

 private:
  TensorView view_;
  Device device_;
  std::shared_ptr<void> owner_;
};

// A tensor as a matrix: the last axis is the row, the leading axes are flattened. Rows are dense (their elements
// adjacent) and `row_stride` elements apart. This is what kernels see.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;

  template <typename T>
  T* row(int64_t index) const noexcept {
    return static_cast<T*>(data) + index * row_stride;
  }
};

// Flattens `tensor`. Throws InvalidArgument, with `name` in the message, if it has no axes, null data with
// elements, rows that are not dense, or leading axes that do not flatten to one stride.
MatrixView as_matrix(const TensorView& tensor, const char* name);
// What is added to y where it is written, in any order: of its shape, and y itself or apart from it. Throws
// InvalidArgument.
MatrixView as_residual(const TensorView& tensor, const MatrixView& y);

}  // namespace ng
