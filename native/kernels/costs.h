// Which linear kernels there are, how many inputs they take, and what work costs. Python reads all of it from here
// (_native.capabilities()).
//
// The figures are defaults, fitted to tools/bench_kernels.py and to runs of plans on one core of an AMD EPYC (Zen 4,
// AVX512-VNNI), 128 tokens. Nothing but speed hangs on them: a table of times measured on the machine at hand goes
// before the model of kernels (backends/cpu/tuning.py), a program takes other figures when it is made, and measured
// times of its steps at any time (Program::measured).
#pragma once
#include <cstddef>
#include <cstring>

namespace nm {

// A linear kernel by its weight format and the outputs of a block. near, far: the share of the int8 peak that it
// reaches beside its epilogue, up to ChoiceCosts::near inputs and beyond, where a panel of tokens outgrows the first
// cache; to 6 % root mean square.
struct LinearKernel {
  const char* format;
  size_t rows;
  size_t most_inputs;
  double near, far;
};

// 255 * 128 * 65536 still fits an int32 sum. It is also what 16-bit columns can name, where they name single inputs.
constexpr size_t kMostInputs = 65536, kMostFloatInputs = 1 << 20;
constexpr size_t kGroupInputs = 4;  // that one dot-product instruction consumes
constexpr LinearKernel kLinearKernels[] = {
    {"dense", 0, kMostInputs, 0.97, 0.96},
    {"blocks", 1, kMostInputs, 0.67, 0.46},
    {"blocks", 2, kMostInputs, 0.92, 0.77},
    {"blocks", 4, kMostInputs, 0.97, 0.94},
    {"blocks", 8, kMostInputs, 0.96, 0.94},
    {"blocks", 16, kMostInputs, 0.95, 0.94},
    {"gather", 1, kMostInputs, 0.44, 0.36},
    {"gather", 2, kMostInputs, 0.71, 0.64},
    {"gather", 4, kMostInputs, 0.91, 0.90},
    {"float", 0, kMostFloatInputs, 0.23, 0.23},
};

// Beside the products, in products at the int8 peak per token: what formats of a layer are compared by.
struct ChoiceCosts {
  double near = 1024;       // inputs, see LinearKernel
  double epilogue = 17.0;   // of an output: scaling and storing
  double spreading = 8.0;   // of an input: "gather" lays each out by itself
  double last_quad = 1.5;   // of an output of "gather": what is empty in the last quad of its group, on average
  double quantizing = 21.0; // of an input: the quantize step
};

// What the schedule counts with: name, default, what it is the cost of. Nanoseconds of one core per token, where
// nothing else is said.
#define NM_SCHEDULE_COSTS(row)                                                                \
  row(linear_product, 1.0 / 200, "a product of linear")                                       \
  row(linear_output, 0.03, "an output of linear")                                             \
  row(linear_float_product, 1.0 / 50, "a product of linear_float")                            \
  row(attention_product, 0.01, "a row of a key, for attention")                               \
  row(attention_float_product, 0.06, "a row of a key, for attention_float")                   \
  row(attention_keys, 128, "no time: the keys that a query is taken to see")                  \
  row(layer_norm, 0.06, "a row")                                                              \
  row(quantize, 0.03, "a row")                                                                \
  row(affine, 0.03, "a row")                                                                  \
  row(unary, 0.4, "a row")                                                                    \
  row(binary, 0.1, "a row")                                                                   \
  row(embed, 0.15, "a row")                                                                   \
  row(enter, 0.4, "a row")                                                                    \
  row(leave, 0.4, "a row")                                                                    \
  row(first, 0.4, "a row")                                                                    \
  row(rest, 0.4, "a row")                                                                     \
  row(prepend, 0.4, "a row")                                                                  \
  row(add_positions, 0.4, "a row")                                                            \
  row(patches, 0.8, "a row")                                                                  \
  row(barrier, 150, "nanoseconds until a team knows that all have come")                      \
  row(barrier_member, 40, "the same, for each of them")                                       \
  row(wake, 20e3, "nanoseconds until other threads work at all: sleeping ones take some 50 us, spinning ones none") \
  row(strip_epilogue, 128, "multiply-adds that the epilogue of 16 outputs counts as where they are shared out")

struct ScheduleCosts {
#define NM_FIELD(name, value, meaning) double name = value;
  NM_SCHEDULE_COSTS(NM_FIELD)
#undef NM_FIELD
};

// The figure of this name, null where there is none.
inline double* figure(ScheduleCosts& costs, const char* name) {
#define NM_FIGURE(field, value, meaning) \
  if (std::strcmp(name, #field) == 0) return &costs.field;
  NM_SCHEDULE_COSTS(NM_FIGURE)
#undef NM_FIGURE
  return nullptr;
}

}  // namespace nm
