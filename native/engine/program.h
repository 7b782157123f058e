// A straight-line program of steps over buffers of packed tokens: built once, then run from any thread.
//
// Every argument is checked when a step is added, so that a hostile plan can give wrong numbers but no access out of
// bounds. Wrong arguments throw std::invalid_argument (ValueError in Python) with a sentence naming the argument.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "../simd/activation.h"
#include "dispatch.h"
#include "pool.h"
#include "schedule.h"
#include "shape.h"
#include "stream.h"

namespace nm {

enum class DType { kF32, kF16, kI8, kU8, kU16, kU32, kI32, kI64, kBool, kOther };

// A C-contiguous array someone else owns; `owner` keeps it alive.
struct Array {
  const void* data = nullptr;
  std::vector<size_t> shape;
  DType dtype = DType::kOther;
  std::shared_ptr<void> owner;

  template <class T>
  const T* as() const { return static_cast<const T*>(data); }
  size_t size() const;
};

struct Output {
  std::vector<size_t> shape;
  std::unique_ptr<float[]> data;
};

struct Weight {  // of `linear`
  std::string format;  // "dense" or "blocks"
  size_t rows = 0;
  Array values, columns, starts;
};

struct Source {  // of `embed`
  enum Kind { kInput, kPosition, kCumulative, kConstant } kind;
  size_t slot = 0;
  int64_t value = 0;  // offset, pad or row
};

struct Requant {
  float scale = 1.0f;
  int32_t zero = 0;
};

// Which keys a query sees: all of its sequence, or those at positions up to its own plus an offset. Without one its own
// and those before, in the same stream.
struct Causal {
  bool on = false, by_offset = false;
  int64_t offset = 0;
};

class Run;
struct Work;
struct PackedWeight;

// Bytes that a program takes: copies of its weights, what each thread of a run needs beside, and each token of a run at
// most; a run has at least 16.
struct Need {
  size_t copied, thread, token;
};

// What a step does. Any split of its units among threads gives the same bits.
struct Body {
  double cost;                          // about nanoseconds of one core per token, for the schedule
  size_t units;                         // shares one panel can be split into; 0: the 16-lane columns of the panel
  std::function<void(const Work&)> work;
  std::function<void(Run&)> begin = nullptr;  // once per run, before any thread starts; may throw
};

using Masks = std::vector<std::pair<std::string, Array>>;  // by stream

struct Event {
  size_t step, thread, panel;
  int64_t begin, end;  // nanoseconds since the run began
  double lanes;        // of the panel, the share of its units that the thread took
};

constexpr size_t kShared = static_cast<size_t>(-1);

class Program {
 public:
  // most_copied: bytes that copies of weights may take, 0 any number; costs: what the schedule counts with
  Program(const std::string& isa, size_t threads, size_t most_copied, const ScheduleCosts& costs);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  std::string isa() const { return kernels_.isa; }
  size_t threads() const { return threads_; }
  size_t limit() const { return limit_; }
  void set_limit(size_t bytes) { limit_ = bytes; }  // that a run may take, 0 any number

  // Declares a stream of this name: kind input, first, rest or prepended; of: the stream that it follows from.
  void stream(const std::string& name, const std::string& kind, const std::string& of);
  int buffer(int64_t rows, const std::string& layout, const std::string& stream);
  void embed(int y, std::vector<Array> tables, std::vector<Source> sources);
  void enter(int y, int64_t slot);
  void leave(int x, int64_t slot);
  void first(int x, int y);
  void rest(int x, int y);
  void layer_norm(int x, const Array& gamma, const Array* beta, float eps, bool rms, int y, int q, Requant out,
                  const Array* q_mul, const Array* q_add);
  void quantize(int x, int y, Requant out);
  void linear(int x, int y, Weight weight, const Array& w_scale, const Array* bias, Requant in,
              const std::string& activation, int residual, Requant out);
  void linear_float(int x, int y, const Array& weight, const Array* bias, const std::string& activation, int residual);
  void attention(int q, int k, int v, int y, int64_t heads, float scale, Requant q_in, float k_scale, float v_scale,
                 Causal causal, Requant out);
  void attention_float(int q, int k, int v, int y, int64_t heads, float scale, Causal causal, Requant out);
  void unary(int x, int y, const std::string& op);
  void binary(int a, int b, int y, const std::string& op);
  void affine(int x, int y, const Array* mul, const Array* add);
  void add_positions(int x, int y, const Array& table);
  void patches(int y, int64_t slot, int64_t channels, int64_t patch_h, int64_t patch_w);
  void prepend(int x, int y, const Array& row);
  void prepare();
  // Nanoseconds of one core per token, measured, by step: the schedules of later runs count with them.
  void measured(const std::vector<std::pair<size_t, double>>& nanoseconds);

  std::vector<std::pair<std::string, std::string>> steps() const;
  size_t memory() const;  // bytes of the arenas in use and kept
  Need need() const;
  // events: null, or receives what each thread did.
  std::vector<Output> run(const std::vector<Array>& inputs, const Masks& masks, std::vector<Event>* events);
  // How a run over one sequence of this many tokens in each stream of inputs is shared among threads.
  Forecast forecast(size_t tokens, size_t threads) const;

 private:
  friend class Run;
  friend struct Work;
  friend class Execution;
  struct Step {
    std::string kind, description;
    std::vector<int> reads, gathers, writes;  // gathers: read in other panels than the one at hand
    size_t stream;                            // whose panels the step walks
    Body body;
    size_t phase = 0;
  };
  struct Slot {
    enum Kind { kUnused, kIds, kFeatures, kPatches } kind = kUnused;
    size_t rows = 0, channels = 0, height = 0, width = 0, stream = 0;
  };
  struct Arena {
    uint8_t* data = nullptr;
    size_t bytes = 0;
    ~Arena();
  };
  struct Plan {
    std::vector<size_t> lanes;    // by stream
    std::vector<size_t> offsets;  // of the buffers that are shared by phases
    size_t bytes;
    Forecast forecast;  // with all threads
    std::shared_ptr<const std::vector<double>> costs;  // by which it is made
  };

  Buffer& buffer_at(const char* what, int index);
  Buffer& input(const char* what, int index, std::initializer_list<Layout> layouts);   // must have been written
  Buffer& output(const char* what, int index, std::initializer_list<Layout> layouts);
  Slot& slot(const char* what, int64_t index, Slot wanted, const Buffer& of);
  size_t stream_at(const char* what, const std::string& name) const;
  const Buffer& input_stream(const char* what, const Buffer& b) const;  // b, which is of a stream of inputs
  bool is_first(const Buffer& b) const { return streams_[b.stream].kind == Stream::kFirst; }
  bool follows(const Buffer& b, Stream::Kind kind, const Buffer& of) const;
  void add(std::string kind, std::string description, size_t stream, std::vector<int> reads,
           std::vector<int> gathers, std::vector<int> writes, Body body);
  Forecast forecast(const std::vector<size_t>& tokens, size_t threads, const std::vector<double>& nanoseconds) const;
  std::shared_ptr<const std::vector<double>> step_costs() const;
  void check_inputs(const std::vector<Array>& inputs, Run& run) const;
  void find_tokens(const Masks& masks, Run& run) const;
  void copies(const char* what, size_t bytes);  // a step is about to copy that many
  void copies_here(const char* what, size_t bytes);  // beside those, for the kernels of this CPU: plans do not state it
  std::shared_ptr<const PackedWeight> pack(Weight weight, size_t outputs, size_t groups);
  std::shared_ptr<const std::vector<float>> pack_float(const Array& weight, size_t outputs, size_t inputs);
  void check_limit(const Run& run, size_t arena) const;
  size_t place_shared(const std::vector<size_t>& lanes, std::vector<size_t>& offsets) const;
  void cut_phases();
  void place_locals();
  std::shared_ptr<const Plan> plan(const std::vector<size_t>& lanes);
  std::unique_ptr<Arena> take_arena(size_t bytes);
  void keep_arena(std::unique_ptr<Arena> arena);

  const Kernels& kernels_;
  size_t threads_;
  const ScheduleCosts costs_;
  bool prepared_ = false;
  std::vector<Stream> streams_ = default_streams();
  std::vector<Buffer> buffers_;
  std::vector<Step> steps_;
  std::vector<Slot> slots_;
  std::vector<int> outputs_;  // buffer of each output slot, -1: none
  size_t scratch_ = 0;           // bytes per thread
  size_t most_copied_, copied_ = 0, copied_here_ = 0, limit_ = 0, per_token_ = 0;  // bytes
  std::vector<size_t> lookups_ = std::vector<size_t>(kDefaultStreams);  // tables of all embed steps, by stream
  // Steps with the same weight share what is made of it. Keys: format, rows, where the arrays lie, blocks, outputs, groups.
  std::map<std::tuple<std::string, size_t, const void*, const void*, const void*, size_t, size_t, size_t>,
           std::shared_ptr<const PackedWeight>> packed_;
  std::map<std::tuple<const void*, size_t, size_t>, std::shared_ptr<const std::vector<float>>> packed_float_;
  std::vector<Phase> phases_;
  std::vector<size_t> local_;    // offset of each buffer in its team's slab, kShared for buffers of the arena
  size_t slab_ = 0;              // bytes per team

  std::mutex& mutex_ = fork_safe_mutex();  // guards what follows
  std::shared_ptr<const std::vector<double>> step_costs_;  // once prepared
  std::vector<std::shared_ptr<const Plan>> plans_;     // most recent first
  std::vector<std::unique_ptr<Arena>> arenas_;         // free ones
  size_t in_use_ = 0;                                  // bytes of the others
};

// What one run knows. Steps read it; they share nothing else.
class Run {
 public:
  const Program& program;
  const Kernels& kernels;
  const std::vector<Array>& inputs;
  std::vector<Output>& outputs;
  size_t batch = 0;
  std::vector<Tokens> tokens = {};  // by stream
  uint8_t* base = nullptr;
  const size_t* offsets = nullptr;
  std::map<size_t, std::vector<std::vector<uint32_t>>> lookups = {};  // by step: rows of its tables, token by token

  const Tokens& of(int buffer) const { return tokens[program.buffers_[buffer].stream]; }
  // Panel p of a buffer that outlives its phase.
  template <class T>
  T* panel(int buffer, size_t p) const {
    const Buffer& b = program.buffers_[buffer];
    return reinterpret_cast<T*>(base + offsets[buffer] + b.row_bytes() * kPanelTokens * p);
  }
};

// A thread's share of one step: the units [first, last) of one panel.
struct Work {
  const Run& run;
  size_t panel, first, last;
  uint8_t* slab;     // of the team: buffers that live within one phase, this panel only
  uint8_t* scratch;  // of the thread

  // This panel of a buffer of the step's stream.
  template <class T>
  T* own(int buffer) const {
    const size_t local = run.program.local_[buffer];
    return local == kShared ? run.panel<T>(buffer, panel) : reinterpret_cast<T*>(slab + local);
  }
  size_t width(int buffer) const { return panel_width(run.of(buffer).count, panel); }
};

// Seconds of the products of a linear layer alone, nothing stored: the least of `repeats`, on one thread.
double time_products(const std::string& isa, Weight weight, size_t inputs, size_t outputs, size_t tokens,
                     size_t repeats);

// What a program can be made of, by the names that it takes.
extern const std::vector<std::string> kStepNames, kLayoutNames, kActivationNames, kStreamKinds;

// ---- checks shared by the files that add steps
[[noreturn]] void fail(const std::string& message);
void check(bool ok, const char* what, const std::string& problem);
void check_array(const char* what, const Array& array, std::initializer_list<DType> dtypes,
                 std::initializer_list<size_t> shape);  // kAnySize matches any
constexpr size_t kAnySize = static_cast<size_t>(-1);
void check_scale(const char* what, float scale);
void check_zero(const char* what, int32_t zero, Layout layout);
// The place of a name in a list; ValueError names all of them.
size_t number_of(const char* what, const std::string& name, const std::vector<std::string>& names);
int activation_number(const char* what, const std::string& name);
std::string shape_text(const std::vector<size_t>& shape);

}  // namespace nm
