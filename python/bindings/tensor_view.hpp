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
#include "narrowgauge/stream.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng::python {

namespace nb = nanobind;

struct PyTensor;

enum class Access : uint8_t { read, write };
enum class Where : uint8_t { host, anywhere };

// A view of `object`'s elements, valid while *this and `object` live. Every message names `name`.
//
// Throws TypeError if the object is no array, has a dtype that narrowgauge does not know or cannot be written to;
// ValueError if it lies on a device that `where` does not allow, has more than kMaxDims axes, or has elements but no
// memory (a fake or functional tensor).
class BorrowedTensor {
 public:
  BorrowedTensor(nb::handle object, const char* name, Access access = Access::read, Where where = Where::host);

  const TensorView& view() const noexcept { return view_; }
  const TensorView* operator->() const noexcept { return &view_; }
  Device device() const noexcept { return device_; }
  // The stream of the array's GPU that the framework which it comes from works in now. pre: it is on a GPU.
  const Stream& stream() const noexcept { return stream_; }

 private:
  void borrow_tensor(const PyTensor& tensor, const char* name, Access access);
  void borrow_exchanged(const dlpack::ExchangeApi& api, nb::handle object, const char* name);
  void borrow_array(nb::handle object, const char* name, Access access);

  TensorView view_;
  Device device_;
  Stream stream_{0, nullptr};
  Tensor shared_;              // of an array on a GPU without the exchange table
  nb::ndarray<nb::ro> owner_;  // empty on the exchange path
};

// The host (pinned memory too) or a GPU; ValueError with `name` for any other.
Device device_of(dlpack::Device device, const char* name);

// A view of a DLPack tensor's elements, wherever they are. Throws as BorrowedTensor does.
TensorView view_of(const dlpack::Tensor& tensor, const char* name);

// The exchange table of an object's type, or null. Thread-safe, with or without the GIL's protection.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) noexcept;

// Checks that an argument lies where another does (ValueError).
void require_device(const BorrowedTensor& tensor, Device device, const char* name);

// Checks that `view` is f32, f16 or bf16 (TypeError).
void require_float(const TensorView& view, const char* name);

// The whole of a dense array as bytes. Throws ValueError if it is not contiguous or not `bytes` long.
uint8_t* dense_bytes(const TensorView& view, const char* name, int64_t bytes);

}  // namespace ng::python
