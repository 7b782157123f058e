// Activations of int8 results by table, in 16-bit integers, for every ISA alike.
//
// gelu, its approximations and silu are relu(x) - bump(|x|), where the bump dies out. The sum arrives as an integer of
// `1 << shift` parts of a step of y; relu is exact in it, and the bump is interpolated between 65 points.
#pragma once
#include <cstddef>
#include <cstdint>

namespace nm {

constexpr size_t kSegments = 64;

struct alignas(64) ActivationTable {
  int16_t base[kSegments];    // of each segment, with y's zero point and half a step
  int16_t slope[kSegments];   // rise over a segment * 64
  uint32_t pairs[kSegments];  // base | slope << 16, for gathers
  uint16_t limit;             // the last |x| inside the table
  uint16_t factor;            // (|x| << lead) * factor >> 16 is segment * 512 + place in the segment
  int lead, shift;
};

}  // namespace nm
