// Borrowing arrays from Python: a TensorView of a torch tensor, a numpy array or anything else with DLPack or the
// buffer protocol.
//
// A framework with DLPack's C exchange table (torch >= 2.10) is asked through it: tens of nanoseconds, no Python
// call, no torch header. Everything else goes through nb::ndarray. Not here: autograd, conjugate and negative bits,
// which DLPack does not carry; the Python layer settles them before it calls.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "dlpack.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng::python {

namespace nb = nanobind;

enum class Access : uint8_t { read, write };

// A view of `object`'s elements, valid while *this and `object` live. Every message names `name`.
//
// Throws TypeError if the object is no array, has a dtype that narrowgauge does not know or cannot be written to;
// ValueError if it lies on another device, has more than kMaxDims axes, or has elements but no memory (a fake or
// functional tensor).
class BorrowedTensor {
 public:
  BorrowedTensor(nb::handle object, const char* name, Access access = Access::read);

  const TensorView& view() const noexcept { return view_; }
  const TensorView* operator->() const noexcept { return &view_; }

 private:
  TensorView view_;
  nb::ndarray<nb::ro> owner_;  // empty on the exchange path
};

// A view of a DLPack tensor's elements. Throws as BorrowedTensor does.
TensorView view_of(const dlpack::Tensor& tensor, const char* name);

// The exchange table of an object's type, or null. Thread-safe, with or without the GIL's protection.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) noexcept;

// Checks that `view` is f32, f16 or bf16 (TypeError).
void require_float(const TensorView& view, const char* name);

// The whole of a dense array as bytes. Throws ValueError if it is not contiguous or not `bytes` long.
uint8_t* dense_bytes(const TensorView& view, const char* name, int64_t bytes);

}  // namespace ng::python
