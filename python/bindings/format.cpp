// Binds narrowgauge/format.hpp: the immutable, hashable class Format.
#include "narrowgauge/format.hpp"

#include <nanobind/operators.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <functional>

#include "bindings.hpp"

namespace ng::python {
namespace {

constexpr const char* kDoc = R"(How numbers are stored: ``element[:group[:scale]]``, such as ``fp6_e2m3:g128:fp16``.

element: ``fpN_eXmY`` (3 <= N <= 8), ``intN``, ``uintN`` (N = 2..8; uintN has a zero point) or ``nf4``.
group: ``gN`` elements of a row share a scale (a multiple of 16, 16..1024), or ``row``.
scale: ``fp32``, ``fp16``, ``bf16``, ``e8m0`` or ``e4m3``.
Omitted group = row; omitted scale = fp32 for row, bf16 for groups. Aliases such as ``fp6`` or ``mxfp4`` stand for full
names: see format_aliases(). Raises ValueError that names the bad part and the valid choices.

Immutable and hashable; equal if all parts are.)";

std::string_view kind_name(ElementKind kind) {
  switch (kind) {
    case ElementKind::fp: return "fp";
    case ElementKind::signed_int: return "int";
    case ElementKind::unsigned_int: return "uint";
    case ElementKind::nf4: return "nf4";
  }
  return "";
}

}  // namespace

void bind_format(nb::module_& module) {
  nb::class_<Format> format(module, "Format", nb::is_final(), kDoc);
  format.attr("__module__") = "narrowgauge";
  format
      .def(
          "__init__", [](Format* self, std::string_view text) { new (self) Format(Format::parse(text)); },
          nb::arg("text"))
      .def(
          "__init__", [](Format* self, const Format& other) { new (self) Format(other); }, nb::arg("other"))
      .def("__str__", &Format::str)
      .def("__repr__", [](const Format& self) { return "Format('" + self.str() + "')"; })
      .def(nb::self == nb::self)
      .def("__hash__", [](const Format& self) { return std::hash<std::string>{}(self.str()); })
      .def("__reduce__", [](nb::handle self) { return nb::make_tuple(self.type(), nb::make_tuple(nb::str(self))); })
      .def_prop_ro(
          "element", [](const Format& self) { return self.element.str(); }, "Name of the element, 'fp6_e2m3'.")
      .def_prop_ro(
          "kind", [](const Format& self) { return kind_name(self.element.kind); }, "'fp', 'int', 'uint' or 'nf4'.")
      .def_prop_ro(
          "bits", [](const Format& self) { return int{self.element.bits}; }, "Bits of one code.")
      .def_prop_ro(
          "exponent_bits", [](const Format& self) { return int{self.element.exponent_bits}; }, "0 unless kind is 'fp'.")
      .def_prop_ro(
          "mantissa_bits", [](const Format& self) { return int{self.element.mantissa_bits}; }, "0 unless kind is 'fp'.")
      .def_prop_ro(
          "group", [](const Format& self) { return self.group; }, "Elements per scale; 0 = the row.")
      .def_prop_ro(
          "scale", [](const Format& self) { return scale_name(self.scale); }, "Type of the scales, 'fp16'.")
      .def_prop_ro("has_zero_point", [](const Format& self) { return self.element.has_zero_point(); })
      .def_prop_ro("has_global_scale", &Format::has_global_scale)
      .def_prop_ro(
          "max", [](const Format& self) { return element_max(self.element); }, "Largest finite element value.")
      .def_prop_ro("min_normal", [](const Format& self) { return element_min_normal(self.element); })
      .def_prop_ro("min_subnormal", [](const Format& self) { return element_min_subnormal(self.element); })
      .def(
          "values",
          [](const Format& self) {
            const auto values = element_values(self.element);
            return std::vector<float>(values.begin(), values.begin() + self.element.codes());
          },
          "The value of every code, before scale and zero point.")
      .def("groups", &Format::groups, nb::arg("cols"), "Scales in a row of `cols` elements.")
      .def("row_bytes", &Format::row_bytes, nb::arg("cols"), "Bytes of the codes of a row of `cols` elements.")
      .def("bits_per_weight", &Format::bits_per_weight, nb::arg("cols") = 0,
           "Stored bits per element, scales and zero points included, for rows of `cols` elements (0: unlimited).");

  module.def(
      "format_aliases",
      [] {
        nb::dict aliases;
        for (const auto& [alias, name] : format_aliases()) {
          aliases[nb::str(alias.data(), alias.size())] = nb::str(name.data(), name.size());
        }
        return aliases;
      },
      "The aliases of formats and their full names.");
}

}  // namespace ng::python
