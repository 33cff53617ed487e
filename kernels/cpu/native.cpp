// The proxy update of sites in a CPU's memory (rows/update.py), the fingerprints by which it sees
// what changed, and casts to FP8 and back where nothing is compiled around them. rows/update.py and
// numerics.py in falqon_fx say the same in ATen operations, which pass over memory some sixty times;
// here a row is read, moved, rounded and written while it lies in the cache. Bound by
// kernels/cpu/native.py, whose structures these are and which checks what the pointers point to.

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// ---------------------------------------------------------------- numbers

float magnitude(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }

// Comparisons on bits, since the compiler may be told that no number is a NaN.
bool is_nan(float x) { return (as_bits(x) & 0x7FFFFFFFu) > 0x7F800000u; }
bool is_finite(float x) { return (as_bits(x) & 0x7FFFFFFFu) < 0x7F800000u; }

struct float16 {
  uint16_t bits;
};

float widen(float16 x) {
  const uint32_t size = x.bits & 0x7FFFu;  // 10 bits of mantissa; the exponent's bias is 112 less
  const float normal = as_float((size << 13) + (112u << 23));
  const float subnormal = as_float((size << 13) + (113u << 23)) - 0x1p-14f;
  const uint32_t finite = as_bits(size < 0x400u ? subnormal : normal);
  return as_float((size < 0x7C00u ? finite : size << 13 | 0x7F800000u) | (x.bits & 0x8000u) << 16);
}

// E4M3: 448 = 1.75 * 2**8 is the largest, 2**-6 the smallest normal, 2**-9 the spacing below it.

inline float decode(uint8_t code) {
  const uint32_t bits = code, size = bits & 0x7Fu;
  const float normal = as_float((size << 20) + (120u << 23));
  const float subnormal = as_float((size << 20) + (121u << 23)) - 0x1p-6f;
  const float value = size < 8u ? subnormal : normal;
  return as_float((size == 0x7Fu ? 0x7FC00000u : as_bits(value)) | (bits & 0x80u) << 24);
}

// To the nearest, ties to even; |x| <= 448 or NaN.
inline uint8_t encode_nearest(float x) {
  const uint32_t size = as_bits(x) & 0x7FFFFFFFu;
  const uint32_t normal = ((size + 0x7FFFFu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
  // 2**14 has a spacing of 2**-9: the sum is rounded to it.
  const uint32_t subnormal = as_bits(as_float(size) + 0x1p14f) - as_bits(0x1p14f);
  uint32_t code = size < as_bits(0x1p-6f) ? subnormal : normal;
  code = size > 0x7F800000u ? 0x7Fu : code;
  return uint8_t(code | (as_bits(x) >> 24 & 0x80u));
}

inline float clamp(float x) {
  const uint32_t size = as_bits(x) & 0x7FFFFFFFu, most = as_bits(448.0f);
  const uint32_t kept = size > most && size <= 0x7F800000u ? most : size;
  return as_float(kept | (as_bits(x) & 0x80000000u));
}

// To one of the two neighbours, the upper with probability (distance from the lower) / gap, which
// ``random`` / 2**16 decides; |x| <= 448 or NaN.
inline uint8_t encode_stochastic(float x, uint16_t random) {
  const uint32_t bits = as_bits(x) & 0x7FFFFFFFu, size = bits > 0x7F800000u ? 0u : bits;
  const uint32_t exponent = std::max(size >> 23, 121u);  // of the smallest normal at least
  const float steps_per_unit = as_float((254u + 3u - exponent) << 23);  // 1 / gap, exact
  const float steps = as_float(size) * steps_per_unit + float(int32_t(random)) * 0x1p-16f;
  // 8 to 16 steps of a normal are its implicit bit and its mantissa; a carry goes into the exponent.
  const uint32_t code = (exponent - 121u) * 8u + uint32_t(int32_t(steps));
  return uint8_t((size == bits ? code : 0x7Fu) | (as_bits(x) >> 24 & 0x80u));
}

float amax_to_scale(float amax, bool pow2) {
  if (amax == 0.0f && !is_nan(amax)) return 1.0f;
  float scale = amax * (1.0f / 448.0f);
  if (pow2) {
    // 448 is 1.75 * 2**8: what exceeds 1.75 in its significand carries into the exponent.
    const float wanted = amax * (1.75f / 448.0f);
    scale = is_finite(wanted) ? as_float((as_bits(wanted) + 0x1FFFFFu) & 0x7F800000u) : wanted;
  }
  return is_nan(scale) || scale >= 0x1p-126f ? scale : 0x1p-126f;
}

// Philox-4x32-10 with key `seed` and counter (column / 8, row, step, site): the eight halves of the
// four words it yields, low half first, belong to eight neighbouring columns (Salmon et al., SC'11).
constexpr int64_t kLanes = 16;

void philox(uint16_t* to, int64_t columns, uint32_t row, uint32_t step, uint32_t site,
            uint64_t seed) {
  for (int64_t first = 0; first * 8 < columns; first += kLanes, to += kLanes * 8) {
    // 64 bits each, whose upper halves only the multiplications must not see, so that they vectorise.
    uint64_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      c0[i] = uint64_t(first + i), c1[i] = row, c2[i] = step, c3[i] = site;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint64_t p0 = (c0[i] & 0xFFFFFFFFu) * 0xD2511F53u;
        const uint64_t p1 = (c2[i] & 0xFFFFFFFFu) * 0xCD9E8D57u;
        c0[i] = (p1 >> 32) ^ c1[i] ^ k0, c1[i] = p1;
        c2[i] = (p0 >> 32) ^ c3[i] ^ k1, c3[i] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    uint32_t words[kLanes][4];
    for (int64_t i = 0; i < kLanes; ++i) {
      words[i][0] = uint32_t(c0[i]), words[i][1] = uint32_t(c1[i]);
      words[i][2] = uint32_t(c2[i]), words[i][3] = uint32_t(c3[i]);
    }
    std::memcpy(to, words, sizeof words);  // the low half first, on a little-endian CPU
  }
}

}  // namespace

// ---------------------------------------------------------------- fingerprints

struct Matrix {
  const char* data;
  int64_t row_stride, column_stride;  // in bytes
};

namespace {

constexpr uint64_t kRowWeight = 0x3F58476D1CE4E5B9u, kColumnWeight = 0x1E3779B97F4A7C15u;

int64_t shifted(uint64_t value, int by) { return int64_t(value) >> by; }  // keeps the sign

uint64_t hash_weight(int64_t place, uint64_t multiplier) {
  const uint64_t mixed = uint64_t(place + 1) * multiplier;
  return ((mixed ^ uint64_t(shifted(mixed, 29))) * multiplier) | 1u;
}

template <class Word>
void hash_row(uint64_t* sums, const char* row, int64_t words, uint64_t weight) {
  for (int64_t j = 0; j < words; ++j) {
    Word word;
    std::memcpy(&word, row + j * int64_t(sizeof word), sizeof word);
    uint64_t value = uint64_t(int64_t(word));
    if (sizeof word == 8) value += 5u * uint64_t(shifted(value, 32));
    sums[j] += value * weight;
  }
}

uint64_t fingerprint(const Matrix& m, int64_t rows, int64_t columns, int64_t size) {
  const int64_t bytes = columns * size;
  const bool whole = bytes % 8 == 0;
  const int64_t words = whole ? bytes / 8 : columns;
  std::vector<uint64_t> sums(words, 0);
  std::vector<char> gathered(m.column_stride == size ? 0 : bytes);
  for (int64_t i = 0; i < rows; ++i) {
    const char* row = m.data + i * m.row_stride;
    if (m.column_stride != size) {
      for (int64_t j = 0; j < columns; ++j) {
        std::memcpy(&gathered[j * size], row + j * m.column_stride, size);
      }
      row = gathered.data();
    }
    const uint64_t weight = hash_weight(i, kRowWeight);
    if (whole || size == 8) hash_row<int64_t>(sums.data(), row, words, weight);
    else if (size == 4) hash_row<int32_t>(sums.data(), row, words, weight);
    else if (size == 2) hash_row<int16_t>(sums.data(), row, words, weight);
    else hash_row<int8_t>(sums.data(), row, words, weight);
  }
  uint64_t sum = 0;
  for (int64_t j = 0; j < words; ++j) sum += sums[j] * hash_weight(j, kColumnWeight);
  return sum;
}

}  // namespace

extern "C" void falqon_fingerprints(const Matrix* matrices, int64_t count, int64_t rows,
                                    int64_t columns, int64_t size, int64_t threads,
                                    int64_t* results) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    results[i] = int64_t(fingerprint(matrices[i], rows, columns, size));
  }
}

// ---------------------------------------------------------------- copies around the cache

struct Copy {
  char* to;
  const char* from;
  int64_t bytes;
};

namespace {

// memcpy whose target is not read into the cache before it is overwritten: memory moves two bytes a
// byte instead of three.
void stream(char* to, const char* from, int64_t bytes) {
#ifdef __AVX2__
  constexpr int64_t kLine = 64, kAhead = 32 * kLine;
  const int64_t head = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % kLine));
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  for (; bytes >= kLine; to += kLine, from += kLine, bytes -= kLine) {
    __builtin_prefetch(from + kAhead, 0, 0);
    const auto* source = reinterpret_cast<const __m256i*>(from);
    auto* target = reinterpret_cast<__m256i*>(to);
    const __m256i low = _mm256_loadu_si256(source), high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
  }
  _mm_sfence();
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace

// Each thread copies as many bytes as the others.
extern "C" void falqon_copy(const Copy* copies, int64_t count, int64_t threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += copies[i].bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t first = total * thread / threads, end = total * (thread + 1) / threads;
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Copy& copy = copies[i];
      const int64_t from = std::max(first - at, int64_t(0)), to = std::min(end - at, copy.bytes);
      if (from < to) stream(copy.to + from, copy.from + from, to - from);
      at += copy.bytes;
    }
  }
}

// ---------------------------------------------------------------- decoding

namespace {

void decode_row(float* __restrict to, const uint8_t* __restrict code, int64_t count, float scale) {
  for (int64_t j = 0; j < count; ++j) to[j] = decode(code[j]) * scale;
}

// The values of the 128 codes without a sign.
void fill_table(bfloat16* table, float scale) {
  for (int code = 0; code < 128; ++code) narrow(decode(uint8_t(code)) * scale, table[code]);
}

void look_up(bfloat16* __restrict to, const uint8_t* __restrict code, int64_t count,
             const bfloat16* __restrict table) {
  int64_t j = 0;
#ifdef __AVX512BW__
  __m512i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 32 * i);
  for (; j + 32 <= count; j += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + j));
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    const __m512i small = _mm512_permutex2var_epi16(part[0], wide, part[1]);
    const __m512i large = _mm512_permutex2var_epi16(part[2], wide, part[3]);
    const __mmask32 is_large = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
    const __m512i value = _mm512_mask_blend_epi16(is_large, small, large);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-0x8000));
    _mm512_storeu_si512(to + j, _mm512_or_si512(value, sign));
  }
#endif
  for (; j < count; ++j) {
    to[j].bits = uint16_t(table[code[j] & 0x7F].bits | (code[j] & 0x80) << 8);
  }
}

}  // namespace

// value(code) * scale, [rows, columns], as float32 or bfloat16; one scale in all, or one per row.
extern "C" void falqon_decode(const uint8_t* code, const float* scale, int64_t scale_stride,
                              int64_t rows, int64_t columns, int64_t to_bfloat16, int64_t threads,
                              void* to) {
#pragma omp parallel num_threads(threads)
  {
    bfloat16 table[128];
    float known = -1.0f;  // no scale
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float of_row = scale[row * scale_stride];
      const int64_t at = row * columns;
      if (to_bfloat16) {
        if (as_bits(of_row) != as_bits(known)) fill_table(table, known = of_row);
        look_up(static_cast<bfloat16*>(to) + at, code + at, columns, table);
      } else {
        decode_row(static_cast<float*>(to) + at, code + at, columns, of_row);
      }
    }
  }
}

namespace {

constexpr int64_t kBlock4 = 16;  // weights that share a scale of NVFP4

alignas(64) constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Sixteen E2M1 codes, two in a byte, the first in its lower half, times one factor.
void decode_block(float* __restrict to, const uint8_t* __restrict code, float factor) {
#ifdef __AVX2__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(code));
  const __m128i half = _mm_set1_epi8(0x0F);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, half), high);
#ifdef __AVX512F__
  const __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), _mm512_load_ps(kE2M1));
  _mm512_storeu_ps(to, _mm512_mul_ps(value, _mm512_set1_ps(factor)));
#else
  const __m256 sizes = _mm256_load_ps(kE2M1), factors = _mm256_set1_ps(factor);
  for (int part = 0; part < 2; ++part) {
    const __m256i index = _mm256_cvtepu8_epi32(part ? _mm_srli_si128(codes, 8) : codes);
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(index, 3), 31);
    const __m256 size = _mm256_permutevar8x32_ps(sizes, index);  // by the lower three bits
    const __m256 value = _mm256_or_ps(size, _mm256_castsi256_ps(sign));
    _mm256_storeu_ps(to + 8 * part, _mm256_mul_ps(value, factors));
  }
#endif
#else
  for (int64_t j = 0; j < kBlock4; ++j) to[j] = kE2M1[code[j / 2] >> (j % 2 * 4) & 0x0F] * factor;
#endif
}

// As `narrow` does it but for NaNs with a full mantissa, which a product of these never is.
void decode_block(bfloat16* __restrict to, const uint8_t* __restrict code, float factor) {
  float value[kBlock4];
  decode_block(value, code, factor);
  for (int64_t j = 0; j < kBlock4; ++j) {
    const uint32_t bits = as_bits(value[j]);
    to[j].bits = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

template <class T>
void decode_blocks(T* to, const uint8_t* code, int64_t blocks, float scale) {
  const uint8_t* scales = code + blocks * (kBlock4 / 2);
  for (int64_t j = 0; j < blocks; ++j) {
    decode_block(to + j * kBlock4, code + j * (kBlock4 / 2), decode(scales[j]) * scale);
  }
}

}  // namespace

// NVFP4 as falqon_fx/site/nvfp4.py packs it, [rows, 9 * blocks] bytes and one scale, as float32 or
// bfloat16 [rows, 16 * blocks].
extern "C" void falqon_decode_nvfp4(const uint8_t* code, const float* scale, int64_t rows,
                                    int64_t blocks, int64_t to_bfloat16, int64_t threads,
                                    void* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* of_row = code + row * blocks * (kBlock4 / 2 + 1);
    const int64_t at = row * blocks * kBlock4;
    if (to_bfloat16) {
      decode_blocks(static_cast<bfloat16*>(to) + at, of_row, blocks, *scale);
    } else {
      decode_blocks(static_cast<float*>(to) + at, of_row, blocks, *scale);
    }
  }
}

// ---------------------------------------------------------------- rounding to FP8

namespace {

// falqon_fx.site.numerics.round_to_scaled_fp8, which says why it rounds.
void round_row(float* __restrict to, const float* __restrict x, int64_t count,
               float shift_per_unit, float least) {
  for (int64_t j = 0; j < count; ++j) {
    const float size = magnitude(x[j]), wide = size * 0x1p12f;
    const float leading = (wide + size) - wide;
    const float shift = std::max(leading * shift_per_unit, least);  // a NaN stays
    const float rounded = (shift + size) - shift;
    to[j] = as_float((as_bits(rounded) & 0x7FFFFFFFu) | (as_bits(x[j]) & 0x80000000u));
  }
}

}  // namespace

// x [rows, columns] rounded to the values of an FP8 format times a scale, one in all or one per row.
// The format's mantissa has `mantissa` bits, its subnormals are `spacing` apart.
extern "C" void falqon_round(const float* x, const float* scale, int64_t scale_stride, int64_t rows,
                             int64_t columns, int64_t mantissa, int64_t threads, float spacing,
                             float* to) {
  const float shift_per_unit = std::ldexp(1.0f, 23 - int(mantissa));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float least = scale[row * scale_stride] * (0x1p23f * spacing);
    round_row(to + row * columns, x + row * columns, columns, shift_per_unit, least);
  }
}

// ---------------------------------------------------------------- the update

struct Site {
  uint8_t* weight;     // [out + r, in], E4M3
  float* scale;        // [out + r, 1], or one number
  void* applied;       // [out, r]
  const void* lora_b;  // [out, r]
  int64_t* counters;   // see the columns below
  int32_t* writes;     // [out]
  Matrix base;         // [out, in], where Plan::base_dtype says that there is one
  float scaling;
};

enum Counter { kStep = 3, kSite = 4, kNonfinite = 5, kTooLarge = 7 };  // falqon_fx/site/record.py
enum BaseDtype { kNoBase, kFloat32, kBfloat16, kFloat16 };  // as in kernels/cpu/native.py

struct Plan {
  int64_t out, in, rank, count;  // `count` rows are chosen
  uint64_t seed;
  int32_t b_is_bfloat16, applied_is_bfloat16, base_dtype, per_row, pow2, stochastic, drop;
  float limit;  // the largest magnitude that is written, by the row's scale before; 0: any finite one
};

// What whoever watches is told of a site: the rows chosen and whether each was written [count],
// their values before, what was asked of them and what was cast [count, in], and Σ|B - applied| of
// all rows before [out] and of those chosen after [count].
struct Told {
  int64_t* rows;
  bool* worth;
  float *old, *asked, *value, *score, *remains;
};

namespace {

constexpr int64_t kBlock = 64;  // columns that are summed in registers

// to[j] = Σ_r factor[r] · rows[r, j]
void sum_rows(float* __restrict to, const float* __restrict factor, const float* __restrict rows,
              int64_t count, int64_t columns) {
  int64_t first = 0;
  for (; first + kBlock <= columns; first += kBlock) {
    float sum[kBlock] = {0};
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < kBlock; ++j) sum[j] += factor[r] * rows[r * columns + first + j];
    }
    std::copy(sum, sum + kBlock, to + first);
  }
  std::fill(to + first, to + columns, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = first; j < columns; ++j) to[j] += factor[r] * rows[r * columns + j];
  }
}

// to += by; the largest magnitude of the result, a NaN above all.
float add_row(float* __restrict to, const float* __restrict by, int64_t count) {
  uint32_t amax = 0;
  for (int64_t j = 0; j < count; ++j) {
    to[j] += by[j];
    amax = std::max(amax, as_bits(to[j]) & 0x7FFFFFFFu);
  }
  return as_float(amax);
}

void encode_row(uint8_t* __restrict code, const float* __restrict value,
                const uint16_t* __restrict random, int64_t count, float inverse) {
  if (random) {
    for (int64_t j = 0; j < count; ++j) {
      code[j] = encode_stochastic(clamp(value[j] * inverse), random[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) code[j] = encode_nearest(clamp(value[j] * inverse));
  }
}

template <class T>
void widen_row(float* __restrict to, const char* row, int64_t stride, int64_t count) {
  if (stride == int64_t(sizeof(T))) {
    const T* from = reinterpret_cast<const T*>(row);
    for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = widen(*reinterpret_cast<const T*>(row + j * stride));
  }
}

// A row of the base weight, which may be stored [in, out].
void base_row(float* to, const Matrix& base, int64_t row, const Plan& plan) {
  const char* first = base.data + row * base.row_stride;
  const auto run = plan.base_dtype == kFloat32    ? widen_row<float>
                   : plan.base_dtype == kBfloat16 ? widen_row<bfloat16>
                                                  : widen_row<float16>;
  run(to, first, base.column_stride, plan.in);
}

struct Scratch {  // of one thread
  std::vector<uint64_t> keys;
  std::vector<float> lora_a, wanted, moved, whole, value, by;
  std::vector<uint16_t> random;

  explicit Scratch(const Plan& plan)
      : keys(plan.out), lora_a(plan.rank * plan.in), wanted(plan.rank), moved(plan.rank),
        whole(plan.rank), value(plan.in), by(plan.in),
        random(plan.stochastic ? (plan.in / (8 * kLanes) + 1) * 8 * kLanes : 0) {}
};

template <class B, class Applied>
void update(const Site& site, const Plan& plan, const Told* told, Scratch& scratch) {
  auto& [keys, lora_a, wanted, moved, whole, value, by, random] = scratch;
  const int64_t out = plan.out, in = plan.in, rank = plan.rank;
  const B* b = static_cast<const B*>(site.lora_b);
  Applied* applied = static_cast<Applied*>(site.applied);
  const auto target = [&](int64_t at) {
    return plan.drop ? widen(applied[at]) + widen(b[at]) : widen(b[at]);
  };

  // Score of each row, and the rows with the largest, ties to the lowest row.
  int64_t nonfinite = 0;
  for (int64_t row = 0; row < out; ++row) {
    float sums[kLanes] = {0};
    const auto add = [&](int64_t r, int64_t lane) {
      const int64_t at = row * rank + r;
      sums[lane] += magnitude(target(at) - widen(applied[at]));
    };
    int64_t first = 0;
    for (; first + kLanes <= rank; first += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) add(first + lane, lane);
    }
    for (int64_t r = first; r < rank; ++r) add(r, r - first);
    float score = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) score += sums[lane];
    if (told) told->score[row] = score;
    nonfinite += !is_finite(score);
    // A float's bits order like the float when it is not negative.
    const uint64_t size = is_finite(score) ? as_bits(score) : 0;
    keys[row] = size << 32 | (0xFFFFFFFFu - uint32_t(row));
  }
  site.counters[kNonfinite] += nonfinite;
  std::partial_sort(keys.begin(), keys.begin() + plan.count, keys.end(), std::greater<uint64_t>());

  for (int64_t r = 0; r < rank; ++r) {
    decode_row(&lora_a[r * in], site.weight + (out + r) * in, in,
               site.scale[plan.per_row ? out + r : 0]);
  }

  int64_t count = plan.count;
  if (!told) {
    while (count && !(keys[count - 1] >> 32)) --count;  // not worth writing, nor is any behind it
    // As they lie in memory: a base weight stored [in, out] has neighbouring rows in one line.
    std::sort(keys.begin(), keys.begin() + count,
              [](uint64_t a, uint64_t b) { return uint32_t(a) > uint32_t(b); });
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t row = 0xFFFFFFFFu - uint32_t(keys[k]);
    const bool worth = keys[k] >> 32;

    for (int64_t r = 0; r < rank; ++r) {
      const int64_t at = row * rank + r;
      Applied rounded = applied[at];
      wanted[r] = target(at);
      if (worth) narrow(wanted[r], rounded);
      const float before = widen(applied[at]), now = widen(rounded);  // what W' will really contain
      whole[r] = now * site.scaling;
      moved[r] = (now - before) * site.scaling;
    }

    uint8_t* code = site.weight + row * in;
    float& scale = site.scale[plan.per_row ? row : 0];
    const bool from_base = plan.base_dtype != kNoBase;
    if (from_base) base_row(value.data(), site.base, row, plan);
    else decode_row(value.data(), code, in, scale);
    sum_rows(by.data(), (from_base ? whole : moved).data(), lora_a.data(), rank, in);
    if (told) {
      told->rows[k] = row;
      decode_row(told->old + k * in, code, in, scale);
      sum_rows(told->asked + k * in, moved.data(), lora_a.data(), rank, in);
    }

    const float amax = add_row(value.data(), by.data(), in);
    if (told) std::copy(value.begin(), value.end(), told->value + k * in);
    const bool too_large = !is_finite(amax) || (plan.limit > 0 && amax > plan.limit * scale);
    const bool written = worth && !too_large;
    site.counters[kTooLarge] += worth && too_large;
    float remains = 0;
    for (int64_t r = 0; r < rank; ++r) {
      Applied& to = applied[row * rank + r];
      if (written) narrow(wanted[r], to);
      remains += magnitude(wanted[r] - widen(to));
    }
    if (told) told->worth[k] = written, told->remains[k] = remains;
    if (!written) continue;
    if (plan.per_row) scale = amax_to_scale(amax, plan.pow2);
    if (plan.stochastic) {
      philox(random.data(), in, uint32_t(row), uint32_t(site.counters[kStep]),
             uint32_t(site.counters[kSite]), plan.seed);
    }
    encode_row(code, value.data(), plan.stochastic ? random.data() : nullptr, in, 1.0f / scale);
    ++site.writes[row];
  }
}

}  // namespace

extern "C" void falqon_update(const Site* sites, const Told* told, int64_t count, const Plan* plan,
                              int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(*plan);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Told* of_site = told ? told + i : nullptr;
      const auto run = plan->b_is_bfloat16
          ? (plan->applied_is_bfloat16 ? update<bfloat16, bfloat16> : update<bfloat16, float>)
          : (plan->applied_is_bfloat16 ? update<float, bfloat16> : update<float, float>);
      run(sites[i], *plan, of_site, scratch);
    }
  }
}
