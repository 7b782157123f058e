// Adding and running the attention steps.
#include <cmath>

#include "program.h"

namespace nm {
namespace {

struct Heads {
  size_t heads, depth;
};

Heads check_heads(const char* what, const Buffer& q, const Buffer& k, const Buffer& v, const Buffer& y, int64_t heads,
                  bool by_four) {
  const std::string name = what;
  check(heads > 0 && q.rows % static_cast<size_t>(heads) == 0, (name + ": heads").c_str(),
        "must divide the " + std::to_string(q.rows) + " rows of q");
  for (const Buffer* b : {&k, &v, &y})
    check(b->rows == q.rows && b->geometry == q.geometry, what, ": q, k, v and y must have equal rows and geometry");
  check(q.geometry != Geometry::kFirst, what, ": needs all tokens, not geometry first");
  const size_t depth = q.rows / static_cast<size_t>(heads);
  check(!by_four || depth % 4 == 0, (name + ": heads").c_str(),
        "leave " + std::to_string(depth) + " rows each, not a multiple of 4");
  check(depth <= 4096, (name + ": heads").c_str(), "leave more than 4096 rows each");
  return {static_cast<size_t>(heads), depth};
}

void check_score_scale(const char* what, float scale) {
  check(std::isfinite(scale) && scale > 0, what, "must be finite and above zero");
}

// The heads of a share, for the queries of one panel. The cost of a token is that of 128 keys.
Body attention_body(AttentionArgs common, int q, int k, int v, int y, bool bytes) {
  return {0.01 * 128 * common.rows * (bytes ? 1.0 : 6.0), common.heads, [=](const Work& work) {
            const Tokens& t = work.run.of(q);
            AttentionArgs a = common;
            a.q = work.own<uint8_t>(q), a.y = work.own<uint8_t>(y);
            a.k = work.run.panel<uint8_t>(k, 0), a.v = work.run.panel<uint8_t>(v, 0);
            a.tokens = t.count, a.panel = work.panel;
            a.starts = t.starts.data(), a.sequences = t.starts.size() - 1;
            a.first = work.first, a.last = work.last;
            a.scratch = work.scratch;
            (bytes ? work.run.kernels.attention->run : work.run.kernels.attention->run_float)(a);
          }};
}

}  // namespace

void Program::attention(int q, int k, int v, int y, int64_t heads, float scale, Requant q_in, float k_scale,
                        float v_scale, bool causal, Requant out) {
  const Buffer& bq = input("attention: q", q, {Layout::kU8});
  const Buffer& bk = input("attention: k", k, {Layout::kKeys});
  const Buffer& bv = input("attention: v", v, {Layout::kValues});
  const Buffer& by = output("attention: y", y, {Layout::kU8, Layout::kF32});
  check(y != q, "attention: y", "must not be q");
  const Heads h = check_heads("attention", bq, bk, bv, by, heads, true);
  check_score_scale("attention: scale", scale);
  check_scale("attention: q_scale", q_in.scale);
  check_zero("attention: q_zero_point", q_in.zero, Layout::kU8);
  check_scale("attention: k_scale", k_scale);
  check_scale("attention: v_scale", v_scale);
  check_scale("attention: y_scale", out.scale);
  check_zero("attention: y_zero_point", out.zero, Layout::kU8);
  AttentionArgs a{};
  a.y_bytes = by.layout == Layout::kU8;
  a.rows = bq.rows, a.heads = h.heads, a.depth = h.depth, a.causal = causal;
  a.scale = q_in.scale * k_scale * scale, a.q_zero = q_in.zero, a.v_scale = v_scale;
  a.y_inverse = 1.0f / out.scale, a.y_zero = out.zero;
  check(std::isfinite(a.scale * 1.44269504f), "attention: scale", "is too large");
  if (attention_scratch(h.depth) > scratch_) scratch_ = attention_scratch(h.depth);
  add("attention", std::to_string(h.heads) + " heads of " + std::to_string(h.depth) + (causal ? ", causal" : ""),
      bq.geometry, {q}, {k, v}, {y}, attention_body(a, q, k, v, y, true));
}

void Program::attention_float(int q, int k, int v, int y, int64_t heads, float scale, bool causal, Requant out) {
  const Buffer& bq = input("attention_float: q", q, {Layout::kF32});
  const Buffer& bk = input("attention_float: k", k, {Layout::kF32});
  const Buffer& bv = input("attention_float: v", v, {Layout::kF32});
  const Buffer& by = output("attention_float: y", y, {Layout::kU8, Layout::kF32});
  check(y != q && y != k && y != v, "attention_float: y", "must not be q, k or v");
  const Heads h = check_heads("attention_float", bq, bk, bv, by, heads, by.layout == Layout::kU8);
  check_score_scale("attention_float: scale", scale);
  check_scale("attention_float: y_scale", out.scale);
  check_zero("attention_float: y_zero_point", out.zero, Layout::kU8);
  AttentionArgs a{};
  a.y_bytes = by.layout == Layout::kU8;
  a.rows = bq.rows, a.heads = h.heads, a.depth = h.depth, a.causal = causal;
  a.scale = scale, a.y_inverse = 1.0f / out.scale, a.y_zero = out.zero;
  const size_t need = attention_scratch(round_up(h.depth, 4));
  if (need > scratch_) scratch_ = need;
  add("attention_float", std::to_string(h.heads) + " heads of " + std::to_string(h.depth) + (causal ? ", causal" : ""),
      bq.geometry, {q}, {k, v}, {y}, attention_body(a, q, k, v, y, false));
}

}  // namespace nm
