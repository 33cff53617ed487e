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

}  // namespace

