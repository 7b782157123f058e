// Activations as relu(x) - bump(|x|): what the table of kernels/linear/table.h holds.
#include "activation_table.h"

#include <algorithm>
#include <cmath>

#include "../simd/activation.h"

namespace nm {
namespace {

// relu(x) - activation(x) at x >= 0, which equals that at -x; never negative.
double bump(int activation, double x) {
  switch (activation) {
    case kGelu: return x * 0.5 * std::erfc(x * 0.70710678118654752);
    case kGeluTanh: return x * 0.5 * (1.0 - std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case kQuickGelu: return x / (1.0 + std::exp(1.702 * x));
    default: return x / (1.0 + std::exp(x));  // kSilu
  }
}

int16_t word(double value) {
  return static_cast<int16_t>(std::lround(value < -32768 ? -32768 : value > 32767 ? 32767 : value));
}

}  // namespace

std::unique_ptr<ActivationTable> activation_table(int activation, float y_scale, int32_t y_zero, float* unit) {
  if (activation != kGelu && activation != kGeluTanh && activation != kQuickGelu && activation != kSilu) return nullptr;
  // Beyond `reach` the bump is below a 64th of a step.
  double reach = 1.0;
  while (reach < 64.0 && bump(activation, reach) > y_scale / 64.0) reach += 0.0625;
  // As fine a unit as int16 holds: both `reach` and 255 steps, with room for the zero point.
  int shift = 6;
  while (shift > 0 && reach / y_scale * (1 << shift) > 32000.0) --shift;
  const double parts = 1 << shift;
  if (shift < 3 || reach / y_scale * parts > 32000.0) return nullptr;
  auto table = std::make_unique<ActivationTable>();
  table->shift = shift;
  // At least one part: where a step is wider than 64, all of the bump is less than a part, and any place will do.
  table->limit = static_cast<uint16_t>(std::max(1.0, std::floor(reach / y_scale * parts)));
  table->lead = 0;
  while ((table->limit << (table->lead + 1)) <= 32000) ++table->lead;
  table->factor = static_cast<uint16_t>(std::min(65535.0, std::floor(32767.0 * 65536.0 / (table->limit << table->lead))));
  const double per_word = 65536.0 / table->factor / (1 << table->lead) * 512;  // |x| in units, per segment
  double worst = 0;
  for (size_t i = 0; i < kSegments; ++i) {
    const double width = per_word * y_scale / parts;  // in x
    const double low = bump(activation, i * width), high = bump(activation, (i + 1) * width);
    const double middle = bump(activation, (i + 0.5) * width), sag = middle - (low + high) / 2;
    worst = std::max(worst, std::abs(sag) / 2 / y_scale);
    // the chord, moved by half its greatest error; with the zero point and what rounds the last shift, without bias
    table->base[i] = word(-(low + sag / 2) / y_scale * parts + y_zero * parts + (parts - 1) / 2);
    table->slope[i] = word(-(high - low) / y_scale * parts * 64);
    table->pairs[i] = static_cast<uint32_t>(static_cast<uint16_t>(table->base[i])) |
                      static_cast<uint32_t>(static_cast<uint16_t>(table->slope[i])) << 16;
  }
  if (worst > 0.15) return nullptr;
  *unit = static_cast<float>(parts);
  return table;
}

}  // namespace nm
