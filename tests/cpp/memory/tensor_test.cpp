// Tensors that own pool memory: layout, refusals, and who keeps what alive.
#include "narrowgauge/tensor.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <thread>
#include <vector>

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {
namespace {

Tensor empty(const std::shared_ptr<Pool>& pool, std::vector<int64_t> shape, DType dtype = DType::bf16) {
  return Tensor::empty(pool, shape, dtype);
}

TEST(OwnedTensor, IsDenseAndReturnsItsMemory) {
  const auto pool = std::make_shared<HostPool>();
  {
    Tensor tensor = empty(pool, {3, 1000, 2});
    EXPECT_EQ(tensor->shape_str(), "[3, 1000, 2]");
    EXPECT_TRUE(tensor->is_contiguous());
    EXPECT_EQ(tensor->bytes(), 12000);
    EXPECT_EQ(pool->statistics().in_use, 3 * kPoolAlignment);
    Tensor moved = std::move(tensor);
    EXPECT_EQ(pool->statistics().blocks, 1u);
    moved = empty(pool, {});  // a scalar
    EXPECT_EQ(moved->numel(), 1);
    EXPECT_EQ(pool->statistics().in_use, kPoolAlignment);
  }
  EXPECT_EQ(pool->statistics().in_use, 0u);
  EXPECT_EQ(pool->statistics().bad_frees, 0u);
}

TEST(OwnedTensor, WithoutElementsTakesNoMemory) {
  const auto pool = std::make_shared<HostPool>();
  const Tensor tensor = empty(pool, {5, 0, 3});
  EXPECT_EQ(tensor->numel(), 0);
  EXPECT_EQ(pool->statistics().blocks, 0u);
}

TEST(OwnedTensor, TheLastOwnerFreesFromAnyThreadAndThePoolOutlivesIt) {
  auto pool = std::make_shared<HostPool>();
  Tensor tensor = empty(pool, {1 << 20});
  Tensor other = tensor.share();
  EXPECT_EQ(other->data, tensor->data);
  tensor = Tensor();
  EXPECT_EQ(pool->statistics().blocks, 1u);
  const std::weak_ptr<HostPool> watch = pool;
  pool.reset();
  ASSERT_FALSE(watch.expired());
  static_cast<char*>(other->data)[5] = 1;
  std::thread([last = std::move(other)]() mutable { last = Tensor(); }).join();
  EXPECT_TRUE(watch.expired());
}

TEST(OwnedTensor, RefusesShapesThatCannotBe) {
  const auto pool = std::make_shared<HostPool>();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_THROW(empty(nullptr, {1}), InvalidArgument);
  EXPECT_THROW(empty(pool, {2, -1}), InvalidArgument);
  EXPECT_THROW(empty(pool, std::vector<int64_t>(kMaxDims + 1, 1)), InvalidArgument);
  EXPECT_THROW(empty(pool, {kMax / 2, 3}), InvalidArgument);
  EXPECT_THROW(empty(pool, {kMax}), InvalidArgument);
  EXPECT_THROW(empty(pool, {kMax / 4, kMax / 4, 0}), InvalidArgument);
  EXPECT_THROW(empty(pool, {kMax / 4}), OutOfMemory);
  EXPECT_EQ(pool->statistics().blocks, 0u);
}

}  // namespace
}  // namespace ng
