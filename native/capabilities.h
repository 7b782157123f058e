#pragma once
#include <nanobind/nanobind.h>

namespace nm {

void add_capabilities(nanobind::module_& m);

}  // namespace nm
