// Adding and running the steps of kernels/rows: normalise, quantize, elementwise.
#include <cmath>

#include "program.h"

namespace nm {
namespace {

void check_same(const char* what, const Buffer& a, const Buffer& b) {
  check(a.rows == b.rows && a.geometry == b.geometry, what, "must have the rows and the geometry of x");
}

// One PanelArgs per panel and thread, handed to `kernel`.
void each_panel(const Run& run, int x, int y, int q, double work, void (*kernel)(const PanelArgs&),
                const PanelArgs& common) {
  const Tokens& t = run.of(x);
  run.each_column(t, work, [&](size_t p, size_t lane, size_t count) {
    PanelArgs a = common;
    a.width = panel_width(t.count, p);
    a.lanes = count;
    a.x = run.panel<float>(x, p) + lane;
    a.y = y >= 0 ? run.panel<float>(y, p) + lane : nullptr;
    a.q = q >= 0 ? run.panel<uint8_t>(q, p) + lane * 4 : nullptr;
    kernel(a);
  });
}

}  // namespace

void Program::layer_norm(int x, const Array& gamma, const Array* beta, float eps, bool rms, int y, int q, Requant out,
                         const Array* q_mul, const Array* q_add) {
  const Buffer& in = input("layer_norm: x", x, {Layout::kF32});
  check_array("layer_norm: gamma", gamma, {DType::kF32}, {in.rows});
  if (beta) check_array("layer_norm: beta", *beta, {DType::kF32}, {in.rows});
  if (q_mul) check_array("layer_norm: q_mul", *q_mul, {DType::kF32}, {in.rows});
  if (q_add) check_array("layer_norm: q_add", *q_add, {DType::kF32}, {in.rows});
  check(std::isfinite(eps) && eps >= 0, "layer_norm: eps", "must be finite and not negative");
  check(y != -1 || q != -1, "layer_norm:", "needs y or q");
  if (y != -1) check_same("layer_norm: y", output("layer_norm: y", y, {Layout::kF32}), in);
  if (q != -1) check_same("layer_norm: q", output("layer_norm: q", q, {Layout::kU8}), in);
  check_scale("layer_norm: scale", out.scale);
  check_zero("layer_norm: zero_point", out.zero, Layout::kU8);
  const size_t rows = in.rows;
  const Array g = gamma, b = beta ? *beta : Array();
  const Array m = q_mul ? *q_mul : Array(), s = q_add ? *q_add : Array();
  add("layer_norm", std::string(rms ? "rms " : "") + std::to_string(rows), {x}, {y, q}, [=](Run& run) {
    PanelArgs a{};
    a.rows = rows, a.gamma = g.as<float>(), a.beta = b.as<float>();
    a.q_mul = m.as<float>(), a.q_add = s.as<float>();
    a.eps = eps, a.rms = rms, a.inverse = 1.0f / out.scale, a.zero = out.zero;
    each_panel(run, x, y, q, 0.2 * rows * run.of(x).count, run.kernels.rows->norm, a);
  });
}

void Program::quantize(int x, int y, Requant out) {
  const Buffer& in = input("quantize: x", x, {Layout::kF32});
  check_same("quantize: y", output("quantize: y", y, {Layout::kU8}), in);
  check_scale("quantize: scale", out.scale);
  check_zero("quantize: zero_point", out.zero, Layout::kU8);
  const size_t rows = in.rows;
  add("quantize", std::to_string(rows), {x}, {y}, [=](Run& run) {
    PanelArgs a{};
    a.rows = rows, a.inverse = 1.0f / out.scale, a.zero = out.zero;
    each_panel(run, x, -1, y, 0.1 * rows * run.of(x).count, run.kernels.rows->quantize, a);
  });
}

void Program::affine(int x, int y, const Array* mul, const Array* summand) {
  const Buffer& in = input("affine: x", x, {Layout::kF32});
  check_same("affine: y", output("affine: y", y, {Layout::kF32}), in);
  if (mul) check_array("affine: mul", *mul, {DType::kF32}, {in.rows});
  if (summand) check_array("affine: add", *summand, {DType::kF32}, {in.rows});
  const size_t rows = in.rows;
  const Array m = mul ? *mul : Array(), s = summand ? *summand : Array();
  add("affine", std::to_string(rows), {x}, {y}, [=](Run& run) {
    PanelArgs a{};
    a.rows = rows, a.gamma = m.as<float>(), a.beta = s.as<float>();
    each_panel(run, x, y, -1, 0.1 * rows * run.of(x).count, run.kernels.rows->affine, a);
  });
}

void Program::unary(int x, int y, const std::string& op) {
  const Buffer& in = input("unary: x", x, {Layout::kF32});
  check_same("unary: y", output("unary: y", y, {Layout::kF32}), in);
  const int number = activation_number("unary: op", op);
  const size_t rows = in.rows;
  add("unary", op + " " + std::to_string(rows), {x}, {y}, [=](Run& run) {
    const size_t units = rows * lanes(run.of(x).count) / 16;  // f32 buffers have no gaps between panels
    run.parallel(units, 8.0 * units, [&](size_t first, size_t last, size_t) {
      run.kernels.rows->unary({run.panel<float>(x, 0) + first * 16, nullptr, run.panel<float>(y, 0) + first * 16,
                               (last - first) * 16, number});
    });
  });
}

void Program::binary(int a, int b, int y, const std::string& op) {
  const Buffer& left = input("binary: a", a, {Layout::kF32});
  check_same("binary: b", input("binary: b", b, {Layout::kF32}), left);
  check_same("binary: y", output("binary: y", y, {Layout::kF32}), left);
  check(op == "add" || op == "sub" || op == "mul", "binary: op",
        "'" + op + "' is unknown; choose one of add, sub, mul");
  const int number = op == "add" ? kAdd : op == "sub" ? kSub : kMul;
  const size_t rows = left.rows;
  add("binary", op + " " + std::to_string(rows), {a, b}, {y}, [=](Run& run) {
    const size_t units = rows * lanes(run.of(a).count) / 16;
    run.parallel(units, 3.0 * units, [&](size_t first, size_t last, size_t) {
      run.kernels.rows->binary({run.panel<float>(a, 0) + first * 16, run.panel<float>(b, 0) + first * 16,
                                run.panel<float>(y, 0) + first * 16, (last - first) * 16, number});
    });
  });
}

}  // namespace nm
