// The extension module _native: its parts, and the mapping of ng's errors to Python's.
#include "bindings.hpp"
#include "narrowgauge/error.hpp"

namespace ng::python {
namespace {

// The classes live in narrowgauge.errors, so that they pickle and have docstrings; looked up only when thrown.
void set_error(const char* class_name, const char* message) {
  nb::object type = nb::module_::import_("narrowgauge.errors").attr(class_name);
  PyErr_SetString(type.ptr(), message);
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const InvalidArgument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const OutOfMemory& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const SystemError& error) {
    // OSError picks its subclass by errno only when it is called with both.
    nb::object instance = nb::handle(PyExc_OSError)(error.errno_value(), error.what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
  } catch (const CudaError& error) {
    set_error("CudaError", error.what());
  } catch (const Timeout& error) {
    PyErr_SetString(PyExc_TimeoutError, error.what());
  } catch (const TransportError& error) {
    set_error("TransportError", error.what());
  } catch (const CheckpointCorrupt& error) {
    set_error("CheckpointCorrupt", error.what());
  } catch (const CheckpointError& error) {
    set_error("CheckpointError", error.what());
  } catch (const FileCorrupt& error) {
    set_error("FileCorrupt", error.what());
  } catch (const Error& error) {
    set_error("Error", error.what());
  }
}

}  // namespace
}  // namespace ng::python

NB_MODULE(_native, module) {
  using namespace ng::python;
  nanobind::register_exception_translator(translate);
  // torch keeps the operators' functions, and what they hold, until after nanobind would look for leaks.
  nanobind::set_leak_warnings(false);
  module.attr("__version__") = NARROWGAUGE_VERSION;
  bind_format(module);
  bind_quantize(module);
  bind_linear(module);
  bind_linear_plan(module);
  bind_device(module);
  bind_stream(module);
  bind_tensor(module);
  bind_memory(module);
  bind_pool(module);
  bind_io(module);
  bind_checkpoint(module);
  bind_collective(module);
}
