// Adding and running the linear steps.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "activation_table.h"
#include "pairs.h"
#include "program.h"

namespace nm {
namespace {

std::vector<float> padded(const Array* array, size_t count, float factor = 1.0f) {
  std::vector<float> out(round_up(count, 16), 0.0f);
  if (array)
    for (size_t i = 0; i < count; ++i) out[i] = array->as<float>()[i] * factor;
  return out;
}

// What a linear step keeps of its own: vectors padded to strips of 16 outputs.
struct Vectors {
  std::vector<int32_t> init;
  std::vector<float> scale, bias;
  std::unique_ptr<ActivationTable> table;
};

}  // namespace

// A weight where it is, and what follows from it alone.
struct PackedWeight {
  Weight weight;
  size_t outputs, groups;
  std::vector<uint16_t> columns;  // copies: what has been checked must not change behind our back
  std::vector<uint32_t> starts;
  std::vector<int32_t> sums;      // of each row, padded to strips
  std::vector<int8_t> values;     // for paired kernels; empty: those of the weight
  Rest rest;                      // what values lack, of a dense weight
  std::vector<size_t> shares;     // [strips + 1] maps equal shares of the strips to equal shares of their work
  double work = 0;                // multiply-adds per token, without those that pairs.h adds
};

namespace {

using Packed = PackedWeight;

// `cost` of each strip, beside a constant part for its epilogue.
void share_out(Packed& p, const std::vector<size_t>& cost, size_t epilogue) {
  size_t total = 0, strip = 0, passed = 0;
  for (size_t c : cost) total += c + epilogue;
  for (size_t i = 0; i <= cost.size(); ++i) {
    while (strip < cost.size() && passed * cost.size() < i * total) passed += cost[strip++] + epilogue;
    p.shares.push_back(i == cost.size() ? cost.size() : strip);
  }
}

void pack_dense(Packed& p, bool paired, size_t epilogue) {
  const size_t tiles = (p.outputs + 3) / 4;
  const int8_t* w = p.weight.values.as<int8_t>();
  for (size_t t = 0; t < tiles; ++t) {
    int32_t sums[16] = {};  // of each place in the tiles, which the compiler adds up in vectors
    for (size_t g = 0; g < p.groups; ++g, w += 16)
      for (size_t i = 0; i < 16; ++i) sums[i] += w[i];
    for (size_t i = 0; i < 16; ++i) p.sums[t * 4 + i / 4] += sums[i];
  }
  if (paired) p.rest = dense_pairs(p.weight.values.as<int8_t>(), tiles, p.groups, p.values);
  p.work = static_cast<double>(p.outputs) * p.groups * 4;
  share_out(p, std::vector<size_t>((p.outputs + 15) / 16, 1), epilogue);
}

// Blocks of rows x 4 inputs: four adjacent ones named by their group, or, gathered, each by itself.
void pack_blocks(Packed& p, bool gather, bool paired, size_t epilogue) {
  const size_t rows = p.weight.rows, each = gather ? 4 : 1, limit = gather ? p.groups * 4 : p.groups;
  const size_t block_rows = (p.outputs + rows - 1) / rows, blocks = p.weight.columns.shape[0];
  p.columns.assign(p.weight.columns.as<uint16_t>(), p.weight.columns.as<uint16_t>() + blocks * each);
  p.starts.assign(p.weight.starts.as<uint32_t>(), p.weight.starts.as<uint32_t>() + block_rows + 1);
  check(p.starts.front() == 0 && p.starts.back() == blocks, "linear: weight starts",
        "must run from 0 to the number of blocks, " + std::to_string(blocks));
  for (size_t i = 0; i < block_rows; ++i)
    if (p.starts[i] > p.starts[i + 1])
      fail("linear: weight starts must not fall, but do at row " + std::to_string(i));
  for (size_t i = 0; i < block_rows; ++i) {
    if (p.starts[i + 1] - p.starts[i] > p.groups)
      fail("linear: weight starts give row " + std::to_string(i) + " more blocks than there are groups of inputs");
    for (size_t c = p.starts[i] * each; c < p.starts[i + 1] * each; ++c)
      if (p.columns[c] >= limit)
        fail("linear: weight columns must lie below " + std::to_string(limit) + ", but block " +
             std::to_string(c / each) + " has " + std::to_string(p.columns[c]));
    int32_t sums[16] = {};
    const int8_t* w = p.weight.values.as<int8_t>() + p.starts[i] * rows * 4;
    for (size_t b = p.starts[i]; b < p.starts[i + 1]; ++b)
      for (size_t r = 0; r < rows; ++r, w += 4) sums[r] += w[0] + w[1] + w[2] + w[3];
    for (size_t r = 0; r < rows; ++r) p.sums[i * rows + r] = sums[r];
  }
  if (paired) block_pairs(p.weight.values.as<int8_t>(), rows * 4, each, p.values, p.columns, p.starts);
  std::vector<size_t> cost((p.outputs + 15) / 16, 0);
  for (size_t i = 0; i < block_rows; ++i) cost[i * rows / 16] += (p.starts[i + 1] - p.starts[i]) * rows;
  p.work = static_cast<double>(blocks) * rows * 4;
  share_out(p, cost, epilogue);
}

Form form_of(const Weight& weight) {
  check(weight.format == "dense" || weight.format == "blocks" || weight.format == "gather", "linear: weight format",
        "'" + weight.format + "' is unknown; choose dense, blocks or gather");
  return weight.format == "dense" ? Form::kDense : weight.format == "gather" ? Form::kGather : Form::kBlocks;
}

// The types and shapes of a weight's arrays.
void check_weight(Weight& weight, size_t outputs, size_t groups) {
  const Form form = form_of(weight);
  if (form == Form::kDense) {
    check_array("linear: weight values", weight.values, {DType::kI8}, {(outputs + 3) / 4, groups, 4, 4});
    weight.rows = 0;
    return;
  }
  const size_t rows = weight.rows;
  const bool gather = form == Form::kGather;
  bool known = false;
  std::string all;
  for (const LinearKernel& kernel : kLinearKernels) {
    if (weight.format != kernel.format) continue;
    known = known || rows == kernel.rows;
    all += (all.empty() ? "" : ", ") + std::to_string(kernel.rows);
  }
  check(known, "linear: weight rows", "must be one of " + all + ", not " + std::to_string(rows));
  if (gather) check_array("linear: weight columns", weight.columns, {DType::kU16}, {kAnySize, 4});
  else check_array("linear: weight columns", weight.columns, {DType::kU16}, {kAnySize});
  check_array("linear: weight values", weight.values, {DType::kI8}, {weight.columns.shape[0], rows, 4});
  check_array("linear: weight starts", weight.starts, {DType::kU32}, {(outputs + rows - 1) / rows + 1});
}

Packed pack_weight(Weight weight, size_t outputs, size_t groups, bool paired, const ScheduleCosts& costs) {
  Packed p;
  p.weight = std::move(weight), p.outputs = outputs, p.groups = groups;
  p.sums.assign(round_up(outputs, 16), 0);
  const Form form = form_of(p.weight);
  const auto epilogue = static_cast<size_t>(costs.strip_epilogue);
  if (form == Form::kDense) pack_dense(p, paired, epilogue);
  else pack_blocks(p, form == Form::kGather, paired, epilogue);
  return p;
}

// The arguments that follow from the weight alone.
LinearArgs arguments(const Packed& p, const std::vector<int32_t>& init) {
  LinearArgs a{};
  a.form = form_of(p.weight), a.groups = p.groups, a.outputs = p.outputs, a.rows = p.weight.rows;
  a.values = p.values.empty() ? p.weight.values.as<int8_t>() : p.values.data();
  a.columns = p.columns.data(), a.starts = p.starts.data();
  if (!p.rest.starts.empty()) {
    a.rest_values = p.rest.values.data(), a.rest_columns = p.rest.columns.data();
    a.rest_starts = p.rest.starts.data();
  }
  a.init = init.data();
  return a;
}

// The cheapest epilogue that can give this result, and scale and bias in its unit.
Epilogue choose_epilogue(Vectors& v, size_t outputs, size_t groups, Layout layout, int activation, bool residual,
                         Requant out) {
  if (layout == Layout::kF32) return Epilogue::kFloat;
  float unit = 1.0f;
  const bool plain = activation == kNone || activation == kRelu;
  if (!residual && !plain) v.table = activation_table(activation, out.scale, out.zero, &unit);
  if (residual || (!plain && !v.table)) return Epilogue::kGeneral;
  const float factor = unit / out.scale;
  const double most = 2.0 * 255 * 128 * 4 * static_cast<double>(groups);  // |init + sum|
  for (size_t n = 0; n < outputs; ++n) {                                   // int32 must hold what is rounded
    const double greatest = std::abs(v.scale[n] * factor) * most + std::abs(v.bias[n] * factor) + 256;
    if (!(greatest < 2e9)) return v.table.reset(), Epilogue::kGeneral;
  }
  for (size_t n = 0; n < outputs; ++n) {
    v.scale[n] *= factor;
    v.bias[n] = v.bias[n] * factor + (v.table ? 0.0f : static_cast<float>(out.zero));
  }
  return v.table ? Epilogue::kTable : Epilogue::kBytes;
}

}  // namespace

std::shared_ptr<const PackedWeight> Program::pack(Weight weight, size_t outputs, size_t groups) {
  check_weight(weight, outputs, groups);
  const size_t blocks = weight.rows ? weight.columns.shape[0] : 0;
  auto& packed = packed_[{weight.format, weight.rows, weight.values.data, weight.columns.data, weight.starts.data,
                          blocks, outputs, groups}];
  if (!packed) {
    copies("linear: weight", weight.columns.size() * 2 + weight.starts.size() * 4 + round_up(outputs, 16) * 5);
    const bool paired = kernels_.linear->paired;
    packed = std::make_shared<const PackedWeight>(pack_weight(std::move(weight), outputs, groups, paired, costs_));
    copies_here("linear: weight", packed->values.size() + packed->rest.values.size() +
                                      packed->rest.columns.size() * 2 + packed->rest.starts.size() * 4);
  }
  return packed;
}

// [tiles][K][4]
std::shared_ptr<const std::vector<float>> Program::pack_float(const Array& weight, size_t outputs, size_t inputs) {
  auto& packed = packed_float_[{weight.data, outputs, inputs}];
  if (!packed) {
    const size_t size = (outputs + 3) / 4 * inputs * 4;
    copies("linear_float: weight", size * sizeof(float));
    auto made = std::make_shared<std::vector<float>>(size, 0.0f);
    for (size_t n = 0; n < outputs; ++n)
      for (size_t k = 0; k < inputs; ++k)
        (*made)[(n / 4 * inputs + k) * 4 + n % 4] = weight.as<float>()[n * inputs + k];
    packed = std::move(made);
  }
  return packed;
}

void Program::linear(int x, int y, Weight weight, const Array& w_scale, const Array* bias, Requant in,
                     const std::string& activation, int residual, Requant out) {
  const Buffer& from = input("linear: x", x, {Layout::kU8});
  const Buffer& to = output("linear: y", y, {Layout::kF32, Layout::kU8, Layout::kKeys, Layout::kValues});
  check(x != y, "linear: y", "must not be x");
  check(from.stream == to.stream, "linear: y", "must have the stream of x");
  check(from.rows <= kMostInputs, "linear: x", "has more than 65536 rows: their sum may not fit int32");
  check_array("linear: w_scale", w_scale, {DType::kF32}, {to.rows});
  if (bias) check_array("linear: bias", *bias, {DType::kF32}, {to.rows});
  check_scale("linear: x_scale", in.scale);
  check_zero("linear: x_zero_point", in.zero, Layout::kU8);
  check_scale("linear: y_scale", out.scale);
  check_zero("linear: y_zero_point", out.zero, to.layout == Layout::kU8 ? Layout::kU8 : Layout::kKeys);
  const int act = activation_number("linear: activation", activation);
  if (residual != -1) {
    const Buffer& r = input("linear: residual", residual, {Layout::kF32});
    check(r.rows == to.rows && r.stream == to.stream, "linear: residual", "must have the rows and the stream of y");
  }
  const auto p = pack(std::move(weight), to.rows, (from.rows + 3) / 4);
  copies("linear:", round_up(to.rows, 16) * (sizeof(int32_t) + 2 * sizeof(float)) + sizeof(ActivationTable));
  const auto v = std::make_shared<Vectors>();
  v->init.resize(p->sums.size());
  for (size_t n = 0; n < v->init.size(); ++n) v->init[n] = (kernels_.linear->offset - in.zero) * p->sums[n];
  v->scale = padded(&w_scale, to.rows, in.scale);
  v->bias = padded(bias, to.rows);
  LinearArgs common = arguments(*p, v->init);
  const Form form = common.form;
  common.activation = act;
  common.store = to.layout == Layout::kF32      ? Store::kFloat
                 : to.layout == Layout::kKeys   ? Store::kKeys
                 : to.layout == Layout::kValues ? Store::kValues
                                                : Store::kPacked;
  common.y_inverse = 1.0f / out.scale, common.y_zero = out.zero;
  common.y_low = to.layout == Layout::kU8 ? 0 : -128, common.y_high = to.layout == Layout::kU8 ? 255 : 127;
  common.epilogue = choose_epilogue(*v, p->outputs, p->groups, to.layout, act, residual != -1, out);
  common.scale = v->scale.data(), common.bias = v->bias.data();
  common.table = v->table.get();
  scratch_ = std::max(scratch_, linear_scratch(form, p->weight.rows, p->groups));

  std::string text = std::to_string(from.rows) + " -> " + std::to_string(to.rows) + " ";
  if (form == Form::kDense) text += "dense";
  else text += std::to_string(p->weight.rows) + (form == Form::kGather ? "x1 blocks, " : "x4 blocks, ") +
               std::to_string(std::lround(100.0 * p->work / (4.0 * static_cast<double>(to.rows * p->groups)))) + "%";
  if (act != kNone) text += ", " + activation;
  const double cost = p->work * costs_.linear_product + static_cast<double>(p->outputs) * costs_.linear_output;
  add("linear", text, from.stream, {x, residual}, {}, {y}, {cost, (p->outputs + 15) / 16, [=](const Work& work) {
    LinearArgs a = common;  // which points into v
    static_cast<void>(v);
    a.width = work.width(x);
    a.x = work.own<uint8_t>(x), a.y = work.own<uint8_t>(y);
    a.residual = residual == -1 ? nullptr : work.own<float>(residual);
    a.first = p->shares[work.first], a.last = p->shares[work.last];
    a.scratch = work.scratch;
    work.run.kernels.linear->run(a);
  }});
}

double time_products(const std::string& isa, Weight weight, size_t inputs, size_t outputs, size_t tokens,
                     size_t repeats) {
  check(inputs > 0 && inputs <= kMostInputs, "inputs", "must lie in 1..65536");
  check(outputs > 0 && outputs <= kMostInputs, "outputs", "must lie in 1..65536");
  check(tokens > 0 && tokens <= 65536, "tokens", "must lie in 1..65536");
  check_weight(weight, outputs, (inputs + 3) / 4);
  const Kernels& kernels = choose_kernels(isa);
  const Packed p = pack_weight(std::move(weight), outputs, (inputs + 3) / 4, kernels.linear->paired, ScheduleCosts());
  const std::vector<int32_t> init(p.sums.size(), 0);
  LinearArgs a = arguments(p, init);
  std::vector<uint8_t> x(p.groups * 4 * lanes(tokens) + 64, 1);
  std::vector<uint8_t> scratch(linear_scratch(a.form, a.rows, a.groups) + 64);
  const auto aligned = [](uint8_t* at) { return at + (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64; };
  a.scratch = aligned(scratch.data());
  a.epilogue = Epilogue::kSums, a.first = 0, a.last = (outputs + 15) / 16;
  double best = 1e9;
  for (size_t i = 0; i < std::max<size_t>(repeats, 1); ++i) {
    const auto begin = std::chrono::steady_clock::now();
    for (size_t panel = 0; panel < panels(tokens); ++panel) {
      a.x = aligned(x.data()) + panel * kPanelTokens * p.groups * 4, a.width = panel_width(tokens, panel);
      kernels.linear->run(a);
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

void Program::linear_float(int x, int y, const Array& weight, const Array* bias, const std::string& activation,
                           int residual) {
  const Buffer& from = input("linear_float: x", x, {Layout::kF32});
  const Buffer& to = output("linear_float: y", y, {Layout::kF32});
  check(x != y, "linear_float: y", "must not be x");
  check(from.stream == to.stream, "linear_float: y", "must have the stream of x");
  const size_t inputs = from.rows, outputs = to.rows, tiles = (outputs + 3) / 4;
  check_array("linear_float: weight", weight, {DType::kF32}, {outputs, inputs});
  if (bias) check_array("linear_float: bias", *bias, {DType::kF32}, {outputs});
  const int act = activation_number("linear_float: activation", activation);
  if (residual != -1) {
    const Buffer& r = input("linear_float: residual", residual, {Layout::kF32});
    check(r.rows == outputs && r.stream == to.stream, "linear_float: residual",
          "must have the rows and the stream of y");
  }
  const auto packed = pack_float(weight, outputs, inputs);
  copies("linear_float:", round_up(outputs, 16) * sizeof(float));
  auto summand = std::make_shared<std::vector<float>>(padded(bias, outputs));
  std::string text = std::to_string(inputs) + " -> " + std::to_string(outputs) + " float";
  if (act != kNone) text += ", " + activation;
  add("linear_float", text, from.stream, {x, residual}, {}, {y},
      {static_cast<double>(inputs) * outputs * costs_.linear_float_product, tiles, [=](const Work& work) {
    LinearFloatArgs a{};
    a.x = work.own<float>(x), a.y = work.own<float>(y);
    a.residual = residual == -1 ? nullptr : work.own<float>(residual);
    a.width = work.width(x), a.inputs = inputs, a.outputs = outputs;
    a.first = work.first, a.last = work.last;
    a.weight = packed->data(), a.bias = summand->data(), a.activation = act;
    work.run.kernels.linear_float->run(a);
  }});
}

}  // namespace nm
