// Running a program: shapes from the inputs, tokens from the mask, then the steps in order.
#include <atomic>
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

// The threads of one run: each goes through the phases, takes its turns, and waits where others' work is needed.
class Execution {
 public:
  Execution(const Run& run, const Forecast& forecast, uint8_t* slabs, uint8_t* scratch, size_t slab_bytes,
            size_t scratch_bytes, bool traced)
      : run_(run), forecast_(forecast), slabs_(slabs), scratch_(scratch), slab_bytes_(slab_bytes),
        scratch_bytes_(scratch_bytes), traced_(traced), barriers_(forecast.threads + 1), events_(forecast.threads) {}

  void thread(size_t me) {
    const size_t threads = forecast_.threads;
    for (size_t i = 0; i < run_.program.phases_.size(); ++i) {
      const Phase& phase = run_.program.phases_[i];
      bool fresh = true;
      for (const Turn& turn : forecast_.turns[i]) {
        if (me < turn.leader || me >= turn.leader + turn.members) continue;
        if (!fresh) barriers_[turn.leader].wait(turn.members);  // the leader's slab is in use until it comes
        fresh = false;
        for (size_t p = turn.first; p < turn.last; ++p) take(phase, turn, p, me);
      }
      barriers_[threads].wait(threads);
    }
  }

  std::vector<Event> events() const {
    std::vector<Event> all;
    for (const auto& list : events_) all.insert(all.end(), list.begin(), list.end());
    return all;
  }

 private:
  struct alignas(64) Barrier {
    std::atomic<uint32_t> arrived{0}, passed{0};

    void wait(size_t members) {
      if (members < 2) return;
      const uint32_t before = passed.load(std::memory_order_relaxed);
      if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
        arrived.store(0, std::memory_order_relaxed);
        passed.store(before + 1, std::memory_order_release);
        return;
      }
      for (int spins = 0; passed.load(std::memory_order_acquire) == before; ++spins) relax(spins);
    }
  };

  void take(const Phase& phase, const Turn& turn, size_t panel, size_t me) {
    Work work{run_, panel, 0, 0, slabs_ + turn.leader * slab_bytes_, scratch_ + me * scratch_bytes_};
    const size_t columns = panel_width(run_.tokens[static_cast<int>(phase.geometry)].count, panel) / 16;
    for (size_t s = phase.first; s < phase.last; ++s) {
      const Body& body = run_.program.steps_[s].body;
      const size_t units = body.units ? body.units : columns, member = me - turn.leader;
      work.first = units * member / turn.members, work.last = units * (member + 1) / turn.members;
      if (work.first < work.last) {
        const int64_t begin = traced_ ? now() : 0;
        body.work(work);
        if (traced_) events_[me].push_back({s, me, panel, begin, now()});
      }
      barriers_[turn.leader].wait(turn.members);
    }
  }

  int64_t now() const {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now() - start_).count();
  }

  const Run& run_;
  const Forecast& forecast_;
  uint8_t *slabs_, *scratch_;
  size_t slab_bytes_, scratch_bytes_;
  bool traced_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::vector<Barrier> barriers_;  // of the team of each leader, and of all
  std::vector<std::vector<Event>> events_;
};

std::vector<Output> Program::run(const std::vector<Array>& inputs, const Array* mask, std::vector<Event>* events) {
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
  Run run{*this, kernels_, inputs, results};
  run.batch = batch;
  run.length = length;
  run.tokens[0] = mask ? masked_tokens(*mask, batch, length) : all_tokens(batch, length);
  run.tokens[1] = all_tokens(batch, 1);
  if (uses_class_token_) run.tokens[2] = all_tokens(batch, length + 1);
  size_t key[kGeometries];
  for (int g = 0; g < kGeometries; ++g) key[g] = lanes(run.tokens[g].count);
  const auto planned = plan(key);
  const Forecast shared = pool.threads() == threads_ ? planned->forecast : forecast(key, pool.threads());
  const size_t arena_bytes = round_up(planned->bytes, 64), scratch_bytes = round_up(scratch_, 64);

  check_limit(run, arena_bytes + (slab_ + scratch_bytes) * shared.threads);
  auto arena = take_arena(arena_bytes + (slab_ + scratch_bytes) * shared.threads);
  run.base = arena->data;
  run.offsets = planned->offsets.data();
  try {
    for (const Step& step : steps_)
      if (step.body.begin) step.body.begin(run);
  } catch (...) {
    keep_arena(std::move(arena));
    throw;
  }
  uint8_t* slabs = arena->data + arena_bytes;
  Execution execution(run, shared, slabs, slabs + slab_ * shared.threads, slab_, scratch_bytes, events != nullptr);
  pool.run(shared.threads, [](void* c, size_t part) { static_cast<Execution*>(c)->thread(part); }, &execution);
  if (events) *events = execution.events();
  keep_arena(std::move(arena));
  return results;
}

}  // namespace nm
