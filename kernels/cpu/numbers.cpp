// What all compiled code here starts with: bits of numbers, and bfloat16.

#include <cstdint>
#include <cstring>

namespace {

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct bfloat16 {
  uint16_t bits;
};

float widen(float x) { return x; }
float widen(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
void narrow(float x, float& to) { to = x; }
// To the nearest, ties to even; a NaN stays one.
void narrow(float x, bfloat16& to) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

// The row in float32, and the bits of its largest magnitude: as integers NaN and Inf are the largest.
template <typename In>
uint32_t load_row(float* __restrict row, const In* __restrict x, int64_t count) {
  uint32_t amax = 0;
  for (int64_t j = 0; j < count; ++j) {
    row[j] = widen(x[j]);
    const uint32_t size = as_bits(row[j]) & 0x7FFFFFFFu;
    amax = size > amax ? size : amax;
  }
  return amax;
}

// run(x, to), each as what it is: bfloat16 or float32.
template <typename Run>
void typed(const void* x, int64_t x_is_bfloat16, void* to, int64_t to_is_bfloat16, Run run) {
  const auto* wide_x = static_cast<const float*>(x);
  const auto* half_x = static_cast<const bfloat16*>(x);
  auto* wide_to = static_cast<float*>(to);
  auto* half_to = static_cast<bfloat16*>(to);
  if (x_is_bfloat16) {
    if (to_is_bfloat16) run(half_x, half_to);
    else run(half_x, wide_to);
  } else {
    if (to_is_bfloat16) run(wide_x, half_to);
    else run(wide_x, wide_to);
  }
}

}  // namespace

