// Adding and running the attention steps.
#include <algorithm>
#include <cmath>
#include <cstring>

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
    check(b->rows == q.rows, what, ": q, k, v and y must have equal rows");
  check(y.stream == q.stream, what, ": y must be of the stream of q");
  check(v.stream == k.stream, what, ": k and v must be of one stream");
  const size_t depth = q.rows / static_cast<size_t>(heads);
  check(!by_four || depth % 4 == 0, (name + ": heads").c_str(),
        "leave " + std::to_string(depth) + " rows each, not a multiple of 4");
  check(depth <= 4096, (name + ": heads").c_str(), "leave more than 4096 rows each");
  return {static_cast<size_t>(heads), depth};
}

void check_score_scale(const char* what, float scale) {
  check(std::isfinite(scale) && scale > 0, what, "must be finite and above zero");
}

void check_causal(const char* what, const Causal& causal, const Buffer& q, const Buffer& k) {
  const std::string name = what;
  check(!causal.by_offset || causal.on, (name + ": offset").c_str(), "has no meaning where attention is not causal");
  constexpr int64_t most = int64_t{1} << 28;  // more tokens than a run may have
  check(causal.offset >= -most && causal.offset <= most, (name + ": offset").c_str(), "must lie in -2^28..2^28");
  check(!causal.on || causal.by_offset || q.stream == k.stream, (name + ": causal").c_str(),
        "needs an offset where the keys are of another stream than the queries");
}

// Which keys the queries of a panel see, as the kernels ask for it.
struct Sight {
  alignas(64) int32_t last[kPanelTokens];  // by lane: the last key seen, by position; the first one - 1 where none is
  size_t queries;                          // real ones
  bool blind[kPanelTokens], any_blind = false;

  Sight(const Tokens& queries_, const Tokens& keys, size_t panel, const Causal& causal)
      : queries(std::min(queries_.count - panel * kPanelTokens, kPanelTokens)) {
    for (size_t lane = 0; lane < queries; ++lane) {
      const size_t query = panel * kPanelTokens + lane, sequence = queries_.sequence[query];
      const auto begin = keys.position.begin();
      const auto first = begin + keys.starts[sequence], stop = begin + keys.starts[sequence + 1];
      const int64_t position = queries_.position[query] + causal.offset;
      const auto end = !causal.on ? stop : std::upper_bound(first, stop, position, [](int64_t p, uint32_t key) {
        return p < static_cast<int64_t>(key);
      });
      last[lane] = static_cast<int32_t>(end - begin) - 1;
      blind[lane] = end == first, any_blind = any_blind || blind[lane];
    }
    for (size_t lane = queries; lane < kPanelTokens; ++lane) last[lane] = last[lane - 1], blind[lane] = blind[lane - 1];
  }
};

// Zeros for the queries that see no key, in the heads of a share.
void blank(const Sight& sight, const AttentionArgs& a, size_t width) {
  const size_t first = a.first * a.depth, last = a.last * a.depth;
  for (size_t lane = 0; lane < width; ++lane) {
    if (!sight.blind[lane]) continue;
    if (!a.y_bytes)
      for (size_t r = first; r < last; ++r) static_cast<float*>(a.y)[r * width + lane] = 0.0f;
    else
      for (size_t r = first; r < last; r += 4)
        std::memset(static_cast<uint8_t*>(a.y) + (r / 4 * width + lane) * 4, a.y_zero, 4);
  }
}

// The heads of a share, for the queries of one panel. cost: of a row of a token.
Body attention_body(AttentionArgs common, int q, int k, int v, int y, bool bytes, Causal causal, bool same,
                    double cost) {
  return {cost * common.rows, common.heads, [=](const Work& work) {
            const Tokens &t = work.run.of(q), &keys = work.run.of(k);
            AttentionArgs a = common;
            a.q = work.own<uint8_t>(q), a.y = work.own<uint8_t>(y);
            a.k = work.run.panel<uint8_t>(k, 0), a.v = work.run.panel<uint8_t>(v, 0);
            a.tokens = t.count, a.key_tokens = keys.count, a.panel = work.panel;
            a.starts = t.starts.data(), a.key_starts = keys.starts.data(), a.sequences = t.starts.size() - 1;
            a.first = work.first, a.last = work.last;
            a.scratch = work.scratch;
            const auto kernel = bytes ? work.run.kernels.attention->run : work.run.kernels.attention->run_float;
            if (same && !causal.by_offset) return kernel(a);  // each query sees itself
            const Sight sight(t, keys, work.panel, causal);
            a.seen = sight.last;
            kernel(a);
            if (sight.any_blind) blank(sight, a, work.width(q));
          }};
}

std::string description(const Heads& h, const Causal& causal) {
  return std::to_string(h.heads) + " heads of " + std::to_string(h.depth) + (causal.on ? ", causal" : "") +
         (causal.by_offset ? " from " + std::to_string(causal.offset) : "");
}

}  // namespace

void Program::attention(int q, int k, int v, int y, int64_t heads, float scale, Requant q_in, float k_scale,
                        float v_scale, Causal causal, Requant out) {
  const Buffer& bq = input("attention: q", q, {Layout::kU8});
  const Buffer& bk = input("attention: k", k, {Layout::kKeys});
  const Buffer& bv = input("attention: v", v, {Layout::kValues});
  const Buffer& by = output("attention: y", y, {Layout::kU8, Layout::kF32});
  check(y != q, "attention: y", "must not be q");
  const Heads h = check_heads("attention", bq, bk, bv, by, heads, true);
  check(!is_first(bk), "attention: k", "must be of a stream of whole sequences, not of first tokens");
  check_causal("attention", causal, bq, bk);
  check_score_scale("attention: scale", scale);
  check_scale("attention: q_scale", q_in.scale);
  check_zero("attention: q_zero_point", q_in.zero, Layout::kU8);
  check_scale("attention: k_scale", k_scale);
  check_scale("attention: v_scale", v_scale);
  check_scale("attention: y_scale", out.scale);
  check_zero("attention: y_zero_point", out.zero, Layout::kU8);
  AttentionArgs a{};
  a.y_bytes = by.layout == Layout::kU8;
  a.rows = bq.rows, a.heads = h.heads, a.depth = h.depth, a.causal = causal.on;
  a.scale = q_in.scale * k_scale * scale, a.q_zero = q_in.zero, a.v_scale = v_scale;
  a.y_inverse = 1.0f / out.scale, a.y_zero = out.zero;
  check(std::isfinite(a.scale * 1.44269504f), "attention: scale", "is too large");
  if (attention_scratch(h.depth) > scratch_) scratch_ = attention_scratch(h.depth);
  add("attention", description(h, causal), bq.stream, {q}, {k, v}, {y},
      attention_body(a, q, k, v, y, true, causal, bq.stream == bk.stream,
                     costs_.attention_product * costs_.attention_keys));
}

void Program::attention_float(int q, int k, int v, int y, int64_t heads, float scale, Causal causal, Requant out) {
  const Buffer& bq = input("attention_float: q", q, {Layout::kF32});
  const Buffer& bk = input("attention_float: k", k, {Layout::kF32});
  const Buffer& bv = input("attention_float: v", v, {Layout::kF32});
  const Buffer& by = output("attention_float: y", y, {Layout::kU8, Layout::kF32});
  check(y != q && y != k && y != v, "attention_float: y", "must not be q, k or v");
  const Heads h = check_heads("attention_float", bq, bk, bv, by, heads, by.layout == Layout::kU8);
  check(!is_first(bk), "attention_float: k", "must be of a stream of whole sequences, not of first tokens");
  check_causal("attention_float", causal, bq, bk);
  check_score_scale("attention_float: scale", scale);
  check_scale("attention_float: y_scale", out.scale);
  check_zero("attention_float: y_zero_point", out.zero, Layout::kU8);
  AttentionArgs a{};
  a.y_bytes = by.layout == Layout::kU8;
  a.rows = bq.rows, a.heads = h.heads, a.depth = h.depth, a.causal = causal.on;
  a.scale = scale, a.y_inverse = 1.0f / out.scale, a.y_zero = out.zero;
  const size_t need = attention_scratch(round_up(h.depth, 4));
  if (need > scratch_) scratch_ = need;
  add("attention_float", description(h, causal), bq.stream, {q}, {k, v}, {y},
      attention_body(a, q, k, v, y, false, causal, bq.stream == bk.stream,
                     costs_.attention_float_product * costs_.attention_keys));
}

}  // namespace nm
