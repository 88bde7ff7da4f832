// What the bindings of all pools share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "narrowgauge/memory.hpp"
#include "tensor.hpp"

namespace ng::python {

namespace nb = nanobind;

// With counts, and perhaps a limit; that is outermost, so that its error shows the peak.
// That of narrowgauge's HostPool, an object of Python; null for None. Throws TypeError's exception otherwise.
std::shared_ptr<Pool> host_pool_of(nb::handle pool);

std::shared_ptr<Pool> counted(std::shared_ptr<Pool> pool, std::optional<size_t> limit);

// The fields of the pool's PoolStatistics by their names.
nb::dict statistics_of(const Pool& pool);

// A native sink, or one around an object of Python with put(key, view) and get(key, view). Null for None.
std::shared_ptr<PageSink> sink_of(nb::object object);

// A new Tensor from the pool; TypeError if there is no such dtype.
PyTensor new_tensor(const std::shared_ptr<Pool>& pool, const std::vector<int64_t>& shape, std::string_view dtype);

}  // namespace ng::python
