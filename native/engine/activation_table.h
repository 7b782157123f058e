#pragma once
#include <memory>

#include "../kernels/linear/table.h"

namespace nm {

// The table of an activation for results of this scale, zero point and range, and its `unit`: parts of a step of y.
// Null where the activation has no such form or a table would be off by more than 0.15 steps.
std::unique_ptr<ActivationTable> activation_table(int activation, float y_scale, int32_t y_zero, float* unit);

}  // namespace nm
