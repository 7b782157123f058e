// What the engine says of itself in Python: kernels, their limits and costs, and the names that programs take.
#include "capabilities.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "engine/program.h"

namespace nb = nanobind;

namespace nm {
namespace {

struct Capabilities {};  // the tables of native/kernels/costs.h and the names of native/engine/checks.cc

nb::tuple names(const std::vector<std::string>& list) { return nb::tuple(nb::cast(list)); }

}  // namespace

void add_capabilities(nb::module_& m) {
  nb::class_<LinearKernel>(m, "LinearKernel")
      .def_prop_ro("format", [](const LinearKernel& k) { return std::string(k.format); })
      .def_ro("rows", &LinearKernel::rows)
      .def_ro("most_inputs", &LinearKernel::most_inputs)
      .def_ro("near", &LinearKernel::near)
      .def_ro("far", &LinearKernel::far);
  nb::class_<ChoiceCosts>(m, "ChoiceCosts")
      .def_ro("near", &ChoiceCosts::near)
      .def_ro("epilogue", &ChoiceCosts::epilogue)
      .def_ro("spreading", &ChoiceCosts::spreading)
      .def_ro("last_quad", &ChoiceCosts::last_quad)
      .def_ro("quantizing", &ChoiceCosts::quantizing);
  nb::class_<Capabilities>(m, "Capabilities")
      .def_prop_ro("kernels",
                   [](const Capabilities&) {
                     nb::list list;
                     for (const LinearKernel& kernel : kLinearKernels) list.append(nb::cast(kernel));
                     return nb::tuple(list);
                   })
      .def_prop_ro("choice", [](const Capabilities&) { return ChoiceCosts(); })
      .def_prop_ro("costs",
                   [](const Capabilities&) {
                     nb::dict figures;
#define NM_ITEM(name, value, meaning) figures[#name] = static_cast<double>(value);
                     NM_SCHEDULE_COSTS(NM_ITEM)
#undef NM_ITEM
                     return nb::module_::import_("types").attr("MappingProxyType")(figures);
                   })
      .def_prop_ro("steps", [](const Capabilities&) { return names(kStepNames); })
      .def_prop_ro("layouts", [](const Capabilities&) { return names(kLayoutNames); })
      .def_prop_ro("activations", [](const Capabilities&) { return names(kActivationNames); })
      .def_prop_ro("stream_kinds", [](const Capabilities&) { return names(kStreamKinds); })
      .def_prop_ro("streams",
                   [](const Capabilities&) {
                     std::vector<std::string> list;
                     for (const Stream& stream : default_streams()) list.push_back(stream.name);
                     return names(list);
                   })
      .def_prop_ro("group", [](const Capabilities&) { return kGroupInputs; })
      .def_prop_ro("panel", [](const Capabilities&) { return kPanelTokens; });
  m.def("capabilities", [] { return Capabilities(); });
}

}  // namespace nm
