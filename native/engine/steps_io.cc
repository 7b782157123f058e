// Steps that move tokens in and out: lookups, transposition, the class token, patches.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace nm {
namespace {

constexpr size_t kRowBlock = 64;  // features of a token read at a time; their panel rows stay in L1

// Writes a share of y token by token: get(token, first row, last row, out) gives rows [first, last) of a token.
template <class Get>
void fill(const Work& work, int y, size_t rows, Get get) {
  const Tokens& t = work.run.of(y);
  const size_t width = work.width(y);
  float* panel = work.own<float>(y);
  for (size_t r = 0; r < rows; r += kRowBlock) {
    const size_t end = r + kRowBlock < rows ? r + kRowBlock : rows;
    for (size_t l = work.first * 16; l < work.last * 16; ++l) {
      const size_t token = work.panel * kPanelTokens + l;
      if (token >= t.count) break;
      float values[kRowBlock];
      get(token, r, end, values);
      for (size_t i = r; i < end; ++i) panel[i * width + l] = values[i - r];
    }
  }
}

// Rows [first, last) of one token of a buffer that outlives its phase.
void copy_token(const Run& run, int buffer, size_t token, size_t first, size_t last, float* out) {
  const size_t p = token / kPanelTokens, width = panel_width(run.of(buffer).count, p);
  const float* panel = run.panel<float>(buffer, p) + token % kPanelTokens;
  for (size_t r = first; r < last; ++r) out[r - first] = panel[r * width];
}

int64_t id_at(const Array& ids, size_t i) {
  return ids.dtype == DType::kI64 ? ids.as<int64_t>()[i] : ids.as<int32_t>()[i];
}

}  // namespace

void Program::embed(int y, std::vector<Array> tables, std::vector<Source> sources) {
  const Buffer& to = output("embed: y", y, {Layout::kF32});
  input_stream("embed: y", to);
  check(!tables.empty() && tables.size() == sources.size(), "embed: sources", "must be one for each table");
  check(tables.size() <= 64, "embed: tables", "must be at most 64");
  for (size_t i = 0; i < tables.size(); ++i) {
    const std::string name = "embed: table " + std::to_string(i);
    check_array(name.c_str(), tables[i], {DType::kF32, DType::kF16}, {kAnySize, to.rows});
    const Source& s = sources[i];
    if (s.kind == Source::kInput || s.kind == Source::kCumulative)
      slot("embed: sources", static_cast<int64_t>(s.slot), Slot{Slot::kIds}, to);
    if (s.kind == Source::kConstant)
      check(s.value >= 0 && static_cast<size_t>(s.value) < tables[i].shape[0], "embed: sources",
            "name constant row " + std::to_string(s.value) + " of a table of " + std::to_string(tables[i].shape[0]));
    check(s.value > -(int64_t{1} << 40) && s.value < (int64_t{1} << 40), "embed: sources", "hold a number too large");
  }
  lookups_[to.stream] += tables.size();
  const size_t rows = to.rows;
  const size_t index = steps_.size();
  const auto begin = [=](Run& run) {
    const Tokens& t = run.of(y);
    auto& lookup = run.lookups[index];
    lookup.assign(tables.size(), std::vector<uint32_t>(t.count));
    std::vector<int64_t> running;
    for (size_t i = 0; i < tables.size(); ++i) {
      const Source& s = sources[i];
      if (s.kind == Source::kCumulative) {
        running.assign(run.batch * t.length, 0);
        for (size_t b = 0; b < run.batch; ++b) {
          int64_t seen = 0;
          for (size_t j = b * t.length; j < (b + 1) * t.length; ++j) {
            const bool real = id_at(run.inputs[s.slot], j) != s.value;
            seen += real;
            running[j] = (real ? seen : 0) + s.value;
          }
        }
      }
      for (size_t token = 0; token < t.count; ++token) {
        const size_t at = t.sequence[token] * t.length + t.position[token];
        const int64_t row = s.kind == Source::kInput        ? id_at(run.inputs[s.slot], at)
                            : s.kind == Source::kPosition   ? static_cast<int64_t>(t.position[token]) + s.value
                            : s.kind == Source::kCumulative ? running[at]
                                                            : s.value;
        if (row < 0 || static_cast<size_t>(row) >= tables[i].shape[0])
          fail((s.kind == Source::kInput ? "token id " : "position ") + std::to_string(row) + " at [" +
               std::to_string(t.sequence[token]) + ", " + std::to_string(t.position[token]) + "]" +
               (s.kind == Source::kInput ? " of input slot " + std::to_string(s.slot) : std::string()) +
               " is outside 0.." + std::to_string(static_cast<int64_t>(tables[i].shape[0]) - 1));
        lookup[i][token] = static_cast<uint32_t>(row);
      }
    }
  };
  add("embed", std::to_string(tables.size()) + " tables, " + std::to_string(rows), to.stream, {}, {}, {y},
      {costs_.embed * rows, 0, [=](const Work& work) {
    const auto& lookup = work.run.lookups.at(index);
    std::vector<EmbedTable> here(tables.size());
    EmbedArgs a{here.data(), tables.size(), rows, work.width(y), nullptr};
    for (size_t column = work.first; column < work.last; ++column) {
      const size_t token = work.panel * kPanelTokens + column * 16;
      for (size_t i = 0; i < tables.size(); ++i) {
        here[i].rows = tables[i].data, here[i].half = tables[i].dtype == DType::kF16;
        for (size_t l = 0; l < 16; ++l)  // lanes past the last token repeat it
          here[i].row[l] = lookup[i][token + l < lookup[i].size() ? token + l : lookup[i].size() - 1];
      }
      a.lanes = work.own<float>(y) + column * 16;
      work.run.kernels.io->embed(a);
    }
  }, begin});
}

void Program::enter(int y, int64_t index) {
  const Buffer& to = output("enter: y", y, {Layout::kF32});
  input_stream("enter: y", to);
  Slot wanted{Slot::kFeatures};
  wanted.rows = to.rows;
  slot("enter:", index, wanted, to);
  const size_t rows = to.rows;
  add("enter", std::to_string(rows), to.stream, {}, {}, {y}, {costs_.enter * rows, 0, [=](const Work& work) {
    const Run& run = work.run;
    const Tokens& t = run.of(y);
    const float* x = run.inputs[index].as<float>();
    ColumnArgs a{};
    a.features = rows, a.width = work.width(y);
    for (size_t column = work.first; column < work.last; ++column) {
      const size_t first = work.panel * kPanelTokens + column * 16;
      for (size_t l = 0; l < 16; ++l) {
        const size_t token = first + l < t.count ? first + l : t.count - 1;
        a.token[l] = x + (t.sequence[token] * t.length + t.position[token]) * rows;
      }
      a.lanes = work.own<float>(y) + column * 16;
      run.kernels.io->enter(a);
    }
  }});
}

void Program::leave(int x, int64_t index) {
  const Buffer& from = input("leave: x", x, {Layout::kF32});
  check(index >= 0 && index < 1024, "leave:", "slot must lie in 0..1023");
  if (static_cast<size_t>(index) >= outputs_.size()) outputs_.resize(index + 1, -1);
  check(outputs_[index] == -1, "leave:", "output slot " + std::to_string(index) + " is written twice");
  const size_t rows = from.rows;
  const bool flat = is_first(from);
  const auto begin = [=](Run& run) {
    const size_t columns = run.of(x).length;
    Output& out = run.outputs[index];
    if (flat) out.shape = {run.batch, rows};
    else out.shape = {run.batch, columns, rows};
    const size_t size = run.batch * columns * rows;
    out.data.reset(run.of(x).count == run.batch * columns ? new float[size] : new float[size]());
  };
  add("leave", std::to_string(rows), from.stream, {x}, {}, {}, {costs_.leave * rows, 0, [=](const Work& work) {
    const Tokens& t = work.run.of(x);
    const size_t columns = t.length, width = work.width(x);
    float* data = work.run.outputs[index].data.get();
    LeaveArgs a{};
    a.features = rows, a.width = width;
    for (size_t column = work.first; column < work.last; ++column) {
      for (size_t l = 0; l < 16; ++l) {
        const size_t token = work.panel * kPanelTokens + column * 16 + l;
        a.token[l] = token < t.count ? data + (t.sequence[token] * columns + t.position[token]) * rows : nullptr;
      }
      a.lanes = work.own<float>(x) + column * 16;
      work.run.kernels.io->leave(a);
    }
  }, begin});
  outputs_[index] = x;
}

void Program::first(int x, int y) {
  const Buffer& from = input("first: x", x, {Layout::kF32});
  const Buffer& to = output("first: y", y, {Layout::kF32});
  check(is_first(to) && !is_first(from), "first: y", "must be of a stream of first tokens, and x not");
  check(to.rows == from.rows, "first: y", "must have the rows of x");
  const size_t rows = from.rows;
  add("first", std::to_string(rows), to.stream, {}, {x}, {y}, {costs_.first * rows, 0, [=](const Work& work) {
    const Run& run = work.run;
    const Tokens& t = run.of(x);
    fill(work, y, rows, [&](size_t sequence, size_t first, size_t last, float* out) {
      const size_t token = t.starts[sequence];
      const bool kept = token < t.starts[sequence + 1] && t.position[token] == 0;
      if (kept) copy_token(run, x, token, first, last, out);
      else std::fill(out, out + (last - first), 0.0f);
    });
  }});
}

void Program::add_positions(int x, int y, const Array& table) {
  const Buffer& from = input("add_positions: x", x, {Layout::kF32});
  const Buffer& to = output("add_positions: y", y, {Layout::kF32});
  check(to.rows == from.rows && to.stream == from.stream, "add_positions: y",
        "must have the rows and the stream of x");
  check_array("add_positions: table", table, {DType::kF32}, {kAnySize, from.rows});
  const size_t rows = from.rows;
  const auto begin = [=](Run& run) {
    const Tokens& t = run.of(x);
    for (size_t token = 0; token < t.count; ++token)
      if (t.position[token] >= table.shape[0])
        fail("position " + std::to_string(t.position[token]) + " is outside 0.." +
             std::to_string(static_cast<int64_t>(table.shape[0]) - 1) + ": the model has no more positions");
  };
  add("add_positions", std::to_string(rows), from.stream, {x}, {}, {y},
      {costs_.add_positions * rows, 0, [=](const Work& work) {
    const Tokens& t = work.run.of(x);
    const size_t width = work.width(x);
    fill(work, y, rows, [&](size_t token, size_t first, size_t last, float* out) {
      const float* panel = work.own<float>(x) + token % kPanelTokens;
      const float* row = table.as<float>() + t.position[token] * rows;
      for (size_t r = first; r < last; ++r) out[r - first] = panel[r * width] + row[r];
    });
  }, begin});
}

void Program::patches(int y, int64_t index, int64_t channels, int64_t patch_h, int64_t patch_w) {
  const Buffer& to = output("patches: y", y, {Layout::kF32});
  input_stream("patches: y", to);
  for (int64_t size : {channels, patch_h, patch_w})
    check(size > 0 && size <= 65536, "patches:", "channels, patch_h and patch_w must lie in 1..65536");
  const size_t c = channels, h = patch_h, w = patch_w, rows = to.rows;
  check(c * h * w == to.rows, "patches: y", "must have channels * patch_h * patch_w rows");
  Slot wanted{Slot::kPatches};
  wanted.channels = c, wanted.height = h, wanted.width = w;
  slot("patches:", index, wanted, to);
  add("patches", std::to_string(c) + "x" + std::to_string(h) + "x" + std::to_string(w), to.stream, {}, {}, {y},
      {costs_.patches * rows, 0, [=](const Work& work) {
    const Run& run = work.run;
    const Tokens& t = run.of(y);
    const Array& image = run.inputs[index];
    const size_t height = image.shape[2], width = image.shape[3], across = width / w;
    fill(work, y, rows, [&](size_t token, size_t first, size_t last, float* out) {
      const size_t top = t.position[token] / across * h, left = t.position[token] % across * w;
      for (size_t r = first; r < last; ++r) {
        const size_t channel = r / (h * w), dy = r / w % h, dx = r % w;
        out[r - first] =
            image.as<float>()[((t.sequence[token] * c + channel) * height + top + dy) * width + left + dx];
      }
    });
  }});
}

void Program::prepend(int x, int y, const Array& row) {
  const Buffer& from = input("prepend: x", x, {Layout::kF32});
  const Buffer& to = output("prepend: y", y, {Layout::kF32});
  check(follows(to, Stream::kPrepended, from) || follows(from, Stream::kRest, to), "prepend: y",
        "must be of the stream of x with a token before each sequence");
  check(to.rows == from.rows, "prepend: y", "must have the rows of x");
  check_array("prepend: row", row, {DType::kF32}, {from.rows});
  const size_t rows = from.rows;
  add("prepend", std::to_string(rows), to.stream, {}, {x}, {y}, {costs_.prepend * rows, 0, [=](const Work& work) {
    const Run& run = work.run;
    const Tokens& t = run.of(x);
    const Tokens& to = run.of(y);
    fill(work, y, rows, [&](size_t token, size_t first, size_t last, float* out) {
      if (to.position[token] == 0) {
        std::memcpy(out, row.as<float>() + first, (last - first) * sizeof(float));
        return;
      }
      const size_t sequence = to.sequence[token];
      const size_t source = t.starts[sequence] + (token - to.starts[sequence]) - to.has_first(sequence);
      copy_token(run, x, source, first, last, out);
    });
  }});
}

void Program::rest(int x, int y) {
  const Buffer& from = input("rest: x", x, {Layout::kF32});
  const Buffer& to = output("rest: y", y, {Layout::kF32});
  check(follows(to, Stream::kRest, from) || follows(from, Stream::kPrepended, to), "rest: y",
        "must be of the stream of x without the first token of each sequence");
  check(to.rows == from.rows, "rest: y", "must have the rows of x");
  const size_t rows = from.rows;
  add("rest", std::to_string(rows), to.stream, {}, {x}, {y}, {costs_.rest * rows, 0, [=](const Work& work) {
    const Run& run = work.run;
    const Tokens& t = run.of(x);
    const Tokens& to = run.of(y);
    fill(work, y, rows, [&](size_t token, size_t first, size_t last, float* out) {
      const size_t sequence = to.sequence[token];
      const size_t source = t.starts[sequence] + t.has_first(sequence) + (token - to.starts[sequence]);
      copy_token(run, x, source, first, last, out);
    });
  }});
}

}  // namespace nm
