// Binds narrowgauge/device.hpp, executor.hpp and memory.hpp: instruction sets, GPUs, threads, and the streaming read.
#include "narrowgauge/device.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"
#include "narrowgauge/executor.hpp"
#include "narrowgauge/memory.hpp"
#include "tensor_view.hpp"

namespace ng::python {

void bind_device(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "isa", [] { return isa_name(isa()); }, "The instruction set in use: 'portable', 'avx2', 'avx512' or 'amx'.");
  module.def(
      "force_isa", [](std::string_view name) { force_isa(isa_from_name(name)); }, "name"_a,
      "Use a lower instruction set. ValueError if the CPU lacks it.");
  module.def(
      "supported_isas",
      [] {
        std::vector<std::string_view> names;
        for (const Isa each : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
          if (each <= isa_supported()) names.push_back(isa_name(each));
        }
        return names;
      },
      "The instruction sets that this CPU can run, lowest first.");
  module.def("why_no_amx", &why_no_amx, "Why a CPU that has AMX does not run it; '' if it does or has none.");
  module.def("cpu_name", &cpu_name);
  module.def("cpu_features", &cpu_features);

  // The first of these starts the driver, which may take seconds.
  module.def("why_no_cuda", &why_no_cuda, nb::call_guard<nb::gil_scoped_release>());
  module.def("cuda_device_count", &cuda_device_count, nb::call_guard<nb::gil_scoped_release>());
  module.def("cuda_architectures", &cuda_architectures);
  module.def("cuda_driver_version", &cuda_driver_version, nb::call_guard<nb::gil_scoped_release>());
  module.def(
      "cuda_device",
      [](int index) {
        const CudaDevice device = [&] {
          const nb::gil_scoped_release release;
          return cuda_device(index);
        }();
        return nb::make_tuple(device.name, device.capability, device.multiprocessors, device.memory_bytes,
                              device.l2_bytes, device.shared_bytes);
      },
      "index"_a);

  module.def("threads", [] { return default_executor().threads(); }, "Threads that take part in a call.");
  module.def(
      "set_threads", [](int count) { default_executor().set_threads(count); }, "count"_a,
      nb::call_guard<nb::gil_scoped_release>());
  module.def("executor_name", [] { return default_executor().name(); });
  module.def("adopt_openmp", &adopt_openmp, nb::call_guard<nb::gil_scoped_release>(),
             "Run on the OpenMP threads that are in the process. Returns '' or the reason why not.");

  module.def(
      "advise_huge_pages",
      [](nb::handle array) {
        const BorrowedTensor borrowed(array, "array", Access::write);
        advise_huge_pages(dense_bytes(borrowed.view(), "array", borrowed->bytes()),
                          static_cast<size_t>(borrowed->bytes()));
      },
      "array"_a, "Ask for 2 MiB pages for a dense array, before its first use.");
  module.def(
      "stream_read",
      [](nb::handle array) {
        const BorrowedTensor borrowed(array, "array");
        const uint8_t* data = dense_bytes(borrowed.view(), "array", borrowed->bytes());
        const nb::gil_scoped_release release;
        return stream_read(data, static_cast<size_t>(borrowed->bytes()), default_executor());
      },
      "array"_a, "Read every cache line of a dense array once, on all threads; its time is the limit of memory.");
}

}  // namespace ng::python
