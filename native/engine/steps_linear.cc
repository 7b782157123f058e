// Adding and running the linear steps.
#include <cmath>
#include <cstring>

#include "program.h"

namespace nm {
namespace {

constexpr size_t kMostInputs = 65536;  // 255 * 128 * 65536 fits int32

std::vector<float> padded(const Array* array, size_t count, float factor = 1.0f) {
  std::vector<float> out(round_up(count, 16), 0.0f);
  if (array)
    for (size_t i = 0; i < count; ++i) out[i] = array->as<float>()[i] * factor;
  return out;
}

// What a linear step keeps: the weight where it is, its vectors padded to strips of 16 outputs.
struct Packed {
  Weight weight;
  size_t outputs, groups;
  std::vector<uint16_t> columns;  // copies: what has been checked must not change behind our back
  std::vector<uint32_t> starts;
  std::vector<int32_t> init;
  std::vector<float> scale, bias;
  std::vector<size_t> shares;     // [strips + 1] maps equal shares of the strips to equal shares of their work
  double work = 0;                // multiply-adds per token
};

// `cost` of each strip, beside a constant part for its epilogue.
void share_out(Packed& p, const std::vector<size_t>& cost) {
  constexpr size_t kEpilogue = 128;
  size_t total = 0, strip = 0, passed = 0;
  for (size_t c : cost) total += c + kEpilogue;
  for (size_t i = 0; i <= cost.size(); ++i) {
    while (strip < cost.size() && passed * cost.size() < i * total) passed += cost[strip++] + kEpilogue;
    p.shares.push_back(i == cost.size() ? cost.size() : strip);
  }
}

void pack_dense(Packed& p, int32_t zero) {
  const size_t tiles = (p.outputs + 3) / 4;
  check_array("linear: weight values", p.weight.values, {DType::kI8}, {tiles, p.groups, 4, 4});
  const int8_t* w = p.weight.values.as<int8_t>();
  for (size_t t = 0; t < tiles; ++t)
    for (size_t g = 0; g < p.groups; ++g)
      for (size_t r = 0; r < 4; ++r, w += 4)
        p.init[t * 4 + r] -= zero * (w[0] + w[1] + w[2] + w[3]);
  p.work = static_cast<double>(p.outputs) * p.groups * 4;
  share_out(p, std::vector<size_t>((p.outputs + 15) / 16, 1));
}

void pack_blocks(Packed& p, int32_t zero) {
  const size_t rows = p.weight.rows;
  check(rows == 1 || rows == 2 || rows == 4 || rows == 8 || rows == 16, "linear: weight rows",
        "must be 1, 2, 4, 8 or 16, not " + std::to_string(rows));
  const size_t block_rows = (p.outputs + rows - 1) / rows;
  check_array("linear: weight columns", p.weight.columns, {DType::kU16}, {kAnySize});
  const size_t blocks = p.weight.columns.shape[0];
  check_array("linear: weight values", p.weight.values, {DType::kI8}, {blocks, rows, 4});
  check_array("linear: weight starts", p.weight.starts, {DType::kU32}, {block_rows + 1});
  p.columns.assign(p.weight.columns.as<uint16_t>(), p.weight.columns.as<uint16_t>() + blocks);
  p.starts.assign(p.weight.starts.as<uint32_t>(), p.weight.starts.as<uint32_t>() + block_rows + 1);
  check(p.starts.front() == 0 && p.starts.back() == blocks, "linear: weight starts",
        "must run from 0 to the number of blocks, " + std::to_string(blocks));
  for (size_t i = 0; i < block_rows; ++i)
    check(p.starts[i] <= p.starts[i + 1], "linear: weight starts",
          "must not fall, but does at row " + std::to_string(i));
  std::vector<size_t> cost((p.outputs + 15) / 16, 0);
  for (size_t i = 0; i < block_rows; ++i) {
    cost[i * rows / 16] += (p.starts[i + 1] - p.starts[i]) * rows;
    check(p.starts[i + 1] - p.starts[i] <= p.groups, "linear: weight starts",
          "give row " + std::to_string(i) + " more blocks than there are groups of inputs");
    for (size_t b = p.starts[i]; b < p.starts[i + 1]; ++b) {
      check(p.columns[b] < p.groups, "linear: weight columns",
            "must lie below " + std::to_string(p.groups) + ", but block " + std::to_string(b) + " has " +
                std::to_string(p.columns[b]));
      const int8_t* w = p.weight.values.as<int8_t>() + b * rows * 4;
      for (size_t r = 0; r < rows; ++r, w += 4)
        p.init[i * rows + r] -= zero * (w[0] + w[1] + w[2] + w[3]);
    }
  }
  p.work = static_cast<double>(blocks) * rows * 4;
  share_out(p, cost);
}

}  // namespace

void Program::linear(int x, int y, Weight weight, const Array& w_scale, const Array* bias, Requant in,
                     const std::string& activation, int residual, Requant out) {
  const Buffer& from = input("linear: x", x, {Layout::kU8});
  const Buffer& to = output("linear: y", y, {Layout::kF32, Layout::kU8, Layout::kS8, Layout::kS8Rows});
  check(x != y, "linear: y", "must not be x");
  check(from.geometry == to.geometry, "linear: y", "must have the geometry of x");
  check(from.rows <= kMostInputs, "linear: x", "has more than 65536 rows: their sum may not fit int32");
  auto p = std::make_shared<Packed>();
  p->outputs = to.rows;
  p->groups = (from.rows + 3) / 4;
  check_array("linear: w_scale", w_scale, {DType::kF32}, {to.rows});
  if (bias) check_array("linear: bias", *bias, {DType::kF32}, {to.rows});
  check_scale("linear: x_scale", in.scale);
  check_zero("linear: x_zero_point", in.zero, Layout::kU8);
  check_scale("linear: y_scale", out.scale);
  check_zero("linear: y_zero_point", out.zero, to.layout == Layout::kU8 ? Layout::kU8 : Layout::kS8);
  const int act = activation_number("linear: activation", activation);
  if (residual != -1) {
    const Buffer& r = input("linear: residual", residual, {Layout::kF32});
    check(r.rows == to.rows && r.geometry == to.geometry, "linear: residual", "must have the rows and geometry of y");
  }
  p->weight = std::move(weight);
  p->scale = padded(&w_scale, to.rows, in.scale);
  p->bias = padded(bias, to.rows);
  p->init.assign(round_up(to.rows, 16), 0);
  const bool dense = p->weight.format == "dense";
  check(dense || p->weight.format == "blocks", "linear: weight format",
        "'" + p->weight.format + "' is unknown; choose dense or blocks");
  if (dense) p->weight.rows = 0, pack_dense(*p, in.zero);
  else pack_blocks(*p, in.zero);

  LinearArgs common{};
  common.groups = p->groups, common.outputs = p->outputs, common.rows = p->weight.rows;
  common.values = p->weight.values.as<int8_t>(), common.columns = p->columns.data(), common.starts = p->starts.data();
  common.init = p->init.data(), common.scale = p->scale.data(), common.bias = p->bias.data();
  common.activation = act == kGelu && to.layout != Layout::kF32 && out.scale >= 4e-3f ? kGeluBytes : act;
  common.store = to.layout == Layout::kF32     ? Store::kFloat
                 : to.layout == Layout::kS8Rows ? Store::kRows
                                                : Store::kPacked;
  common.y_inverse = 1.0f / out.scale, common.y_zero = out.zero;
  common.y_low = to.layout == Layout::kU8 ? 0 : -128, common.y_high = to.layout == Layout::kU8 ? 255 : 127;

  std::string text = std::to_string(from.rows) + " -> " + std::to_string(to.rows) + " ";
  if (dense) text += "dense";
  else text += std::to_string(p->weight.rows) + "x4 blocks, " +
               std::to_string(static_cast<int>(std::lround(100.0 * p->columns.size() * p->weight.rows /
                                                           (static_cast<double>(to.rows) * p->groups)))) + "%";
  if (act != kNone) text += ", " + activation;
  add("linear", text, {x, residual}, {y}, [=](Run& run) {
    const Tokens& t = run.of(x);
    const size_t strips = (p->outputs + 15) / 16, count = panels(t.count);
    const auto range = [&](size_t panel, size_t first, size_t last) {
      LinearArgs a = common;
      a.width = panel_width(t.count, panel);
      a.x = run.panel<uint8_t>(x, panel);
      a.y = run.panel<uint8_t>(y, panel);
      a.residual = residual == -1 ? nullptr : run.panel<float>(residual, panel);
      a.first = first, a.last = last;
      run.kernels.linear->run(a);
    };
    const double work = (p->work / 200 + p->outputs * 0.1) * lanes(t.count);
    // Strips are shared out, so that a thread meets its weights once per panel and they stay in its cache.
    if (strips >= run.pool.threads() || count <= 1) {
      run.parallel(strips, work, [&](size_t first, size_t last, size_t) {
        for (size_t panel = 0; panel < count; ++panel) range(panel, p->shares[first], p->shares[last]);
      });
    } else {
      run.parallel(strips * count, work, [&](size_t first, size_t last, size_t) {
        for (size_t unit = first; unit < last; ++unit) range(unit % count, unit / count, unit / count + 1);
      });
    }
  });
}

void Program::linear_float(int x, int y, const Array& weight, const Array* bias, const std::string& activation,
                           int residual) {
  const Buffer& from = input("linear_float: x", x, {Layout::kF32});
  const Buffer& to = output("linear_float: y", y, {Layout::kF32});
  check(x != y, "linear_float: y", "must not be x");
  check(from.geometry == to.geometry, "linear_float: y", "must have the geometry of x");
  const size_t inputs = from.rows, outputs = to.rows, tiles = (outputs + 3) / 4;
  check_array("linear_float: weight", weight, {DType::kF32}, {outputs, inputs});
  if (bias) check_array("linear_float: bias", *bias, {DType::kF32}, {outputs});
  const int act = activation_number("linear_float: activation", activation);
  if (residual != -1) {
    const Buffer& r = input("linear_float: residual", residual, {Layout::kF32});
    check(r.rows == outputs && r.geometry == to.geometry, "linear_float: residual",
          "must have the rows and geometry of y");
  }
  auto packed = std::make_shared<std::vector<float>>(tiles * inputs * 4, 0.0f);  // [tiles][K][4]
  for (size_t n = 0; n < outputs; ++n)
    for (size_t k = 0; k < inputs; ++k)
      (*packed)[(n / 4 * inputs + k) * 4 + n % 4] = weight.as<float>()[n * inputs + k];
  auto summand = std::make_shared<std::vector<float>>(padded(bias, outputs));
  std::string text = std::to_string(inputs) + " -> " + std::to_string(outputs) + " float";
  if (act != kNone) text += ", " + activation;
  add("linear_float", text, {x, residual}, {y}, [=](Run& run) {
    const Tokens& t = run.of(x);
    const size_t count = panels(t.count);
    const double work = static_cast<double>(inputs) * outputs * lanes(t.count) / 50;
    run.parallel(tiles * count, work, [&](size_t first, size_t last, size_t) {
      for (size_t unit = first; unit < last;) {  // a unit is a tile of a panel, panels slowest
        const size_t panel = unit / tiles, end = last < (panel + 1) * tiles ? last : (panel + 1) * tiles;
        LinearFloatArgs a{};
        a.x = run.panel<float>(x, panel), a.y = run.panel<float>(y, panel);
        a.residual = residual == -1 ? nullptr : run.panel<float>(residual, panel);
        a.width = panel_width(t.count, panel), a.inputs = inputs, a.outputs = outputs;
        a.first = unit - panel * tiles, a.last = end - panel * tiles;
        a.weight = packed->data(), a.bias = summand->data(), a.activation = act;
        run.kernels.linear_float->run(a);
        unit = end;
      }
    });
  });
}

}  // namespace nm
