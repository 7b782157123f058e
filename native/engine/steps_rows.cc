// Adding and running the steps of kernels/rows: normalise, quantize, elementwise.
#include <cmath>

#include "program.h"

namespace nm {
namespace {

void check_same(const char* what, const Buffer& a, const Buffer& b) {
  check(a.rows == b.rows && a.stream == b.stream, what, "must have the rows and the stream of x");
}

// The columns of a share, handed to `kernel`.
void columns(const Work& work, int x, int y, int q, void (*kernel)(const PanelArgs&), const PanelArgs& common) {
  PanelArgs a = common;
  a.width = work.width(x);
  a.lanes = (work.last - work.first) * 16;
  const size_t lane = work.first * 16;
  a.x = work.own<float>(x) + lane;
  a.y = y >= 0 ? work.own<float>(y) + lane : nullptr;
  a.q = q >= 0 ? work.own<uint8_t>(q) + lane * 4 : nullptr;
  kernel(a);
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
  copies("layer_norm:", 2 * rows * sizeof(float));
  const Array g = gamma, b = beta ? *beta : Array();
  // q in steps of its scale from what is normalised, gamma and beta included
  auto factor = std::make_shared<std::vector<float>>(rows), summand = std::make_shared<std::vector<float>>(rows);
  for (size_t r = 0; r < rows; ++r) {
    const float m = q_mul ? q_mul->as<float>()[r] : 1.0f, s = q_add ? q_add->as<float>()[r] : 0.0f;
    const float below = beta ? beta->as<float>()[r] : 0.0f;
    (*factor)[r] = gamma.as<float>()[r] * m / out.scale;
    (*summand)[r] = (below * m + s) / out.scale + static_cast<float>(out.zero);
  }
  add("layer_norm", std::string(rms ? "rms " : "") + std::to_string(rows), in.stream, {x}, {}, {y, q},
      {costs_.layer_norm * rows, 0, [=](const Work& work) {
    PanelArgs a{};
    a.rows = rows, a.gamma = g.as<float>(), a.beta = b.as<float>();
    a.q_mul = factor->data(), a.q_add = summand->data();
    a.eps = eps, a.rms = rms;
    columns(work, x, y, q, work.run.kernels.rows->norm, a);
  }});
}

void Program::quantize(int x, int y, Requant out) {
  const Buffer& in = input("quantize: x", x, {Layout::kF32});
  check_same("quantize: y", output("quantize: y", y, {Layout::kU8}), in);
  check_scale("quantize: scale", out.scale);
  check_zero("quantize: zero_point", out.zero, Layout::kU8);
  const size_t rows = in.rows;
  add("quantize", std::to_string(rows), in.stream, {x}, {}, {y}, {costs_.quantize * rows, 0, [=](const Work& work) {
    PanelArgs a{};
    a.rows = rows, a.inverse = 1.0f / out.scale, a.zero = out.zero;
    columns(work, x, -1, y, work.run.kernels.rows->quantize, a);
  }});
}

void Program::affine(int x, int y, const Array* mul, const Array* summand) {
  const Buffer& in = input("affine: x", x, {Layout::kF32});
  check_same("affine: y", output("affine: y", y, {Layout::kF32}), in);
  if (mul) check_array("affine: mul", *mul, {DType::kF32}, {in.rows});
  if (summand) check_array("affine: add", *summand, {DType::kF32}, {in.rows});
  const size_t rows = in.rows;
  const Array m = mul ? *mul : Array(), s = summand ? *summand : Array();
  add("affine", std::to_string(rows), in.stream, {x}, {}, {y}, {costs_.affine * rows, 0, [=](const Work& work) {
    PanelArgs a{};
    a.rows = rows, a.gamma = m.as<float>(), a.beta = s.as<float>();
    columns(work, x, y, -1, work.run.kernels.rows->affine, a);
  }});
}

void Program::unary(int x, int y, const std::string& op) {
  const Buffer& in = input("unary: x", x, {Layout::kF32});
  check_same("unary: y", output("unary: y", y, {Layout::kF32}), in);
  const int number = activation_number("unary: op", op);
  const size_t rows = in.rows;
  add("unary", op + " " + std::to_string(rows), in.stream, {x}, {}, {y},
      {costs_.unary * rows, rows, [=](const Work& work) {
    const size_t width = work.width(x), at = work.first * width;
    work.run.kernels.rows->unary({work.own<float>(x) + at, nullptr, work.own<float>(y) + at,
                                  (work.last - work.first) * width, number});
  }});
}

void Program::binary(int a, int b, int y, const std::string& op) {
  const Buffer& left = input("binary: a", a, {Layout::kF32});
  check_same("binary: b", input("binary: b", b, {Layout::kF32}), left);
  check_same("binary: y", output("binary: y", y, {Layout::kF32}), left);
  check(op == "add" || op == "sub" || op == "mul", "binary: op",
        "'" + op + "' is unknown; choose one of add, sub, mul");
  const int number = op == "add" ? kAdd : op == "sub" ? kSub : kMul;
  const size_t rows = left.rows;
  add("binary", op + " " + std::to_string(rows), left.stream, {a, b}, {}, {y},
      {costs_.binary * rows, rows, [=](const Work& work) {
    const size_t width = work.width(a), at = work.first * width;
    work.run.kernels.rows->binary({work.own<float>(a) + at, work.own<float>(b) + at, work.own<float>(y) + at,
                                   (work.last - work.first) * width, number});
  }});
}

}  // namespace nm
