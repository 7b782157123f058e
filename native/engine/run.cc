// Running a program: shapes from the inputs, tokens from the mask, then the steps in order.
#include <chrono>
#include <cstring>

#include "program.h"

namespace nm {
namespace {

template <class T>
void real_tokens(const T* mask, size_t batch, size_t length, Tokens& t) {
  for (size_t b = 0; b < batch; ++b) {
    for (size_t s = 0; s < length; ++s)
      if (mask[b * length + s] != 0) {
        t.sequence.push_back(static_cast<uint32_t>(b));
        t.position.push_back(static_cast<uint32_t>(s));
      }
    t.starts.push_back(static_cast<uint32_t>(t.position.size()));
  }
  t.count = t.position.size();
}

Tokens all_tokens(size_t batch, size_t length) {
  Tokens t;
  t.count = batch * length;
  t.sequence.resize(t.count);
  t.position.resize(t.count);
  t.starts.push_back(0);
  for (size_t b = 0, i = 0; b < batch; ++b) {
    for (size_t s = 0; s < length; ++s, ++i) {
      t.sequence[i] = static_cast<uint32_t>(b);
      t.position[i] = static_cast<uint32_t>(s);
    }
    t.starts.push_back(static_cast<uint32_t>(i));
  }
  return t;
}

Tokens masked_tokens(const Array& mask, size_t batch, size_t length) {
  check_array("mask", mask, {DType::kI64, DType::kI32, DType::kBool, DType::kF32}, {batch, length});
  Tokens t;
  t.starts.push_back(0);
  switch (mask.dtype) {
    case DType::kI64: real_tokens(mask.as<int64_t>(), batch, length, t); break;
    case DType::kI32: real_tokens(mask.as<int32_t>(), batch, length, t); break;
    case DType::kF32: real_tokens(mask.as<float>(), batch, length, t); break;
    default: real_tokens(mask.as<uint8_t>(), batch, length, t); break;
  }
  return t;
}

}  // namespace

std::vector<Output> Program::run(const std::vector<Array>& inputs, const Array* mask,
                                 std::vector<uint64_t>* nanoseconds) {
  check(prepared_, "run:", "call prepare() first");
  check(inputs.size() == slots_.size(), "inputs",
        "must be " + std::to_string(slots_.size()) + " arrays, not " + std::to_string(inputs.size()));
  size_t batch = 0, length = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& s = slots_[i];
    const std::string name = "input slot " + std::to_string(i);
    size_t here = 0;
    if (s.kind == Slot::kIds) {
      check_array(name.c_str(), inputs[i], {DType::kI64, DType::kI32}, {kAnySize, kAnySize});
      here = inputs[i].shape[1];
    } else if (s.kind == Slot::kFeatures) {
      check_array(name.c_str(), inputs[i], {DType::kF32}, {kAnySize, kAnySize, s.rows});
      here = inputs[i].shape[1];
    } else {
      check_array(name.c_str(), inputs[i], {DType::kF32}, {kAnySize, s.channels, kAnySize, kAnySize});
      const size_t h = inputs[i].shape[2], w = inputs[i].shape[3];
      check(h % s.height == 0 && w % s.width == 0, name.c_str(),
            "has images of " + std::to_string(h) + "x" + std::to_string(w) + ", not a multiple of the patch " +
                std::to_string(s.height) + "x" + std::to_string(s.width));
      here = (h / s.height) * (w / s.width);
    }
    if (i == 0) batch = inputs[i].shape[0], length = here;
    check(inputs[i].shape[0] == batch && here == length, name.c_str(),
          "has " + std::to_string(inputs[i].shape[0]) + " sequences of " + std::to_string(here) +
              " tokens, but input slot 0 has " + std::to_string(batch) + " of " + std::to_string(length));
  }
  check(batch < (1u << 28) && length < (1u << 28) && batch * (length + 1) < (1u << 28), "inputs",
        "hold more than 2^28 tokens");
  check(!(mask && uses_class_token_), "mask", "cannot be used in a program with a class token (geometry tokens1)");

  PoolLease pool(threads_);
  std::vector<Output> results(outputs_.size());
  Run run{*this, kernels_, pool, inputs, results};
  run.batch = batch;
  run.length = length;
  run.tokens[0] = mask ? masked_tokens(*mask, batch, length) : all_tokens(batch, length);
  run.tokens[1] = all_tokens(batch, 1);
  if (uses_class_token_) run.tokens[2] = all_tokens(batch, length + 1);
  size_t key[kGeometries];
  for (int g = 0; g < kGeometries; ++g) key[g] = lanes(run.tokens[g].count);
  const auto planned = plan(key);
  run.scratch_bytes = round_up(scratch_, 64);

  auto arena = take_arena(round_up(planned->bytes, 64) + run.scratch_bytes * pool.threads());
  run.base = arena->data;
  run.offsets = planned->offsets.data();
  run.scratch = arena->data + round_up(planned->bytes, 64);
  try {
    for (const Step& step : steps_) {
      const auto begin = std::chrono::steady_clock::now();
      step.run(run);
      if (nanoseconds)
        nanoseconds->push_back(static_cast<uint64_t>(
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count()));
    }
  } catch (...) {
    keep_arena(std::move(arena));
    throw;
  }
  keep_arena(std::move(arena));
  return results;
}

}  // namespace nm
