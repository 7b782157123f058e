// The Python face of the engine: nmcompile._native. This file and capabilities.cc alone know Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "capabilities.h"
#include "engine/program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using nm::Array;
using nm::DType;
using nm::Program;
using NdArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

DType dtype_of(const NdArray& array) {
  const nb::dlpack::dtype d = array.dtype();
  if (d == nb::dtype<float>()) return DType::kF32;
  if (d == nb::dtype<int8_t>()) return DType::kI8;
  if (d == nb::dtype<uint8_t>()) return DType::kU8;
  if (d == nb::dtype<uint16_t>()) return DType::kU16;
  if (d == nb::dtype<uint32_t>()) return DType::kU32;
  if (d == nb::dtype<int32_t>()) return DType::kI32;
  if (d == nb::dtype<int64_t>()) return DType::kI64;
  if (d == nb::dtype<bool>()) return DType::kBool;
  if (d.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && d.bits == 16 && d.lanes == 1)
    return DType::kF16;
  return DType::kOther;
}

// Shares the data with Python and keeps the array alive.
Array share(const NdArray& array) {
  Array a;
  a.data = array.data();
  a.dtype = dtype_of(array);
  for (size_t i = 0; i < array.ndim(); ++i) a.shape.push_back(array.shape(i));
  a.owner = std::shared_ptr<void>(new NdArray(array), [](void* held) {
    nb::gil_scoped_acquire gil;
    delete static_cast<NdArray*>(held);
  });
  const size_t size = a.dtype == DType::kF32 || a.dtype == DType::kI32 || a.dtype == DType::kU32   ? 4
                      : a.dtype == DType::kI64                                                     ? 8
                      : a.dtype == DType::kU16 || a.dtype == DType::kF16                           ? 2
                                                                                                   : 1;
  if (reinterpret_cast<uintptr_t>(a.data) % size != 0) {  // an array at an odd offset of a file: copy
    auto* copy = new uint8_t[array.nbytes() + 64];
    std::shared_ptr<void> owner(copy, [](void* p) { delete[] static_cast<uint8_t*>(p); });
    __builtin_memcpy(copy, a.data, array.nbytes());
    a.data = copy;
    a.owner = owner;
  }
  return a;
}

struct Maybe {  // an optional array as the pointer the engine takes
  explicit Maybe(const std::optional<NdArray>& array) {
    if (array) value = share(*array);
  }
  const Array* get() const { return value ? &*value : nullptr; }
  std::optional<Array> value;
};

template <class T>
T number(const char* what, nb::handle value) {
  try {
    return nb::cast<T>(value);
  } catch (const nb::cast_error&) {
    nm::fail(std::string(what) + " must be a number");
  }
}

nm::ScheduleCosts costs_of(const std::optional<nb::dict>& figures) {
  nm::ScheduleCosts costs;
  if (!figures) return costs;
  for (const auto& [key, value] : *figures) {
    std::string name;
    nm::check(nb::try_cast(key, name), "costs", "must be numbers by names");
    double* figure = nm::figure(costs, name.c_str());
    nm::check(figure != nullptr, "costs", "know no '" + name.substr(0, 60) + "'; capabilities().costs names them");
    *figure = number<double>("costs", value);
    nm::check(*figure >= 0 && *figure <= 1e9, "costs", "of " + name + " must lie in 0..1e9");
  }
  return costs;
}

nm::Causal causal_of(bool causal, const std::optional<int64_t>& offset) {
  return {causal, offset.has_value(), offset.value_or(0)};
}

nm::Requant requant(float scale, int64_t zero) {
  nm::check(zero >= -1000 && zero <= 1000, "zero_point", "must fit the type it belongs to");
  return {scale, static_cast<int32_t>(zero)};
}

template <class T>
T item(const nb::dict& d, const char* key) {
  nm::check(d.contains(key), "linear: weight", std::string("lacks '") + key + "'");
  try {
    return nb::cast<T>(d[key]);
  } catch (const nb::cast_error&) {
    nm::fail(std::string("linear: weight '") + key + "' has the wrong type");
  }
}

nm::Weight weight_of(const nb::dict& d) {
  nm::Weight w;
  w.format = item<std::string>(d, "format");
  w.values = share(item<NdArray>(d, "values"));
  if (w.format == "blocks" || w.format == "gather") {
    const auto rows = item<int64_t>(d, "rows");
    nm::check(rows > 0 && rows <= 65536, "linear: weight rows", "must lie in 1..65536");
    w.rows = static_cast<size_t>(rows);
    w.columns = share(item<NdArray>(d, "columns"));
    w.starts = share(item<NdArray>(d, "starts"));
  }
  return w;
}

nm::Source source_of(nb::handle entry) {
  static const char* const kWhat = "embed: sources";
  try {
    const auto t = nb::cast<nb::tuple>(entry);
    nm::check(t.size() >= 2, kWhat, "must be tuples such as (\"input\", 0)");
    const auto kind = nb::cast<std::string>(t[0]);
    const auto number = nb::cast<int64_t>(t[1]);
    nm::Source s{nm::Source::kConstant, 0, number};
    if (kind == "constant") return s;
    if (kind == "position") {
      s.kind = nm::Source::kPosition;
      return s;
    }
    nm::check(kind == "input" || kind == "cumulative", kWhat,
              "kind '" + kind + "' is unknown; choose one of input, position, cumulative, constant");
    nm::check(number >= 0 && number < 1024, kWhat, "slot must lie in 0..1023");
    s.slot = static_cast<size_t>(number);
    s.kind = kind == "input" ? nm::Source::kInput : nm::Source::kCumulative;
    s.value = 0;
    if (s.kind == nm::Source::kCumulative) {
      nm::check(t.size() == 3, kWhat, "(\"cumulative\", slot, pad) needs three parts");
      s.value = nb::cast<int64_t>(t[2]);
    }
    return s;
  } catch (const nb::cast_error&) {
    nm::fail("embed: sources must be tuples such as (\"input\", 0)");
  }
}

nb::list to_python(std::vector<nm::Output>&& outputs) {
  nb::list list;
  for (nm::Output& out : outputs) {
    float* data = out.data.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    list.append(nb::ndarray<nb::numpy, float>(data, out.shape.size(), out.shape.data(), owner));
  }
  return list;
}

// mask: of the stream "tokens"; masks: of streams by their names.
nm::Masks masks_of(const std::optional<NdArray>& mask, const std::optional<nb::dict>& masks) {
  nm::Masks found;
  if (mask) found.emplace_back("tokens", share(*mask));
  if (!masks) return found;
  for (const auto& [name, array] : *masks) {
    try {
      found.emplace_back(nb::cast<std::string>(name), share(nb::cast<NdArray>(array)));
    } catch (const nb::cast_error&) {
      nm::fail("masks must be numpy arrays by names of streams");
    }
  }
  return found;
}

nb::list run(Program& program, const nb::sequence& inputs, const std::optional<NdArray>& mask,
             const std::optional<nb::dict>& masks, std::vector<nm::Event>* events) {
  std::vector<Array> arrays;
  for (nb::handle h : inputs) {
    try {
      arrays.push_back(share(nb::cast<NdArray>(h)));
    } catch (const nb::cast_error&) {
      nm::fail("inputs must be numpy arrays");
    }
  }
  const nm::Masks given = masks_of(mask, masks);
  std::vector<nm::Output> outputs;
  {
    nb::gil_scoped_release release;
    outputs = program.run(arrays, given, events);
  }
  return to_python(std::move(outputs));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The C++ engine of nmcompile: programs of steps over packed tokens.";
  m.def("cpu_features", &nm::cpu_features);
  m.def("available_isas", &nm::available_isas);
  m.def("default_threads", &nm::default_threads);
  nm::add_capabilities(m);
  m.def("time_products",
        [](const nb::dict& weight, int64_t inputs, int64_t outputs, int64_t tokens, int64_t repeats,
           const std::string& isa) {
          return nm::time_products(isa, weight_of(weight), static_cast<size_t>(inputs), static_cast<size_t>(outputs),
                                   static_cast<size_t>(tokens), static_cast<size_t>(repeats));
        },
        "weight"_a, "inputs"_a, "outputs"_a, "tokens"_a, "repeats"_a = 20, "isa"_a = "");

  nb::class_<Program>(m, "Program")
      .def("__init__",
           [](Program* self, const std::string& isa, int64_t threads, int64_t most_copied,
              const std::optional<nb::dict>& costs) {
             nm::check(threads >= 0 && threads <= 1024, "threads", "must lie in 0..1024; 0 is one per CPU");
             nm::check(most_copied >= 0, "most_copied", "must not be negative; 0 is any number");
             new (self)
                 Program(isa, static_cast<size_t>(threads), static_cast<size_t>(most_copied), costs_of(costs));
           },
           "isa"_a = "", "threads"_a = 0, "most_copied"_a = 0, "costs"_a = nb::none())
      .def_prop_ro("isa", &Program::isa)
      .def_prop_ro("threads", &Program::threads)
      .def("stream", &Program::stream, "name"_a, "kind"_a = "input", "of"_a = "")
      .def("buffer", &Program::buffer, "rows"_a, "layout"_a, "geometry"_a = "tokens")
      .def("embed",
           [](Program& p, int y, const std::vector<NdArray>& tables, const nb::sequence& sources) {
             std::vector<Array> arrays;
             for (const NdArray& t : tables) arrays.push_back(share(t));
             std::vector<nm::Source> list;
             for (nb::handle s : sources) list.push_back(source_of(s));
             p.embed(y, std::move(arrays), std::move(list));
           },
           "y"_a, "tables"_a, "sources"_a)
      .def("enter", &Program::enter, "y"_a, "slot"_a)
      .def("leave", &Program::leave, "x"_a, "slot"_a)
      .def("first", &Program::first, "x"_a, "y"_a)
      .def("rest", &Program::rest, "x"_a, "y"_a)
      .def("layer_norm",
           [](Program& p, int x, const NdArray& gamma, const std::optional<NdArray>& beta, float eps, bool rms, int y,
              int q, float scale, int64_t zero_point, const std::optional<NdArray>& q_mul,
              const std::optional<NdArray>& q_add) {
             p.layer_norm(x, share(gamma), Maybe(beta).get(), eps, rms, y, q, requant(scale, zero_point),
                          Maybe(q_mul).get(), Maybe(q_add).get());
           },
           "x"_a, "gamma"_a, "beta"_a.none(), "eps"_a, "rms"_a = false, "y"_a = -1, "q"_a = -1, "scale"_a = 1.0f,
           "zero_point"_a = 0, "q_mul"_a.none() = nb::none(), "q_add"_a.none() = nb::none())
      .def("quantize",
           [](Program& p, int x, int y, float scale, int64_t zero_point) {
             p.quantize(x, y, requant(scale, zero_point));
           },
           "x"_a, "y"_a, "scale"_a, "zero_point"_a)
      .def("linear",
           [](Program& p, int x, int y, const nb::dict& weight, const NdArray& w_scale,
              const std::optional<NdArray>& bias, float x_scale, int64_t x_zero_point, const std::string& activation,
              int residual, float y_scale, int64_t y_zero_point) {
             p.linear(x, y, weight_of(weight), share(w_scale), Maybe(bias).get(), requant(x_scale, x_zero_point),
                      activation, residual, requant(y_scale, y_zero_point));
           },
           "x"_a, "y"_a, "weight"_a, "w_scale"_a, "bias"_a.none(), "x_scale"_a, "x_zero_point"_a,
           "activation"_a = "none", "residual"_a = -1, "y_scale"_a = 1.0f, "y_zero_point"_a = 0)
      .def("linear_float",
           [](Program& p, int x, int y, const NdArray& weight, const std::optional<NdArray>& bias,
              const std::string& activation, int residual) {
             p.linear_float(x, y, share(weight), Maybe(bias).get(), activation, residual);
           },
           "x"_a, "y"_a, "weight"_a, "bias"_a.none(), "activation"_a = "none", "residual"_a = -1)
      .def("attention",
           [](Program& p, int q, int k, int v, int y, int64_t heads, float scale, float q_scale, int64_t q_zero_point,
              float k_scale, float v_scale, bool causal, float y_scale, int64_t y_zero_point,
              std::optional<int64_t> offset) {
             p.attention(q, k, v, y, heads, scale, requant(q_scale, q_zero_point), k_scale, v_scale, causal_of(causal, offset),
                         requant(y_scale, y_zero_point));
           },
           "q"_a, "k"_a, "v"_a, "y"_a, "heads"_a, "scale"_a, "q_scale"_a, "q_zero_point"_a, "k_scale"_a, "v_scale"_a,
           "causal"_a = false, "y_scale"_a = 1.0f, "y_zero_point"_a = 0, "offset"_a = nb::none())
      .def("attention_float",
           [](Program& p, int q, int k, int v, int y, int64_t heads, float scale, bool causal, float y_scale,
              int64_t y_zero_point, std::optional<int64_t> offset) {
             p.attention_float(q, k, v, y, heads, scale, causal_of(causal, offset), requant(y_scale, y_zero_point));
           },
           "q"_a, "k"_a, "v"_a, "y"_a, "heads"_a, "scale"_a, "causal"_a = false, "y_scale"_a = 1.0f,
           "y_zero_point"_a = 0, "offset"_a = nb::none())
      .def("unary", &Program::unary, "x"_a, "y"_a, "op"_a)
      .def("binary", &Program::binary, "a"_a, "b"_a, "y"_a, "op"_a)
      .def("affine",
           [](Program& p, int x, int y, const std::optional<NdArray>& mul, const std::optional<NdArray>& add) {
             p.affine(x, y, Maybe(mul).get(), Maybe(add).get());
           },
           "x"_a, "y"_a, "mul"_a.none(), "add"_a.none())
      .def("add_positions",
           [](Program& p, int x, int y, const NdArray& table) { p.add_positions(x, y, share(table)); }, "x"_a, "y"_a,
           "table"_a)
      .def("patches", &Program::patches, "y"_a, "slot"_a, "channels"_a, "patch_h"_a, "patch_w"_a)
      .def("prepend", [](Program& p, int x, int y, const NdArray& row) { p.prepend(x, y, share(row)); }, "x"_a, "y"_a,
           "row"_a)
      .def("prepare", &Program::prepare)
      .def("measured",
           [](Program& p, const nb::dict& nanoseconds) {
             std::vector<std::pair<size_t, double>> times;
             for (const auto& [step, time] : nanoseconds)
               times.emplace_back(static_cast<size_t>(number<uint64_t>("measured: step", step)),
                                  number<double>("measured: nanoseconds", time));
             p.measured(times);
           },
           "nanoseconds"_a)
      .def("steps", &Program::steps)
      .def("memory", &Program::memory)
      .def("need",
           [](const Program& p) {
             const nm::Need need = p.need();
             return std::make_tuple(need.copied, need.thread, need.token);
           })
      .def_prop_rw("limit", &Program::limit,
                   [](Program& p, int64_t bytes) {
                     nm::check(bytes >= 0, "limit", "must not be negative; 0 is any number");
                     p.set_limit(static_cast<size_t>(bytes));
                   })
      .def("run",
           [](Program& p, const nb::sequence& inputs, const std::optional<NdArray>& mask,
              const std::optional<nb::dict>& masks) {
             return run(p, inputs, mask, masks, nullptr);
           },
           "inputs"_a, "mask"_a = nb::none(), "masks"_a = nb::none())
      .def("run_profiled",
           [](Program& p, const nb::sequence& inputs, const std::optional<NdArray>& mask,
              const std::optional<nb::dict>& masks) {
             std::vector<nm::Event> events;
             nb::list outputs = run(p, inputs, mask, masks, &events);
             size_t threads = 1;
             std::vector<int64_t> spent(p.steps().size(), 0);
             for (const nm::Event& e : events) {
               threads = std::max(threads, e.thread + 1);
               spent[e.step] += e.end - e.begin;
             }
             for (int64_t& time : spent) time /= static_cast<int64_t>(threads);
             return std::make_pair(outputs, spent);
           },
           "inputs"_a, "mask"_a = nb::none(), "masks"_a = nb::none())
      .def("run_costs",
           [](Program& p, const nb::sequence& inputs, const std::optional<NdArray>& mask,
              const std::optional<nb::dict>& masks) {
             std::vector<nm::Event> events;
             run(p, inputs, mask, masks, &events);
             std::vector<double> spent(p.steps().size(), 0), lanes(spent.size(), 0);
             for (const nm::Event& e : events) {
               spent[e.step] += static_cast<double>(e.end - e.begin);
               lanes[e.step] += e.lanes;
             }
             nb::dict costs;
             for (size_t step = 0; step < spent.size(); ++step)
               if (lanes[step] > 0) costs[nb::int_(step)] = spent[step] / lanes[step];
             return costs;
           },
           "inputs"_a, "mask"_a = nb::none(), "masks"_a = nb::none())
      .def("run_traced",
           [](Program& p, const nb::sequence& inputs, const std::optional<NdArray>& mask,
              const std::optional<nb::dict>& masks) {
             std::vector<nm::Event> events;
             nb::list outputs = run(p, inputs, mask, masks, &events);
             auto* data = new int64_t[events.size() * 5];
             nb::capsule owner(data, [](void* d) noexcept { delete[] static_cast<int64_t*>(d); });
             for (size_t i = 0; i < events.size(); ++i) {
               const nm::Event& e = events[i];
               const int64_t row[] = {static_cast<int64_t>(e.step), static_cast<int64_t>(e.thread),
                                      static_cast<int64_t>(e.panel), e.begin, e.end};
               std::copy(row, row + 5, data + i * 5);
             }
             return std::make_pair(outputs, nb::ndarray<nb::numpy, int64_t>(data, {events.size(), 5}, owner));
           },
           "inputs"_a, "mask"_a = nb::none(), "masks"_a = nb::none())
      .def("forecast",
           [](const Program& p, int64_t tokens, int64_t threads) {
             nm::check(tokens > 0 && tokens < (1 << 28), "forecast: tokens", "must lie in 1..2^28");
             nm::check(threads > 0 && threads <= 1024, "forecast: threads", "must lie in 1..1024");
             const nm::Forecast f = p.forecast(static_cast<size_t>(tokens), static_cast<size_t>(threads));
             return std::make_tuple(f.threads, f.alone, f.shared);
           },
           "tokens"_a, "threads"_a);
}
