// What a plan may ask for: the checks every step shares.
#include <cmath>
#include <stdexcept>

#include "program.h"

namespace nm {

const std::vector<std::string> kStepNames = {
    "embed",  "enter",        "patches",   "leave",           "first", "rest",   "prepend", "layer_norm", "quantize",
    "linear", "linear_float", "attention", "attention_float", "unary", "binary", "affine",  "add_positions"};
const std::vector<std::string> kLayoutNames = {"f32", "u8", "keys", "values"};              // as in enum Layout
const std::vector<std::string> kStreamKinds = {"input", "first", "rest", "prepended"};      // as in Stream::Kind
const std::vector<std::string> kActivationNames = {"none",       "relu", "gelu", "gelu_tanh",  // as in enum Activation
                                                   "quick_gelu", "silu", "tanh", "sigmoid"};

size_t number_of(const char* what, const std::string& name, const std::vector<std::string>& names) {
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return i;
    known += (i ? ", " : "") + names[i];
  }
  fail(std::string(what) + " '" + name.substr(0, 60) + "' is unknown; choose one of " + known);
}

void fail(const std::string& message) { throw std::invalid_argument(message); }

void check(bool ok, const char* what, const std::string& problem) {
  if (!ok) fail(std::string(what) + " " + problem);
}

std::string shape_text(const std::vector<size_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] == kAnySize ? std::string("any") : std::to_string(shape[i]));
  return text + "]";
}

namespace {
const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kF16: return "float16";
    case DType::kI8: return "int8";
    case DType::kU8: return "uint8";
    case DType::kU16: return "uint16";
    case DType::kU32: return "uint32";
    case DType::kI32: return "int32";
    case DType::kI64: return "int64";
    case DType::kBool: return "bool";
    default: return "another type";
  }
}
}  // namespace

void check_array(const char* what, const Array& array, std::initializer_list<DType> dtypes,
                 std::initializer_list<size_t> shape) {
  std::string wanted;
  bool ok = false;
  for (DType dtype : dtypes) {
    ok = ok || array.dtype == dtype;
    wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  check(ok, what, "must be " + wanted + ", not " + dtype_name(array.dtype));
  ok = array.shape.size() == shape.size();
  for (size_t i = 0; ok && i < array.shape.size(); ++i) {
    const size_t size = shape.begin()[i];
    ok = size == kAnySize || size == array.shape[i];
  }
  check(ok, what, "must have shape " + shape_text(shape) + ", not " + shape_text(array.shape));
}

void check_scale(const char* what, float scale) {
  check(std::isfinite(scale) && scale > 0 && std::isfinite(1.0f / scale), what,
        "must be finite and above zero, not " + std::to_string(scale));
}

void check_zero(const char* what, int32_t zero, Layout layout) {
  const int32_t low = layout == Layout::kU8 ? 0 : -128, high = layout == Layout::kU8 ? 255 : 127;
  check(zero >= low && zero <= high, what, "must lie in " + std::to_string(low) + ".." + std::to_string(high) +
                                               ", not " + std::to_string(zero));
}

int activation_number(const char* what, const std::string& name) {
  return static_cast<int>(number_of(what, name, kActivationNames));
}

}  // namespace nm
