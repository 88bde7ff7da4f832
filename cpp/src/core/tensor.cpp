// Views: shapes, strides and the flattening to a matrix.
#include "narrowgauge/tensor.hpp"

#include "narrowgauge/error.hpp"

namespace ng {

TensorView::TensorView(void* data_, DType dtype_, std::initializer_list<int64_t> shape_)
    : data(data_), dtype(dtype_), ndim(static_cast<int>(shape_.size())) {
  int axis = 0;
  for (const int64_t extent : shape_) shape[static_cast<size_t>(axis++)] = extent;
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    strides[static_cast<size_t>(i)] = stride;
    stride *= shape[static_cast<size_t>(i)];
  }
}

int64_t TensorView::numel() const noexcept {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count *= shape[static_cast<size_t>(i)];
  return count;
}

bool TensorView::is_contiguous() const noexcept {
  if (numel() == 0) return true;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    const auto axis = static_cast<size_t>(i);
    if (shape[axis] != 1 && strides[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

std::string TensorView::shape_str() const {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) {
    if (i != 0) text += ", ";
    text += std::to_string(shape[static_cast<size_t>(i)]);
  }
  return text + "]";
}

MatrixView as_matrix(const TensorView& tensor, const char* name) {
  NG_CHECK(tensor.ndim >= 1, InvalidArgument, name, " is a scalar; expected at least one axis");
  const auto last = static_cast<size_t>(tensor.ndim - 1);
  MatrixView matrix{tensor.data, tensor.dtype, 1, tensor.shape[last], tensor.shape[last]};
  for (size_t i = 0; i < last; ++i) matrix.rows *= tensor.shape[i];
  if (matrix.rows == 0 || matrix.cols == 0) return matrix;

  NG_CHECK(tensor.data != nullptr, InvalidArgument, name, " has shape ", tensor.shape_str(), " but null data");
  NG_CHECK(tensor.strides[last] == 1 || matrix.cols == 1, InvalidArgument, name, " has stride ", tensor.strides[last],
           " along its last axis; expected dense rows (stride 1)");
  // The leading axes must step like one axis: each stride is the inner one's extent times its stride.
  int64_t extent = 1;  // rows seen so far, from the inside
  for (size_t i = last; i-- > 0;) {
    if (tensor.shape[i] == 1) continue;
    if (extent == 1) {
      matrix.row_stride = tensor.strides[i];
    } else {
      NG_CHECK(tensor.strides[i] == extent * matrix.row_stride, InvalidArgument, name, " of shape ", tensor.shape_str(),
               " has leading axes that do not flatten to one stride; expected stride ", extent * matrix.row_stride,
               " for axis ", i, ", got ", tensor.strides[i]);
    }
    extent *= tensor.shape[i];
  }
  NG_CHECK(matrix.rows == 1 || matrix.row_stride >= 0, InvalidArgument, name, " has a negative stride ",
           matrix.row_stride);
  return matrix;
}

MatrixView as_residual(const TensorView& tensor, const MatrixView& y) {
  const MatrixView residual = as_matrix(tensor, "residual");
  NG_CHECK(residual.rows == y.rows && residual.cols == y.cols, InvalidArgument, "residual has shape ",
           tensor.shape_str(), "; expected that of y, [", y.rows, ", ", y.cols, "]");
  // Elements are read where they are replaced, or nowhere near.
  const bool same_rows = y.rows <= 1 || residual.row_stride == y.row_stride;
  NG_CHECK(residual.data != y.data || (residual.dtype == y.dtype && same_rows), InvalidArgument,
           "residual starts where y does, as ", dtype_name(residual.dtype), " with rows ", residual.row_stride,
           " elements apart; expected those of y, ", dtype_name(y.dtype), " and ", y.row_stride);
  return residual;
}

}  // namespace ng
