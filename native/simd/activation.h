// The activation functions the engine knows, in the order of their numbers.
#pragma once

namespace nm {
enum Activation { kNone, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu, kTanh, kSigmoid, kActivations };
}
