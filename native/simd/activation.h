// The activation functions the engine knows, in the order of their numbers.
#pragma once

namespace nm {
enum Activation { kNone, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu, kTanh, kSigmoid, kActivations };
constexpr int kGeluBytes = kActivations;  // GELU within 7e-5, for results that are rounded to steps of 4e-3 or more
}
