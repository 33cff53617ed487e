// Casts to FP8 before the products on a CPU: a row is read, measured, rounded and written
// while it lies in the cache. falqon_fx/ops/lowering.py says the same in ATen operations, which pass
// over memory some eight times. Bound by kernels/cpu/casts.py.

#include <vector>

namespace {

// falqon_fx.site.numerics.amax_to_scale with mode "pow2", from the bits of amax; `factor` is
// 1.75 / max.
float pow2_scale(uint32_t amax, float factor) {
  if (amax == 0) return 1.0f;
  const uint32_t wanted = as_bits(as_float(amax) * factor);
  if (wanted >= 0x7F800000u) return as_float(wanted);  // Inf and NaN stay visible
  const uint32_t power = (wanted + 0x1FFFFFu) & 0x7F800000u;
  return as_float(power < 0x00800000u ? 0x00800000u : power);
}

// The same of the row times `columns`.
template <typename In>
uint32_t load_row(float* __restrict row, const In* __restrict x, const float* __restrict columns,
                  int64_t count) {
  uint32_t amax = 0;
  for (int64_t j = 0; j < count; ++j) {
    row[j] = widen(x[j]) * columns[j];
    const uint32_t size = as_bits(row[j]) & 0x7FFFFFFFu;
    amax = size > amax ? size : amax;
  }
  return amax;
}

// falqon_fx.site.numerics.round_to_scaled_fp8, which says why it rounds.
template <typename Out>
void round_row(Out* __restrict to, float* __restrict row, int64_t count, float scale,
               float shift_per_unit, float spacing) {
  const float least = scale * (0x1p23f * spacing);
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t bits = as_bits(row[j]);
    const float size = as_float(bits & 0x7FFFFFFFu), wide = size * 0x1p12f;
    const float leading = ((wide + size) - wide) * shift_per_unit;
    const float shift = leading < least ? least : leading;
    const float rounded = (shift + size) - shift;
    row[j] = as_float((as_bits(rounded) & 0x7FFFFFFFu) | (bits & 0x80000000u));
    narrow(row[j], to[j]);
  }
}

// The E4M3 bytes of values that are E4M3 times `scale`, a power of two.
void encode_row(uint8_t* __restrict to, const float* __restrict row, int64_t count, float scale) {
  const float inverse = 1.0f / scale;
  for (int64_t j = 0; j < count; ++j) {
    const float value = row[j] * inverse;
    const uint32_t bits = as_bits(value), size = bits & 0x7FFFFFFFu;
    const uint32_t normal = (size >> 20) - (120u << 3);
    const uint32_t subnormal = uint32_t(as_float(size) * 512.0f);  // units of 2**-9
    to[j] = uint8_t((size < 0x3C800000u ? subnormal : normal) | (bits >> 24 & 0x80u));
  }
}

// The rows of x that have factors of their own: group g has those up to ends[g], and its factors
// behind those of the groups before it. Rows behind the last group are left as they are.
struct Groups {
  const int32_t* ends;
  int64_t count;
};

template <typename In, typename Out>
void cast_rows(const In* x, int64_t x_stride, const float* columns, const Groups& groups,
               int64_t rows, int64_t count, float factor, float shift_per_unit, float spacing, float* scale, Out* to,
               int64_t to_stride, uint8_t* codes, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(count);
    std::vector<Out> unused(to ? 0 : count);
    int64_t group = 0;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      while (group < groups.count && groups.ends[group] <= i) ++group;
      if (groups.count && group == groups.count) continue;
      const float* own = columns ? columns + group * count : nullptr;
      const In* row = x + i * x_stride;
      const uint32_t amax = own ? load_row(buffer.data(), row, own, count)
                                : load_row(buffer.data(), row, count);
      const float of_row = pow2_scale(amax, factor);
      scale[i] = of_row;
      Out* values = to ? to + i * to_stride : unused.data();
      if (as_bits(of_row) >= 0x7F800000u) {  // all of the row is NaN
        for (int64_t j = 0; j < count; ++j) narrow(as_float(0x7FC00000u), values[j]);
        if (codes) std::memset(codes + i * count, 0x7F, count);
        continue;
      }
      round_row(values, buffer.data(), count, of_row, shift_per_unit, spacing);
      if (codes) encode_row(codes + i * count, buffer.data(), count, of_row);
    }
  }
}

}  // namespace

// Rows of x [rows, count], times columns [count] unless that is null, cast to FP8 with one power of
// two per row: scale [rows], the values times their scale in `to`, and their bytes in `codes`, unless
// these are null. With `ends` the columns are those of `groups` groups of rows, [groups, count]. The
// format's mantissa has `mantissa` bits, its subnormals are `spacing` apart.
extern "C" void falqon_cast_rows(const void* x, int64_t x_is_bfloat16, int64_t x_stride,
                                 const float* columns, int64_t rows, int64_t count,
                                 int64_t mantissa, int64_t threads, float factor, float spacing,
                                 float* scale, void* to, int64_t to_is_bfloat16, int64_t to_stride,
                                 uint8_t* codes, const int32_t* ends, int64_t groups) {
  const float per_unit = float(int64_t(1) << (23 - mantissa));
  typed(x, x_is_bfloat16, to, to_is_bfloat16, [&](auto* in, auto* out) {
    cast_rows(in, x_stride, columns, Groups{ends, groups}, rows, count, factor, per_unit, spacing,
              scale, out, to_stride, codes, threads);
  });
}
