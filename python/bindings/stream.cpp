// Binds narrowgauge/stream.hpp, and keeps each thread's current streams.
#include "narrowgauge/stream.hpp"

#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"
#include "tensor.hpp"

namespace ng::python {
namespace {

// Streams that this thread has entered by `with`, innermost last.
std::vector<Stream>& entered() {
  thread_local std::vector<Stream> streams;
  return streams;
}

void leave(const Stream& stream) {
  std::vector<Stream>& streams = entered();
  NG_CHECK(!streams.empty() && streams.back().device() == stream.device() && streams.back().handle() == stream.handle(),
           InvalidArgument, "a stream is left that this thread has not entered last");
  streams.pop_back();
}

}  // namespace

Stream current_stream(int device) {
  const std::vector<Stream>& streams = entered();
  for (auto each = streams.rbegin(); each != streams.rend(); ++each) {
    if (each->device() == device) return *each;
  }
  return {device, nullptr};
}

void bind_stream(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Event>(module, "Event", "A point in a stream's order, where it was last recorded.")
      .def(nb::init<int>(), "device"_a = 0, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("device", &Event::device)
      .def("record", &Event::record, "stream"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Moves the point to behind all work that the stream has been given.")
      .def("synchronize", &Event::synchronize, nb::call_guard<nb::gil_scoped_release>(),
           "Waits for the work before the point. CudaError if a kernel failed.")
      .def("is_done", &Event::is_done);

  nb::class_<Stream>(module, "Stream",
                     "Ordered work on a GPU. Without a handle it is a new stream, which does not wait for the default "
                     "stream; a handle is the address of a CUstream (torch's stream.cuda_stream), which must stay, 0 "
                     "the default stream. `with stream:` makes it this thread's current stream of its device, the one "
                     "that work on Tensors goes to; work on torch tensors goes to torch's own.")
      .def(
          "__init__",
          [](Stream* self, int device, std::optional<uintptr_t> handle) {
            new (self)
                Stream(handle ? Stream(device, reinterpret_cast<CUstream_st*>(*handle)) : Stream::create(device));
          },
          "device"_a = 0, "handle"_a = nb::none())
      .def_prop_ro("device", &Stream::device)
      .def_prop_ro("handle", [](const Stream& self) { return reinterpret_cast<uintptr_t>(self.handle()); })
      .def("synchronize", &Stream::synchronize, nb::call_guard<nb::gil_scoped_release>(),
           "Waits until all work is done. CudaError if a kernel failed, ValueError for what a kernel found in its "
           "input.")
      .def("is_done", &Stream::is_done)
      .def("is_capturing", &Stream::is_capturing)
      .def("wait", &Stream::wait, "event"_a, "Work that is given from now on starts after the event.")
      .def("__enter__",
           [](nb::handle self) {
             entered().push_back(nb::cast<const Stream&>(self));
             return nb::borrow(self);
           })
      .def(
          "__exit__", [](const Stream& self, nb::handle, nb::handle, nb::handle) { leave(self); }, "type"_a.none(),
          "value"_a.none(), "traceback"_a.none());

  module.def(
      "current_stream", [](int device) { return current_stream(device); }, "device"_a = 0,
      "This thread's current stream of a device: the one entered last, else the default stream.");
}

}  // namespace ng::python
