// Views: flattening to a matrix, and what it refuses.
#include "narrowgauge/tensor.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "narrowgauge/error.hpp"

namespace ng {
namespace {

std::vector<float> g_data(64);

TensorView dense(std::initializer_list<int64_t> shape) { return {g_data.data(), DType::f32, shape}; }

TEST(Tensor, DenseViews) {
  const TensorView view = dense({2, 3, 4});
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.bytes(), 96);
  EXPECT_TRUE(view.is_contiguous());
  EXPECT_EQ(view.shape_str(), "[2, 3, 4]");
  const MatrixView matrix = as_matrix(view, "x");
  EXPECT_EQ(matrix.rows, 6);
  EXPECT_EQ(matrix.cols, 4);
  EXPECT_EQ(matrix.row_stride, 4);
  EXPECT_EQ(as_matrix(dense({5}), "x").rows, 1);
}

TEST(Tensor, StridedRowsFlatten) {
  TensorView view = dense({2, 3, 4});
  view.strides = {24, 8, 1};
  EXPECT_EQ(as_matrix(view, "x").row_stride, 8);
  view.strides = {25, 8, 1};
  EXPECT_THROW(as_matrix(view, "x"), InvalidArgument);
  view.strides = {12, 4, 2};
  EXPECT_THROW(as_matrix(view, "x"), InvalidArgument);
  // Axes of one element have any stride.
  view = dense({2, 1, 4});
  view.strides = {8, 999, 1};
  EXPECT_EQ(as_matrix(view, "x").row_stride, 8);
  // A broadcast row.
  view = dense({3, 4});
  view.strides = {0, 1};
  EXPECT_EQ(as_matrix(view, "x").row_stride, 0);
  view.strides = {-4, 1};
  EXPECT_THROW(as_matrix(view, "x"), InvalidArgument);
}

TEST(Tensor, EmptyNullAndScalar) {
  EXPECT_EQ(as_matrix(TensorView(nullptr, DType::f32, {0, 4}), "x").rows, 0);
  EXPECT_THROW(as_matrix(TensorView(nullptr, DType::f32, {2, 4}), "x"), InvalidArgument);
  EXPECT_THROW(as_matrix(dense({}), "x"), InvalidArgument);
  try {
    as_matrix(TensorView(nullptr, DType::f32, {2, 4}), "weights");
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("weights has shape [2, 4] but null data"), std::string::npos);
  }
}

}  // namespace
}  // namespace ng
