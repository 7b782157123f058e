// Running a program: shapes from the inputs, tokens from the masks, then the steps in order.
#include <atomic>
#include <chrono>
#include <cstring>

#include "program.h"

namespace nm {
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
    const size_t columns = panel_width(run_.tokens[phase.stream].count, panel) / 16;
    for (size_t s = phase.first; s < phase.last; ++s) {
      const Body& body = run_.program.steps_[s].body;
      const size_t units = body.units ? body.units : columns, member = me - turn.leader;
      work.first = units * member / turn.members, work.last = units * (member + 1) / turn.members;
      if (work.first < work.last) {
        const int64_t begin = traced_ ? now() : 0;
        body.work(work);
        if (traced_) {
          const double share = static_cast<double>(work.last - work.first) / static_cast<double>(units);
          events_[me].push_back({s, me, panel, begin, now(), share * static_cast<double>(columns * 16)});
        }
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

// Inputs must have the types and ranks that steps read, one batch, and in each stream one length.
void Program::check_inputs(const std::vector<Array>& inputs, Run& run) const {
  check(inputs.size() == slots_.size(), "inputs",
        "must be " + std::to_string(slots_.size()) + " arrays, not " + std::to_string(inputs.size()));
  std::vector<size_t> lengths(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& s = slots_[i];
    const std::string name = "input slot " + std::to_string(i);
    if (s.kind == Slot::kIds) {
      check_array(name.c_str(), inputs[i], {DType::kI64, DType::kI32}, {kAnySize, kAnySize});
      lengths[i] = inputs[i].shape[1];
    } else if (s.kind == Slot::kFeatures) {
      check_array(name.c_str(), inputs[i], {DType::kF32}, {kAnySize, kAnySize, s.rows});
      lengths[i] = inputs[i].shape[1];
    } else {
      check_array(name.c_str(), inputs[i], {DType::kF32}, {kAnySize, s.channels, kAnySize, kAnySize});
      const size_t h = inputs[i].shape[2], w = inputs[i].shape[3];
      check(h % s.height == 0 && w % s.width == 0, name.c_str(),
            "has images of " + std::to_string(h) + "x" + std::to_string(w) + ", not a multiple of the patch " +
                std::to_string(s.height) + "x" + std::to_string(s.width));
      lengths[i] = (h / s.height) * (w / s.width);
    }
    const size_t first = static_cast<size_t>(streams_[s.stream].slot), batch = inputs[0].shape[0];
    check(inputs[i].shape[0] == batch && lengths[i] == lengths[first], name.c_str(),
          "has " + std::to_string(inputs[i].shape[0]) + " sequences of " + std::to_string(lengths[i]) +
              " tokens, but input slot " + std::to_string(inputs[i].shape[0] == batch ? first : 0) + " has " +
              std::to_string(batch) + " of " + std::to_string(lengths[inputs[i].shape[0] == batch ? first : 0]));
    check(batch < (1u << 28) && lengths[i] < (1u << 28) && batch * (lengths[i] + 1) < (1u << 28), "inputs",
          "hold more than 2^28 tokens");
    run.tokens[s.stream].length = lengths[i];
  }
  run.batch = inputs[0].shape[0];
}

// The real tokens of every stream that is in use; what a stream follows from was declared before it.
void Program::find_tokens(const Masks& masks, Run& run) const {
  std::vector<const Array*> mask(streams_.size());
  for (const auto& [name, array] : masks) {
    const size_t s = stream_at("mask of stream", name);
    const std::string what = s == kTokens ? "mask" : "mask of stream '" + name + "'";
    check(streams_[s].input(), what.c_str(), "cannot be: only streams that are read from inputs have masks");
    check(streams_[s].used, what.c_str(), "belongs to no step of the program");
    check(!mask[s], what.c_str(), "is given twice");
    check(!streams_[s].prepended, what.c_str(), "cannot be used in a program with a class token (geometry tokens1)");
    mask[s] = &array;
  }
  for (size_t s = 0; s < streams_.size(); ++s) {
    const Stream& stream = streams_[s];
    if (!stream.used) continue;
    const size_t length = run.tokens[s].length;
    const std::string what = s == kTokens ? "mask" : "mask of stream '" + stream.name + "'";
    run.tokens[s] = stream.kind == Stream::kFirst ? all_tokens(run.batch, 1)
                    : !stream.input()             ? following_tokens(stream.kind, run.tokens[stream.of])
                    : mask[s]                     ? masked_tokens(what.c_str(), *mask[s], run.batch, length)
                                                  : all_tokens(run.batch, length);
  }
}

std::vector<Output> Program::run(const std::vector<Array>& inputs, const Masks& masks, std::vector<Event>* events) {
  check(prepared_, "run:", "call prepare() first");
  std::vector<Output> results(outputs_.size());
  Run run{*this, kernels_, inputs, results};
  run.tokens.resize(streams_.size());
  check_inputs(inputs, run);
  find_tokens(masks, run);
  PoolLease pool(threads_);
  std::vector<size_t> key;
  for (const Tokens& tokens : run.tokens) key.push_back(lanes(tokens.count));
  const auto planned = plan(key);
  const Forecast shared =
      pool.threads() == threads_ ? planned->forecast : forecast(key, pool.threads(), *planned->costs);
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
