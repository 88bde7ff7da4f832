// Binds narrowgauge/linear_plan.hpp: plans as dictionaries of their fields.
#include "narrowgauge/linear_plan.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.hpp"
#include "narrowgauge/error.hpp"

namespace ng::python {
namespace {

using namespace nb::literals;

DType dtype_of(std::string_view name) {
  for (const DType each : {DType::f16, DType::bf16, DType::f32}) {
    if (dtype_name(each) == name) return each;
  }
  throw InvalidArgument(concat("x is '", name, "'; expected 'float16' or 'bfloat16'"));
}

}  // namespace

void bind_linear_plan(nb::module_& module) {
  module.def(
      "cpu_linear_plan",
      [](int64_t rows, const Format& format, int64_t n, int64_t k, std::string_view activations, std::string_view x) {
        const CpuLinearPlan plan = cpu_linear_plan(rows, format, n, k, parse_activations(activations), dtype_of(x));
        nb::dict fields;
        fields["isa"] = isa_name(plan.isa);
        fields["direct"] = plan.direct;
        fields["x_rows"] = plan.x_rows;
        fields["second_x_rows"] = plan.second_x_rows;
        fields["pass_rows"] = plan.pass_rows;
        fields["passes"] = plan.passes;
        fields["task_rows"] = plan.task_rows;
        fields["tasks"] = plan.tasks;
        return fields;
      },
      "rows"_a, "format"_a, "n"_a, "k"_a, "activations"_a = "exact", "x"_a = "float32",
      "What linear does with x [rows, k] and weights [n, k] on this CPU.");

  module.def(
      "cuda_linear_plan",
      [](int64_t rows, const Format& format, int64_t n, int64_t k, std::string_view x, int multiprocessors) {
        const CudaLinearPlan plan = cuda_linear_plan(rows, format, n, k, dtype_of(x), multiprocessors);
        nb::dict fields;
        fields["kernel"] = plan.kernel;
        fields["x_rows"] = plan.x_rows;
        fields["weight_rows"] = plan.weight_rows;
        fields["threads"] = plan.threads;
        fields["stages"] = plan.stages;
        fields["stage_bytes"] = plan.stage_bytes;
        fields["teams"] = plan.teams;
        fields["shared_bytes"] = plan.shared_bytes;
        fields["resident"] = plan.resident;
        fields["splits"] = plan.splits;
        fields["blocks"] = plan.blocks;
        fields["block_stages"] = plan.block_stages;
        fields["workspace_bytes"] = plan.workspace_bytes;
        return fields;
      },
      "rows"_a, "format"_a, "n"_a, "k"_a, "x"_a, "multiprocessors"_a,
      "What linear does with x [rows, k] and weights [n, k] on a GPU of so many multiprocessors; needs none.");
}

}  // namespace ng::python
