// The parts of the extension module: one function per public header binds its names into the module.
//
// Everything here is private to the package: arguments are caller-made buffers, shapes are checked by the core, and
// narrowgauge's Python files give the names that users see.
#pragma once

#include <nanobind/nanobind.h>

namespace ng::python {

namespace nb = nanobind;

void bind_format(nb::module_& module);
void bind_quantize(nb::module_& module);
void bind_linear(nb::module_& module);
void bind_linear_plan(nb::module_& module);
void bind_device(nb::module_& module);
void bind_stream(nb::module_& module);
void bind_tensor(nb::module_& module);
void bind_memory(nb::module_& module);
void bind_pool(nb::module_& module);
void bind_io(nb::module_& module);
void bind_checkpoint(nb::module_& module);
void bind_collective(nb::module_& module);

}  // namespace ng::python
