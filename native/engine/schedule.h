// How the panels of a phase are shared among threads.
//
// A phase is a run of steps that need, of each panel, nothing but that panel: a thread takes a panel through all of
// them while it is in its cache, without waiting for anyone. Panels that do not go round evenly, or are fewer than the
// threads, are taken by teams, which split the units of each step and wait for each other after it.
#pragma once
#include <cstddef>
#include <vector>

#include "../kernels/costs.h"
#include "shape.h"

namespace nm {

struct Phase {
  size_t first, last;  // steps
  size_t stream;        // whose panels they walk
};

// Threads [leader, leader + members) take panels [first, last) together, one after another.
struct Turn {
  size_t first, last;
  size_t leader, members;
};
using Turns = std::vector<Turn>;

struct StepCost {
  double per_token;  // nanoseconds of one core
  size_t units;      // 0: columns of 16 lanes
};

// What the schedule expects of a run.
struct Forecast {
  size_t threads = 1;      // worth using
  double alone = 0;        // nanoseconds of one thread
  double shared = 0;       // nanoseconds of that many threads
  std::vector<Turns> turns;  // by phase
};

// The turns of one phase for exactly `threads` threads, and the nanoseconds they take.
Turns share_panels(const ScheduleCosts& figures, const std::vector<StepCost>& steps, size_t tokens, size_t threads,
                   double* nanoseconds);

// The best of the numbers of threads up to `threads`; tokens and costs by phase.
Forecast forecast(const ScheduleCosts& figures, const std::vector<std::vector<StepCost>>& costs,
                  const std::vector<size_t>& tokens, size_t threads);

}  // namespace nm
