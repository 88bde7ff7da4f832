// Tensors from a pool.
#include "narrowgauge/tensor.hpp"

#include "narrowgauge/error.hpp"
#include "narrowgauge/memory.hpp"

namespace ng {

Tensor Tensor::empty(std::shared_ptr<Pool> pool, std::span<const int64_t> shape, DType dtype) {
  NG_CHECK(pool != nullptr, InvalidArgument, "the pool is null");
  NG_CHECK(shape.size() <= kMaxDims, InvalidArgument, "shape has ", shape.size(), " axes, at most ", kMaxDims,
           " are supported");
  TensorView view;
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  auto bytes = static_cast<int64_t>(dtype_bytes(dtype));
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    NG_CHECK(shape[axis] >= 0, InvalidArgument, "shape has length ", shape[axis], " on axis ", axis,
             ", expected none below 0");
    view.shape[axis] = shape[axis];
    view.strides[axis] = stride;
    // As an empty axis counts 1, the strides of an empty tensor are checked too.
    const int64_t length = shape[axis] > 0 ? shape[axis] : 1;
    NG_CHECK(!__builtin_mul_overflow(bytes, length, &bytes), InvalidArgument, "a tensor of ", shape.size(), " axes, ",
             length, " long on axis ", axis, ", of ", dtype_name(dtype), " has more bytes than 64 bits can count");
    stride *= length;
  }
  if (view.numel() == 0) return {view, nullptr, pool->device()};

  const auto size = static_cast<size_t>(bytes);
  const Device device = pool->device();
  view.data = pool->allocate(size);
  // If the shared_ptr cannot be made, it calls the deleter.
  std::shared_ptr<void> owner(view.data, [pool = std::move(pool), size](void* data) { pool->deallocate(data, size); });
  return {view, std::move(owner), device};
}

}  // namespace ng
