#include "schedule.h"

#include <algorithm>

namespace nm {
namespace {

// Nanoseconds until the last of `members` threads knows that all have come.
double barrier(const ScheduleCosts& figures, size_t members) {
  return members < 2 ? 0.0 : figures.barrier + figures.barrier_member * static_cast<double>(members);
}

// One panel taken by a team.
double panel_time(const ScheduleCosts& figures, const std::vector<StepCost>& steps, size_t width, size_t members) {
  double total = 0;
  for (const StepCost& step : steps) {
    const size_t units = step.units ? step.units : width / 16;
    const double share = static_cast<double>((units + members - 1) / members) / static_cast<double>(units);
    total += step.per_token * static_cast<double>(width) * share + barrier(figures, members);
  }
  return total;
}

double turns_time(const ScheduleCosts& figures, const std::vector<StepCost>& steps, size_t tokens, size_t threads,
                  const Turns& turns) {
  std::vector<double> busy(threads, 0.0);
  for (const Turn& turn : turns) {
    double begin = 0;
    for (size_t t = turn.leader; t < turn.leader + turn.members; ++t) begin = std::max(begin, busy[t]);
    for (size_t p = turn.first; p < turn.last; ++p)
      begin += panel_time(figures, steps, panel_width(tokens, p), turn.members);
    for (size_t t = turn.leader; t < turn.leader + turn.members; ++t) busy[t] = begin;
  }
  return *std::max_element(busy.begin(), busy.end()) + barrier(figures, threads);
}

}  // namespace

Turns share_panels(const ScheduleCosts& figures, const std::vector<StepCost>& steps, size_t tokens, size_t threads,
                   double* nanoseconds) {
  const size_t count = panels(tokens), alone = count / threads * threads, rest = count - alone;
  Turns by_panel, together;
  if (alone)
    for (size_t t = 0; t < threads; ++t) by_panel.push_back({alone / threads * t, alone / threads * (t + 1), t, 1});
  for (size_t r = 0; r < rest; ++r) {
    const size_t leader = threads * r / rest;
    by_panel.push_back({alone + r, alone + r + 1, leader, threads * (r + 1) / rest - leader});
  }
  double time = turns_time(figures, steps, tokens, threads, by_panel);
  if (count && threads > 1) {
    together.push_back({0, count, 0, threads});
    const double other = turns_time(figures, steps, tokens, threads, together);
    if (other < time) by_panel.swap(together), time = other;
  }
  if (nanoseconds) *nanoseconds = time;
  return by_panel;
}

Forecast forecast(const ScheduleCosts& figures, const std::vector<std::vector<StepCost>>& costs,
                  const std::vector<size_t>& tokens, size_t threads) {
  Forecast best;
  for (size_t count = 1; count <= threads; count = count < threads ? std::min(count * 2, threads) : count + 1) {
    Forecast here;
    here.threads = count;
    here.shared = count < 2 ? 0.0 : figures.wake;
    for (size_t phase = 0; phase < costs.size(); ++phase) {
      double time = 0;
      here.turns.push_back(share_panels(figures, costs[phase], tokens[phase], count, &time));
      here.shared += time;
    }
    if (count == 1) best.alone = here.shared;
    here.alone = best.alone;
    if (count == 1 || here.shared < best.shared) best = std::move(here);
  }
  return best;
}

}  // namespace nm
