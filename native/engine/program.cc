// Building a program, and where its buffers lie.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace nm {

namespace {
constexpr size_t kMostPlans = 16, kMostArenas = 8;
constexpr int64_t kMostRows = kMostFloatInputs;
constexpr size_t kMostBuffers = 1 << 14, kMostSteps = 1 << 16, kMostSlots = 1024;  // hundreds of layers need fewer
constexpr size_t kMostBytes = size_t{1} << 60;
constexpr double kMostNanoseconds = 1e12;  // of a token: sums of all steps and panels stay finite
constexpr size_t kUsualLanes = 1024;  // of each stream, for what a token takes
}  // namespace

size_t Array::size() const {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  return n;
}

Program::Program(const std::string& isa, size_t threads, size_t most_copied, const ScheduleCosts& costs)
    : kernels_(choose_kernels(isa)),
      threads_(threads ? std::min<size_t>(threads, 1024) : default_threads()),
      costs_(costs),
      most_copied_(most_copied) {}

void Program::copies(const char* what, size_t bytes) {
  copied_ += bytes;
  copies_here(what, 0);
}

void Program::copies_here(const char* what, size_t bytes) {
  copied_here_ += bytes;
  check(!most_copied_ || copied_ + copied_here_ <= most_copied_, what,
        "would copy, with the steps before, more than " + std::to_string(most_copied_) + " bytes of weights");
}

const char* layout_name(Layout layout) {
  return kLayoutNames[static_cast<size_t>(layout)].c_str();
}

Program::Arena::~Arena() { std::free(data); }

size_t Program::stream_at(const char* what, const std::string& name) const {
  std::string known;
  for (size_t i = 0; i < streams_.size(); ++i) {
    if (streams_[i].name == name) return streams_[i].kind == Stream::kFirst ? size_t{kFirstTokens} : i;
    if (i < 16) known += (i ? ", " : "") + streams_[i].name;
  }
  fail(std::string(what) + " '" + name.substr(0, kMostStreamName) + "' is unknown; choose one of " + known);
}

void Program::stream(const std::string& name, const std::string& kind, const std::string& of) {
  check(!prepared_, "stream:", "the program is already prepared");
  check(!name.empty() && name.size() <= kMostStreamName, "stream: name",
        "must have 1.." + std::to_string(kMostStreamName) + " bytes");
  for (const Stream& s : streams_) check(s.name != name, "stream: name", "'" + name + "' is taken");
  check(streams_.size() < kMostStreams, "stream:",
        "a program has at most " + std::to_string(kMostStreams) + " streams");
  Stream made;
  made.name = name;
  made.kind = static_cast<Stream::Kind>(number_of("stream: kind", kind, kStreamKinds));
  check(made.input() == of.empty(), "stream: of",
        made.input() ? "must be left out for a stream of inputs" : "must name the stream that it follows from");
  made.of = made.input() ? streams_.size() : stream_at("stream: of", of);
  check(made.input() || streams_[made.of].kind != Stream::kFirst, "stream: of",
        "'" + of + "' has one token for each sequence: nothing follows from it");
  streams_.push_back(std::move(made));
  lookups_.push_back(0);
}

bool Program::follows(const Buffer& b, Stream::Kind kind, const Buffer& of) const {
  return streams_[b.stream].kind == kind && (kind == Stream::kFirst || streams_[b.stream].of == of.stream);
}

const Buffer& Program::input_stream(const char* what, const Buffer& b) const {
  check(streams_[b.stream].input(), what,
        "must be of a stream that is read from inputs, not of '" + streams_[b.stream].name + "'");
  return b;
}

int Program::buffer(int64_t rows, const std::string& layout, const std::string& stream) {
  check(!prepared_, "buffer:", "the program is already prepared");
  check(rows > 0 && rows <= kMostRows, "rows", "must lie in 1.." + std::to_string(kMostRows));
  check(buffers_.size() < kMostBuffers, "buffer:",
        "a program has at most " + std::to_string(kMostBuffers) + " buffers");
  Buffer b{static_cast<size_t>(rows), Layout::kF32, stream_at("geometry", stream)};
  b.layout = static_cast<Layout>(number_of("layout", layout, kLayoutNames));
  for (size_t s = b.stream; !streams_[s].used; s = streams_[s].of) {
    streams_[s].used = true;
    if (streams_[s].kind == Stream::kPrepended) streams_[streams_[s].of].prepended = true;
    if (streams_[s].kind == Stream::kFirst) break;  // one for each sequence, whatever it follows from
  }
  buffers_.push_back(b);
  return static_cast<int>(buffers_.size() - 1);
}

Buffer& Program::buffer_at(const char* what, int index) {
  check(!prepared_, what, "cannot be set: the program is already prepared");
  check(index >= 0 && static_cast<size_t>(index) < buffers_.size(), what,
        "names buffer " + std::to_string(index) + ", but there are " + std::to_string(buffers_.size()));
  return buffers_[index];
}

Buffer& Program::output(const char* what, int index, std::initializer_list<Layout> layouts) {
  Buffer& b = buffer_at(what, index);
  std::string wanted;
  bool ok = false;
  for (Layout layout : layouts) {
    ok = ok || b.layout == layout;
    wanted += (wanted.empty() ? "" : " or ") + std::string(layout_name(layout));
  }
  check(ok, what, "must be a buffer of layout " + wanted + ", not " + layout_name(b.layout));
  return b;
}

Buffer& Program::input(const char* what, int index, std::initializer_list<Layout> layouts) {
  Buffer& b = output(what, index, layouts);
  check(b.written, what, "reads buffer " + std::to_string(index) + " before any step has written it");
  return b;
}

Program::Slot& Program::slot(const char* what, int64_t index, Slot wanted, const Buffer& of) {
  check(index >= 0 && static_cast<size_t>(index) < kMostSlots, what, "slot must lie in 0..1023");
  if (static_cast<size_t>(index) >= slots_.size()) slots_.resize(index + 1);
  Slot& s = slots_[index];
  wanted.stream = of.stream;
  const bool same = s.kind == wanted.kind && s.rows == wanted.rows && s.channels == wanted.channels &&
                    s.height == wanted.height && s.width == wanted.width && s.stream == wanted.stream;
  check(s.kind == Slot::kUnused || same, what, "slot " + std::to_string(index) + " is already used for another input");
  int64_t& first = streams_[of.stream].slot;
  if (first < 0 || index < first) first = index;
  return s = wanted;
}

void Program::add(std::string kind, std::string description, size_t stream, std::vector<int> reads,
                  std::vector<int> gathers, std::vector<int> writes, Body body) {
  check(steps_.size() < kMostSteps, (kind + ":").c_str(),
        "a program has at most " + std::to_string(kMostSteps) + " steps");
  for (auto* list : {&reads, &gathers, &writes}) list->erase(std::remove(list->begin(), list->end(), -1), list->end());
  for (int b : writes) buffers_[b].written = true;
  steps_.push_back({std::move(kind), std::move(description), std::move(reads), std::move(gathers), std::move(writes),
                    stream, std::move(body)});
}

// A phase ends before a step of another stream, one that gathers what the phase has written, and one that writes
// what the phase has gathered.
void Program::cut_phases() {
  std::vector<size_t> written(buffers_.size(), kShared), gathered(buffers_.size(), kShared);  // last in which phase
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& s = steps_[i];
    bool cut = phases_.empty() || phases_.back().stream != s.stream;
    const size_t now = phases_.size() - 1;  // of the first step, which is cut anyway, kShared
    for (int b : s.gathers) cut = cut || written[b] == now;
    for (int b : s.writes) cut = cut || gathered[b] == now;
    if (cut) phases_.push_back({i, i, s.stream});
    s.phase = phases_.size() - 1;
    for (int b : s.gathers) gathered[b] = s.phase;
    for (int b : s.writes) written[b] = s.phase;
    phases_.back().last = i + 1;
  }
}

namespace {

struct Life {
  size_t index, begin, end, bytes;  // lives in [begin, end)
};

struct Placed {
  size_t first, last;  // bytes
  size_t begin, end;   // life
};

// Offsets by index, the largest first, each at the lowest place that is free while it lives. Returns the bytes needed.
size_t place(std::vector<Life> lives, std::vector<size_t>& offsets) {
  std::stable_sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) { return a.bytes > b.bytes; });
  size_t needed = 0;
  std::vector<Placed> placed;  // by their first byte, so that nothing is sorted for each
  for (const Life& life : lives) {
    if (life.begin >= life.end || !life.bytes) continue;
    size_t at = 0;
    for (const Placed& other : placed) {
      if (other.begin >= life.end || life.begin >= other.end) continue;
      if (other.first >= at + life.bytes) break;
      at = std::max(at, other.last);
    }
    offsets[life.index] = at;
    needed = std::max(needed, at + life.bytes);
    if (needed > kMostBytes) throw std::bad_alloc();  // before sums wrap
    const auto after = std::upper_bound(placed.begin(), placed.end(), at,
                                        [](size_t value, const Placed& other) { return value < other.first; });
    placed.insert(after, {at, at + life.bytes, life.begin, life.end});
  }
  return needed;
}

}  // namespace

// Buffers that one phase alone touches, panel by panel, live in the team's slab, which stays in its cache.
void Program::place_locals() {
  local_.assign(buffers_.size(), kShared);
  std::vector<size_t> phase(buffers_.size(), kShared);
  std::vector<char> shared(buffers_.size(), 0);
  std::vector<Life> lives;
  for (size_t i = 0; i < buffers_.size(); ++i)
    lives.push_back({i, steps_.size(), 0, round_up(buffers_[i].row_bytes() * kPanelTokens, 64)});
  for (size_t s = 0; s < steps_.size(); ++s) {
    const auto touch = [&](int b) {
      if (phase[b] == kShared) phase[b] = steps_[s].phase;
      if (phase[b] != steps_[s].phase || buffers_[b].stream != steps_[s].stream) shared[b] = 1;
      lives[b].begin = std::min(lives[b].begin, s), lives[b].end = s + 1;
    };
    for (int b : steps_[s].reads) touch(b);
    for (int b : steps_[s].writes) touch(b);
    for (int b : steps_[s].gathers) touch(b), shared[b] = 1;
  }
  lives.erase(std::remove_if(lives.begin(), lives.end(), [&](const Life& l) { return shared[l.index] != 0; }),
              lives.end());
  slab_ = place(lives, local_);
}

void Program::prepare() {
  check(!prepared_, "prepare:", "the program is already prepared");
  check(!slots_.empty(), "prepare:", "no step reads an input");
  for (size_t i = 0; i < slots_.size(); ++i)
    check(slots_[i].kind != Slot::kUnused, "prepare:", "input slot " + std::to_string(i) + " is read by no step");
  check(!outputs_.empty(), "prepare:", "no step leaves an output");
  for (size_t i = 0; i < outputs_.size(); ++i)
    check(outputs_[i] >= 0, "prepare:", "output slot " + std::to_string(i) + " is written by no step");
  for (const Stream& s : streams_)
    check(!s.used || !s.input() || s.slot >= 0, "prepare:", "stream '" + s.name + "' is read from no input");
  cut_phases();
  place_locals();
  std::vector<size_t> offsets(buffers_.size());
  const std::vector<size_t> usual(streams_.size(), kUsualLanes);
  per_token_ = (place_shared(usual, offsets) + kUsualLanes - 1) / kUsualLanes;
  for (size_t tables : lookups_) per_token_ += tables * sizeof(uint32_t);
  for (int x : outputs_) per_token_ += buffers_[x].rows * sizeof(float);
  packed_.clear(), packed_float_.clear();  // steps hold what they need
  auto costs = std::make_shared<std::vector<double>>();
  for (const Step& step : steps_) costs->push_back(step.body.cost);
  step_costs_ = std::move(costs);
  prepared_ = true;
}

void Program::measured(const std::vector<std::pair<size_t, double>>& nanoseconds) {
  check(prepared_, "measured:", "call prepare() first");
  for (const auto& [step, time] : nanoseconds) {
    check(step < steps_.size(), "measured: step",
          std::to_string(step) + " is none of " + std::to_string(steps_.size()));
    check(std::isfinite(time) && time >= 0 && time <= kMostNanoseconds, "measured: nanoseconds",
          "must lie in 0..1e12, not " + std::to_string(time));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto costs = std::make_shared<std::vector<double>>(*step_costs_);
  for (const auto& [step, time] : nanoseconds) (*costs)[step] = time;
  step_costs_ = std::move(costs);
}

Need Program::need() const {
  check(prepared_, "need:", "call prepare() first");
  return {copied_, slab_ + round_up(scratch_, 64), per_token_};
}

// Offsets in the arena for these numbers of lanes; the bytes needed. What a phase touches lives through all of it: its
// panels are at different steps at the same time.
size_t Program::place_shared(const std::vector<size_t>& lanes, std::vector<size_t>& offsets) const {
  std::vector<Life> lives;
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& b = buffers_[i];
    const size_t bytes = local_[i] == kShared ? b.row_bytes() * lanes[b.stream] : 0;
    lives.push_back({i, phases_.size(), 0, round_up(bytes, 64)});
  }
  for (const Step& step : steps_)
    for (const auto* list : {&step.reads, &step.gathers, &step.writes})
      for (int b : *list) {
        lives[b].begin = std::min(lives[b].begin, step.phase);
        lives[b].end = std::max(lives[b].end, step.phase + 1);
      }
  return place(std::move(lives), offsets);
}

// Refuses a run whose buffers, lookups and results would take more than the limit.
void Program::check_limit(const Run& run, size_t arena) const {
  size_t bytes = arena, longest = 0;
  for (size_t s = 0; s < streams_.size(); ++s) {
    bytes += lookups_[s] * run.tokens[s].count * sizeof(uint32_t);
    if (streams_[s].input()) longest = std::max(longest, run.tokens[s].length);
  }
  for (int x : outputs_) bytes += run.batch * run.of(x).length * buffers_[x].rows * sizeof(float);
  if (limit_ && bytes > limit_)
    fail("memory: " + std::to_string(run.batch) + " sequences of " + std::to_string(longest) + " tokens take " +
         std::to_string((bytes >> 20) + 1) + " MB, more than the " + std::to_string(limit_ >> 20) + " MB allowed");
}

std::shared_ptr<const Program::Plan> Program::plan(const std::vector<size_t>& lanes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < plans_.size(); ++i)
      if (plans_[i]->lanes == lanes && plans_[i]->costs == step_costs_) {
        std::rotate(plans_.begin(), plans_.begin() + i, plans_.begin() + i + 1);
        return plans_.front();
      }
  }
  auto made = std::make_shared<Plan>();
  made->costs = step_costs();
  made->lanes = lanes;
  made->offsets.assign(buffers_.size(), 0);
  made->bytes = place_shared(lanes, made->offsets);
  made->forecast = forecast(lanes, threads_, *made->costs);
  std::lock_guard<std::mutex> lock(mutex_);
  plans_.insert(plans_.begin(), made);  // another run may have made the same: no harm
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return made;
}

Forecast Program::forecast(size_t tokens, size_t threads) const {
  check(prepared_, "forecast:", "call prepare() first");
  std::vector<size_t> counts;  // what a stream follows from was declared before it
  for (const Stream& s : streams_) counts.push_back(s.input() ? tokens : following_length(s.kind, counts[s.of]));
  return forecast(counts, threads, *step_costs());
}

std::shared_ptr<const std::vector<double>> Program::step_costs() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return step_costs_;
}

Forecast Program::forecast(const std::vector<size_t>& tokens, size_t threads,
                           const std::vector<double>& nanoseconds) const {
  std::vector<std::vector<StepCost>> costs;
  std::vector<size_t> counts;
  for (const Phase& phase : phases_) {
    costs.emplace_back();
    counts.push_back(tokens[phase.stream]);
    for (size_t s = phase.first; s < phase.last; ++s)
      costs.back().push_back({nanoseconds[s], steps_[s].body.units});
  }
  return nm::forecast(costs_, costs, counts, threads);
}

std::unique_ptr<Program::Arena> Program::take_arena(size_t bytes) {
  std::unique_ptr<Arena> arena;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // the smallest that is large enough, else the largest, which grows
    size_t best = arenas_.size();
    for (size_t i = 0; i < arenas_.size(); ++i) {
      if (best == arenas_.size()) { best = i; continue; }
      const size_t a = arenas_[i]->bytes, b = arenas_[best]->bytes;
      if (a >= bytes ? (b < bytes || a < b) : (b < bytes && a > b)) best = i;
    }
    if (best < arenas_.size()) {
      arena = std::move(arenas_[best]);
      arenas_.erase(arenas_.begin() + best);
    }
    if (arena) in_use_ += arena->bytes;
  }
  if (arena && arena->bytes >= bytes) return arena;
  const size_t before = arena ? arena->bytes : 0;
  if (!arena) arena = std::make_unique<Arena>();
  std::free(arena->data);
  arena->bytes = 0;
  arena->data = static_cast<uint8_t*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (arena->data) {
    std::memset(arena->data, 0, bytes);
    arena->bytes = bytes;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  in_use_ += arena->bytes - before;
  if (!arena->data) throw std::bad_alloc();
  return arena;
}

void Program::keep_arena(std::unique_ptr<Arena> arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  in_use_ -= arena->bytes;
  if (arenas_.size() < kMostArenas) arenas_.push_back(std::move(arena));
}

size_t Program::memory() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = in_use_;
  for (const auto& arena : arenas_) bytes += arena->bytes;
  return bytes;
}

std::vector<std::pair<std::string, std::string>> Program::steps() const {
  std::vector<std::pair<std::string, std::string>> list;
  for (const Step& step : steps_) list.emplace_back(step.kind, step.description);
  return list;
}

}  // namespace nm
