// The instruction sets the engine has kernels for.
#pragma once
#include <string>
#include <vector>

#include "../kernels/attention/attention.h"
#include "../kernels/io/io.h"
#include "../kernels/linear/linear.h"
#include "../kernels/linear_float/linear_float.h"
#include "../kernels/rows/rows.h"

namespace nm {

struct Kernels {
  const char* isa;
  bool (*supported)();
  const LinearKernels* linear;
  const LinearFloatKernels* linear_float;
  const AttentionKernels* attention;
  const RowsKernels* rows;
  const IoKernels* io;
};

std::vector<std::string> cpu_features();
std::vector<std::string> available_isas();  // best first; "scalar" is always last
// isa "" is the environment's NMCOMPILE_ISA, or the best. Throws std::invalid_argument.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace nm
