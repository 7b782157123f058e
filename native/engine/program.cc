// Building a program, and where its buffers lie.
#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace nm {

namespace {
constexpr size_t kMostPlans = 16, kMostArenas = 8;
constexpr int64_t kMostRows = 1 << 20;
constexpr size_t kMostBuffers = 1 << 20, kMostSlots = 1024;
}  // namespace

size_t Array::size() const {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  return n;
}

Program::Program(const std::string& isa, size_t threads)
    : kernels_(choose_kernels(isa)), threads_(threads ? std::min<size_t>(threads, 1024) : default_threads()) {}

Program::Arena::~Arena() { std::free(data); }

int Program::buffer(int64_t rows, const std::string& layout, const std::string& geometry) {
  check(!prepared_, "buffer:", "the program is already prepared");
  check(rows > 0 && rows <= kMostRows, "rows", "must lie in 1.." + std::to_string(kMostRows));
  check(buffers_.size() < kMostBuffers, "buffer:", "too many buffers");
  Buffer b{static_cast<size_t>(rows), Layout::kF32, Geometry::kTokens};
  if (layout == "u8") b.layout = Layout::kU8;
  else if (layout == "s8") b.layout = Layout::kS8;
  else if (layout == "s8rows") b.layout = Layout::kS8Rows;
  else check(layout == "f32", "layout", "'" + layout + "' is unknown; choose one of f32, u8, s8, s8rows");
  if (geometry == "first") b.geometry = Geometry::kFirst;
  else if (geometry == "tokens1") b.geometry = Geometry::kTokens1;
  else check(geometry == "tokens", "geometry", "'" + geometry + "' is unknown; choose one of tokens, first, tokens1");
  uses_class_token_ = uses_class_token_ || b.geometry == Geometry::kTokens1;
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
  static const char* const kNames[] = {"f32", "u8", "s8", "s8rows"};
  std::string wanted;
  bool ok = false;
  for (Layout layout : layouts) {
    ok = ok || b.layout == layout;
    wanted += (wanted.empty() ? "" : " or ") + std::string(kNames[static_cast<int>(layout)]);
  }
  check(ok, what, "must be a buffer of layout " + wanted + ", not " + kNames[static_cast<int>(b.layout)]);
  return b;
}

Buffer& Program::input(const char* what, int index, std::initializer_list<Layout> layouts) {
  Buffer& b = output(what, index, layouts);
  check(b.written, what, "reads buffer " + std::to_string(index) + " before any step has written it");
  return b;
}

Program::Slot& Program::slot(const char* what, int64_t index, Slot wanted) {
  check(index >= 0 && static_cast<size_t>(index) < kMostSlots, what, "slot must lie in 0..1023");
  if (static_cast<size_t>(index) >= slots_.size()) slots_.resize(index + 1);
  Slot& s = slots_[index];
  const bool same = s.kind == wanted.kind && s.rows == wanted.rows && s.channels == wanted.channels &&
                    s.height == wanted.height && s.width == wanted.width;
  check(s.kind == Slot::kUnused || same, what, "slot " + std::to_string(index) + " is already used for another input");
  return s = wanted;
}

void Program::add(std::string kind, std::string description, std::vector<int> reads, std::vector<int> writes,
                  std::function<void(Run&)> run) {
  const auto drop = [](std::vector<int>& list) { list.erase(std::remove(list.begin(), list.end(), -1), list.end()); };
  drop(reads), drop(writes);
  for (int b : writes) buffers_[b].written = true;
  steps_.push_back({std::move(kind), std::move(description), std::move(reads), std::move(writes), std::move(run)});
}

void Program::prepare() {
  check(!prepared_, "prepare:", "the program is already prepared");
  check(!slots_.empty(), "prepare:", "no step reads an input");
  for (size_t i = 0; i < slots_.size(); ++i)
    check(slots_[i].kind != Slot::kUnused, "prepare:", "input slot " + std::to_string(i) + " is read by no step");
  check(!outputs_.empty(), "prepare:", "no step leaves an output");
  for (size_t i = 0; i < outputs_.size(); ++i)
    check(outputs_[i] >= 0, "prepare:", "output slot " + std::to_string(i) + " is written by no step");
  prepared_ = true;
}

// Offsets of all buffers for these numbers of lanes: the largest first, each at the lowest place that is free
// while it lives (from the first step that touches it to the last).
std::shared_ptr<const Program::Plan> Program::plan(const size_t (&key)[kGeometries]) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < plans_.size(); ++i)
      if (std::equal(key, key + kGeometries, plans_[i]->key)) {
        std::rotate(plans_.begin(), plans_.begin() + i, plans_.begin() + i + 1);
        return plans_.front();
      }
  }
  struct Life {
    size_t index, begin, end, bytes;
  };
  std::vector<Life> lives;
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& b = buffers_[i];
    lives.push_back({i, steps_.size(), 0, round_up(b.row_bytes() * key[static_cast<int>(b.geometry)], 64)});
  }
  for (size_t s = 0; s < steps_.size(); ++s)
    for (const auto* list : {&steps_[s].reads, &steps_[s].writes})
      for (int b : *list) {
        lives[b].begin = std::min(lives[b].begin, s);
        lives[b].end = std::max(lives[b].end, s + 1);
      }
  std::stable_sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) { return a.bytes > b.bytes; });
  auto made = std::make_shared<Plan>();
  std::copy(key, key + kGeometries, made->key);
  made->offsets.assign(buffers_.size(), 0);
  made->bytes = 0;
  std::vector<Life> placed;
  for (const Life& life : lives) {
    if (life.begin >= life.end || !life.bytes) continue;
    std::vector<std::pair<size_t, size_t>> taken;
    for (const Life& other : placed)
      if (other.begin < life.end && life.begin < other.end)
        taken.emplace_back(made->offsets[other.index], made->offsets[other.index] + other.bytes);
    std::sort(taken.begin(), taken.end());
    size_t at = 0;
    for (const auto& range : taken) {
      if (range.first >= at + life.bytes) break;
      at = std::max(at, range.second);
    }
    made->offsets[life.index] = at;
    made->bytes = std::max(made->bytes, at + life.bytes);
    placed.push_back(life);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  plans_.insert(plans_.begin(), made);  // another run may have made the same: no harm
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return made;
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
