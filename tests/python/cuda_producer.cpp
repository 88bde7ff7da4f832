// A Python module with an array type that lends GPU memory as torch does: through DLPack's C exchange table on the
// type, with the stream that its own work goes to. Built by test_cuda_tensor.py.
#include <Python.h>

#include <cstdint>

#include "dlpack.hpp"

namespace {

using namespace ng;

struct Array {
  PyObject ob_base;
  void* data;
  int64_t shape[2];
  int64_t strides[2];
  int device;
};

void* stream_of_arrays = nullptr;
int streams_asked = 0;

int make(PyObject* self, PyObject* arguments, PyObject*) {
  auto* array = reinterpret_cast<Array*>(self);
  unsigned long long data = 0, stream = 0;
  long long rows = 0, cols = 0;
  if (PyArg_ParseTuple(arguments, "KLLiK", &data, &rows, &cols, &array->device, &stream) == 0) return -1;
  array->data = reinterpret_cast<void*>(data);
  array->shape[0] = rows;
  array->shape[1] = cols;
  array->strides[0] = cols;
  array->strides[1] = 1;
  stream_of_arrays = reinterpret_cast<void*>(stream);
  return 0;
}

int view_from_object(void* object, dlpack::Tensor* out) {
  auto* array = static_cast<Array*>(object);
  *out = {array->data, {dlpack::kCuda, array->device}, 2, {2, 32, 1}, array->shape, array->strides, 0};
  return 0;
}

int current_work_stream(int32_t, int32_t, void** stream) {
  ++streams_asked;
  *stream = stream_of_arrays;
  return 0;
}

dlpack::ExchangeApi api{
    {{dlpack::kMajorVersion, 3}, nullptr}, nullptr, nullptr, nullptr, view_from_object, current_work_stream};

PyObject* asked_for_stream(PyObject*, PyObject*) { return PyLong_FromLong(streams_asked); }

PyType_Slot slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(make)}, {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)}, {0, nullptr}};
PyType_Spec spec{"cuda_producer.Array", sizeof(Array), 0, Py_TPFLAGS_DEFAULT, slots};
PyMethodDef functions[] = {{"asked_for_stream", asked_for_stream, METH_NOARGS, "How often the stream was asked for."},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{
    PyModuleDef_HEAD_INIT, "cuda_producer", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_cuda_producer() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* type = PyType_FromSpec(&spec);
  PyObject* table = PyCapsule_New(&api, "dlpack_exchange_api", nullptr);
  PyObject_SetAttrString(type, "__dlpack_c_exchange_api__", table);
  Py_DECREF(table);
  PyModule_AddObject(module, "Array", type);
  return module;
}
