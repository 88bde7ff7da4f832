// A Python module with an array type that lends GPU memory as torch does: through DLPack's C exchange table on the
// type, with the stream that its own work goes to, and new arrays out of memory that the test gives it. Built by
// test_cuda_tensor.py.
#include <Python.h>
#include <structmember.h>

#include <cstddef>
#include <cstdint>

#include "dlpack.hpp"

namespace {

using namespace ng;

struct Array {
  PyObject ob_base;
  unsigned long long data;
  int64_t shape[2];
  int64_t strides[2];
  int ndim;
  int device;
  dlpack::DataType dtype;
};

void* stream_of_arrays = nullptr;
int streams_asked = 0;
uint64_t free_memory = 0;  // the address from which new arrays are made
int arrays_made = 0;
PyObject* array_type = nullptr;

int make(PyObject* self, PyObject* arguments, PyObject*) {
  auto* array = reinterpret_cast<Array*>(self);
  unsigned long long stream = 0;
  long long rows = 0, cols = 0;
  int bits = 32;
  if (PyArg_ParseTuple(arguments, "KLLiK|i", &array->data, &rows, &cols, &array->device, &stream, &bits) == 0) {
    return -1;
  }
  array->shape[0] = rows;
  array->shape[1] = cols;
  array->strides[0] = cols;
  array->strides[1] = 1;
  array->ndim = 2;
  array->dtype = {2, static_cast<uint8_t>(bits), 1};
  stream_of_arrays = reinterpret_cast<void*>(stream);
  return 0;
}

int view_from_object(void* object, dlpack::Tensor* out) {
  auto* array = static_cast<Array*>(object);
  *out = {reinterpret_cast<void*>(array->data),
          {dlpack::kCuda, array->device},
          array->ndim,
          array->dtype,
          array->shape,
          array->strides,
          0};
  return 0;
}

int current_work_stream(int32_t, int32_t, void** stream) {
  ++streams_asked;
  *stream = stream_of_arrays;
  return 0;
}

// The managed tensor's context is the Python object that it will become.
int allocate(dlpack::Tensor* prototype, dlpack::ManagedTensor** out, void* context,
             void (*set_error)(void*, const char*, const char*)) {
  if (free_memory == 0 || prototype->device.type != dlpack::kCuda || prototype->ndim > 2) {
    set_error(context, "MemoryError", "the test gave no memory for this");
    return -1;
  }
  PyObject* object = PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(array_type), 0);
  if (object == nullptr) return -1;
  auto* array = reinterpret_cast<Array*>(object);
  array->data = free_memory;
  array->device = prototype->device.id;
  array->ndim = prototype->ndim;
  array->dtype = prototype->dtype;
  int64_t stride = 1;
  for (int axis = prototype->ndim - 1; axis >= 0; --axis) {
    array->shape[axis] = prototype->shape[axis];
    array->strides[axis] = stride;
    stride *= prototype->shape[axis];
  }
  const auto bytes = static_cast<uint64_t>(stride) * prototype->dtype.bits / 8;
  free_memory += (bytes + 511) / 512 * 512;
  ++arrays_made;
  *out = new dlpack::ManagedTensor{{dlpack::kMajorVersion, 3}, object, nullptr, 0, {}};
  return view_from_object(object, &(*out)->tensor);
}

int managed_to_object(dlpack::ManagedTensor* managed, void** object) {
  *object = managed->context;
  delete managed;
  return 0;
}

dlpack::ExchangeApi api{
    {{dlpack::kMajorVersion, 3}, nullptr}, allocate, nullptr, managed_to_object, view_from_object, current_work_stream};

PyObject* asked_for_stream(PyObject*, PyObject*) { return PyLong_FromLong(streams_asked); }
PyObject* made(PyObject*, PyObject*) { return PyLong_FromLong(arrays_made); }
PyObject* allocate_from(PyObject*, PyObject* address) {
  free_memory = PyLong_AsUnsignedLongLong(address);
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_RETURN_NONE;
}

PyMemberDef members[] = {{"data", T_ULONGLONG, offsetof(Array, data), READONLY, "The address."},
                         {nullptr, 0, 0, 0, nullptr}};
PyType_Slot slots[] = {{Py_tp_init, reinterpret_cast<void*>(make)},
                       {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
                       {Py_tp_members, members},
                       {0, nullptr}};
PyType_Spec spec{"cuda_producer.Array", sizeof(Array), 0, Py_TPFLAGS_DEFAULT, slots};
PyMethodDef functions[] = {
    {"asked_for_stream", asked_for_stream, METH_NOARGS, "How often the stream was asked for."},
    {"made", made, METH_NOARGS, "How many arrays were allocated."},
    {"allocate_from", allocate_from, METH_O, "New arrays are made from this address on; 0: they cannot be."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{
    PyModuleDef_HEAD_INIT, "cuda_producer", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_cuda_producer() {
  PyObject* module = PyModule_Create(&definition);
  array_type = PyType_FromSpec(&spec);
  PyObject* table = PyCapsule_New(&api, "dlpack_exchange_api", nullptr);
  PyObject_SetAttrString(array_type, "__dlpack_c_exchange_api__", table);
  Py_DECREF(table);
  Py_INCREF(array_type);
  PyModule_AddObject(module, "Array", array_type);
  return module;
}
