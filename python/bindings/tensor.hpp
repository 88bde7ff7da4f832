// Tensor as Python has it, and the stream that its work goes to.
#pragma once

#include <nanobind/nanobind.h>

#include <string_view>

#include "narrowgauge/stream.hpp"
#include "narrowgauge/tensor.hpp"

namespace ng::python {

namespace nb = nanobind;

struct PyTensor {
  Tensor tensor;
  bool read_only = false;
};

// The dtype called "float32", ...; TypeError naming all of them otherwise.
DType dtype_named(std::string_view name);

// The stream of cuda:`device` that this thread has entered by `with`, else the default one.
Stream current_stream(int device);

// Shares the memory of any array with DLPack, on whatever device, in the order of that device's current stream.
PyTensor from_dlpack(nb::handle array);

}  // namespace ng::python
