// What stands around products with INT8 on a CPU: the cast of x, the scales behind the sums of
// integers, and those of W that go into dL/dO. falqon_fx/ops/lowering.py says the same in ATen
// operations, each of which passes over memory again. Bound by kernels/cpu/integers.py.

#include <algorithm>
#include <vector>

namespace {

// falqon_fx.site.numerics.amax_to_scale for INT8, from the bits of amax.
float scale_of(uint32_t amax, bool pow2) {
  if (amax == 0) return 1.0f;
  float scale = as_float(amax) * float(1.0 / 127.0);
  if (pow2) {
    const uint32_t wanted = as_bits(as_float(amax) * 0x1p-6f);
    // 127 is 1.984375 * 2**6: what exceeds that carries into the exponent.
    scale = wanted < 0x7F800000u ? as_float((wanted + 0x1FFFFu) & 0x7F800000u) : as_float(wanted);
  }
  return scale < 0x1p-126f ? 0x1p-126f : scale;  // a NaN stays
}

// Zeros where `bits` has none, and the bits of the largest magnitude of the rest.
uint32_t masked(float* __restrict row, const uint32_t* __restrict bits, int64_t count) {
  uint32_t amax = 0;
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t left = as_bits(row[j]) & bits[j];
    row[j] = as_float(left);
    const uint32_t size = left & 0x7FFFFFFFu;
    amax = size > amax ? size : amax;
  }
  return amax;
}

template <typename In>
void cast(const In* x, int64_t x_stride, int64_t rows, int64_t count, bool pow2,
          const uint32_t* bits, float* scale, int8_t* codes, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(count);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      float* __restrict row = buffer.data();
      int8_t* __restrict to = codes + i * count;
      uint32_t amax = load_row(row, x + i * x_stride, count);
      if (bits) amax = masked(row, bits, count);
      scale[i] = scale_of(amax, pow2);
      if ((as_bits(scale[i]) & 0x7FFFFFFFu) >= 0x7F800000u) {  // all of the row is NaN
        std::memset(to, 0, count);
        continue;
      }
      const float inverse = 1.0f / scale[i];
      for (int64_t j = 0; j < count; ++j) {
        const float value = std::min(std::max(row[j] * inverse, -127.0f), 127.0f);
        // Above 2**23 floats are integers: the sum rounds, ties to even.
        to[j] = int8_t(int32_t((value + 0x1.8p23f) - 0x1.8p23f));
      }
    }
  }
}

template <typename In, typename Out>
void scale_columns(const In* x, int64_t x_stride, const float* factor, int64_t rows, int64_t count,
                   Out* to, int64_t to_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const In* __restrict from = x + i * x_stride;
    const float* __restrict of_column = factor;
    Out* __restrict row = to + i * to_stride;
    for (int64_t j = 0; j < count; ++j) narrow(widen(from[j]) * of_column[j], row[j]);
  }
}

template <typename Out>
void rescale(const int32_t* sums, const float* left, int64_t left_stride, const float* right,
             int64_t right_stride, int64_t rows, int64_t count, Out* to, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> factor(count);  // one for each column, wherever they lie
    for (int64_t j = 0; j < count; ++j) factor[j] = right[j * right_stride];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t* __restrict from = sums + i * count;
      const float* __restrict of_column = factor.data();
      Out* __restrict row = to + i * count;
      const float of_row = left[i * left_stride];
      for (int64_t j = 0; j < count; ++j) {
        narrow(float(from[j]) * of_row * of_column[j], row[j]);
      }
    }
  }
}

}  // namespace

// Rows of x [rows, count] cast to INT8, one scale each: scale [rows], codes [rows, count]. Of a
// column only those bits are read that are set in `bits` [count], where that is given.
extern "C" void falqon_cast_int8(const void* x, int64_t x_is_bfloat16, int64_t x_stride,
                                 int64_t rows, int64_t count, int64_t pow2, int64_t threads,
                                 const uint32_t* bits, float* scale, int8_t* codes) {
  if (x_is_bfloat16) {
    cast(static_cast<const bfloat16*>(x), x_stride, rows, count, pow2, bits, scale, codes, threads);
  } else {
    cast(static_cast<const float*>(x), x_stride, rows, count, pow2, bits, scale, codes, threads);
  }
}

// x [rows, count] times factor [count].
extern "C" void falqon_scale_columns(const void* x, int64_t x_is_bfloat16, int64_t x_stride,
                                     const float* factor, int64_t rows, int64_t count, void* to,
                                     int64_t to_is_bfloat16, int64_t to_stride, int64_t threads) {
  typed(x, x_is_bfloat16, to, to_is_bfloat16, [&](auto* in, auto* out) {
    scale_columns(in, x_stride, factor, rows, count, out, to_stride, threads);
  });
}

// sums [rows, count] times left [rows] or one number, times right [count] or one number.
extern "C" void falqon_rescale(const int32_t* sums, const float* left, int64_t left_stride,
                               const float* right, int64_t right_stride, int64_t rows,
                               int64_t count, int64_t threads, void* to, int64_t to_is_bfloat16) {
  if (to_is_bfloat16) {
    rescale(sums, left, left_stride, right, right_stride, rows, count, static_cast<bfloat16*>(to),
            threads);
  } else {
    rescale(sums, left, left_stride, right, right_stride, rows, count, static_cast<float*>(to),
            threads);
  }
}
