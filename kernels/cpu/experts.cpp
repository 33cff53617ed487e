// Products of stacked experts on a CPU that multiplies bfloat16 (AVX512_BF16): FP8 weights are decoded
// a few rows at a time, straight into the registers' order, while they lie in the cache. What
// falqon_fx/ops/grouped.py says in ATen operations, which decode whole experts to memory and let the
// library bring them into its own order there. Bound by kernels/cpu/experts.py.
//
// A pair is two neighbours in the sum, two bfloat16 in 32 bits: what the instruction multiplies.

#include <algorithm>
#include <type_traits>
#include <vector>

// Where there are tiles for it (AMX), the library multiplies faster.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    !defined(__AMX_BF16__)
#define FALQON_BF16 1
#include <immintrin.h>
#endif

extern "C" void falqon_takes(int64_t* takes) {
#ifdef FALQON_BF16
  *takes = 1;
#else
  *takes = 0;
#endif
}

// Weights [experts, m, k] in E4M3 with one scale per row (null: 1), or (values) in bfloat16, and what a product adds to them:
// left [S, r] times right, [experts, m, r] in bfloat16 forward and [experts, r, k] in E4M3 backward.
struct Stack {
  const uint8_t* code;
  const uint16_t* values;
  const float* scale;
  const uint16_t* left;
  const void* right;
  int64_t m, k, rank;
};

// The rows of x [.., k] in the order of the experts: row i reads row rows[i] of x (null: i); expert e
// has those up to ends[e].
struct Rows {
  const int64_t* rows;
  const int32_t* ends;
  int64_t experts, count;
};

#ifdef FALQON_BF16
namespace {

using Pairs = __m512i;  // 16 of them

__m512 times(__m512 sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// The values of the 128 codes without a sign, times a scale, as bfloat16.
struct Table {
  __m512i part[4];

  explicit Table(float scale) {
    alignas(64) uint16_t value[128];
    for (uint32_t code = 0; code < 128; ++code) {
      const float normal = as_float((code << 20) + (120u << 23));
      const float subnormal = as_float((code << 20) + (121u << 23)) - 0x1p-6f;
      const float exact = (code < 8 ? subnormal : normal) * scale;
      bfloat16 rounded;
      narrow(exact, rounded);
      value[code] = uint16_t(code == 127 ? 0x7FC0u : rounded.bits);
    }
    for (int i = 0; i < 4; ++i) part[i] = _mm512_load_si512(value + 32 * i);
  }

  // Of 32 bytes.
  __m512i operator()(__m256i bytes) const {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    const __m512i small = _mm512_permutex2var_epi16(part[0], wide, part[1]);
    const __m512i large = _mm512_permutex2var_epi16(part[2], wide, part[3]);
    const __mmask32 is_large = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
    const __m512i value = _mm512_mask_blend_epi16(is_large, small, large);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-0x8000));
    return _mm512_or_si512(value, sign);
  }
};

__mmask32 first(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u; }

void decode_row(uint16_t* to, const uint8_t* code, int64_t count, const Table& table) {
  for (int64_t j = 0; j < count; j += 32) {
    const __mmask32 some = first(count - j);
    _mm512_mask_storeu_epi16(to + j, some, table(_mm256_maskz_loadu_epi8(some, code + j)));
  }
}

// To the nearest, ties to even; a NaN stays one.
__m256i narrow(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

// 16 rows of 16 numbers, turned.
void turn(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
    v[i] = _mm512_shuffle_i32x4(a, b, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, b, 0xDD);
    v[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(c, d, 0xDD);
  }
}

constexpr int64_t kTile = 16, kHigh = 8;  // rows of x, and of W, in registers (two tiles of x's)
constexpr int64_t kRows = 128, kOuts = 128;  // rows of x and of W of one task

// Rows of numbers, each `columns` long and padded to pairs, as [tile of 16 rows][pair][row].
struct Packed {
  std::vector<uint32_t> at;
  int64_t pairs = 0;

  // The pairs of `count` rows from `pair` on; row(i) is where row i lies.
  template <class Row>
  void put(int64_t pair, int64_t count, int64_t columns, Row row) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t tile = 0; tile * kTile < count; ++tile) {
      for (int64_t j = 0; j < columns; j += 2 * kTile) {
        const __mmask32 some = first(columns - j);
        __m512i v[kTile];
        for (int64_t i = 0; i < kTile; ++i) {
          const int64_t own = tile * kTile + i;
          v[i] = own < count ? _mm512_maskz_loadu_epi16(some, row(own) + j) : none;
        }
        turn(v);
        uint32_t* to = at.data() + (tile * pairs + pair + j / 2) * kTile;
        const int64_t here = std::min(kTile, (columns - j + 1) / 2);
        for (int64_t p = 0; p < here; ++p) _mm512_storeu_si512(to + p * kTile, v[p]);
      }
    }
  }
};

// sums[h][t] of `High` rows of pairs, `stride` apart, and one or two tiles.
template <int High, int Tiles>
__attribute__((noinline)) void multiply(float (*sums)[2 * kTile], const uint32_t* rows, int64_t stride, const uint32_t* tiles,
              int64_t pairs) {
  __m512 sum[High][Tiles];
  for (int h = 0; h < High; ++h) {
    for (int t = 0; t < Tiles; ++t) sum[h][t] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    Pairs x[Tiles];
    for (int t = 0; t < Tiles; ++t) x[t] = _mm512_loadu_si512(tiles + (t * pairs + p) * kTile);
    for (int h = 0; h < High; ++h) {
      const Pairs w = _mm512_set1_epi32(int(rows[h * stride + p]));
      for (int t = 0; t < Tiles; ++t) sum[h][t] = times(sum[h][t], x[t], w);
    }
  }
  for (int h = 0; h < High; ++h) {
    for (int t = 0; t < Tiles; ++t) _mm512_storeu_ps(sums[h] + t * kTile, sum[h][t]);
  }
}

// 16 columns of 8 rows of sums, as bfloat16 in `count` rows of `columns`.
void store_turned(uint16_t* to, int64_t stride, int64_t count, int64_t columns,
                  const float (*sums)[2 * kTile], int64_t from) {
  const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                             24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                             16, 0);
  __m512i pair[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 one = _mm512_loadu_ps(sums[2 * i] + from);
    const __m512 other = _mm512_loadu_ps(sums[2 * i + 1] + from);
    pair[i] = _mm512_permutexvar_epi16(alternate, (__m512i)_mm512_cvtne2ps_pbh(other, one));
  }
  const __m512i a = _mm512_unpacklo_epi32(pair[0], pair[1]);
  const __m512i b = _mm512_unpackhi_epi32(pair[0], pair[1]);
  const __m512i c = _mm512_unpacklo_epi32(pair[2], pair[3]);
  const __m512i d = _mm512_unpackhi_epi32(pair[2], pair[3]);
  // Of rows r, r + 4, r + 8 and r + 12.
  alignas(64) uint16_t rows[4][4][kHigh];
  _mm512_store_si512(rows[0], _mm512_unpacklo_epi64(a, c));
  _mm512_store_si512(rows[1], _mm512_unpackhi_epi64(a, c));
  _mm512_store_si512(rows[2], _mm512_unpacklo_epi64(b, d));
  _mm512_store_si512(rows[3], _mm512_unpackhi_epi64(b, d));
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(to + r * stride, rows[r % 4][r / 4], columns == kHigh ? 2 * kHigh : 2 * columns);
  }
}

struct Part {
  int64_t expert, first, end;
};

// The rows of each expert, in parts of at most `most`.
std::vector<Part> parts_of(const Rows& rows, int64_t most) {
  std::vector<Part> parts;
  int64_t start = 0;
  for (int64_t e = 0; e < rows.experts; ++e) {
    const int64_t end = std::min<int64_t>(std::max<int64_t>(rows.ends[e], start), rows.count);
    for (int64_t at = start; at < end; at += most) {
      parts.push_back({e, at, std::min(at + most, end)});
    }
    start = end;
  }
  return parts;
}

// Rows [first, end) of y, from the W rows [out, last) of the part's expert.
void forward_task(const Part& part, int64_t out, int64_t last, const Packed& x, const Stack& w,
                  std::vector<uint16_t>& own, uint16_t* y) {
  const int64_t count = part.end - part.first, stride = 2 * x.pairs, even = (w.k + 1) / 2 * 2;
  const auto* right = static_cast<const uint16_t*>(w.right);
  float known = 0.0f;
  Table table(known);
  for (int64_t row = out; row < last; row += kHigh) {
    const int64_t high = std::min(kHigh, last - row);
    for (int64_t h = 0; h < high; ++h) {
      const int64_t at = part.expert * w.m + row + h;
      uint16_t* to = own.data() + h * stride;
      if (w.values) {
        std::memcpy(to, w.values + at * w.k, 2 * w.k);
      } else {
        const float scale = w.scale ? w.scale[at] : 1.0f;
        if (scale != known) table = Table(known = scale);
        const uint8_t* code = w.code + at * w.k;
        // Those that are decoded next, while these are multiplied.
        for (int64_t j = 0; j < w.k; j += 64) __builtin_prefetch(code + kHigh * w.k + j, 0, 0);
        decode_row(to, code, w.k, table);
      }
      if (w.rank) std::memcpy(to + even, right + at * w.rank, 2 * w.rank);
    }
    const auto* rows = reinterpret_cast<const uint32_t*>(own.data());
    for (int64_t i = 0; i < count; i += 2 * kTile) {
      alignas(64) float sums[kHigh][2 * kTile];
      const uint32_t* tiles = x.at.data() + i * x.pairs;
      if (count - i > kTile) multiply<kHigh, 2>(sums, rows, x.pairs, tiles, x.pairs);
      else multiply<kHigh, 1>(sums, rows, x.pairs, tiles, x.pairs);
      for (int64_t j = i; j < std::min(i + 2 * kTile, count); j += kTile) {
        const int64_t here = std::min(kTile, count - j);
        store_turned(y + (part.first + j) * w.m + row, w.m, here, high, sums, j - i);
      }
    }
  }
}

}  // namespace
#endif

// y [count, m] = x_e · dq(W_e)ᵀ + left_e · right_eᵀ in bfloat16, for x [.., k] with rows `x_stride`
// apart. Rows behind the last expert's are zeros.
extern "C" void falqon_experts_forward(const uint16_t* x, int64_t x_stride, const Rows* rows,
                                       const Stack* w, int64_t threads, uint16_t* y) {
#ifdef FALQON_BF16
  const std::vector<Part> parts = parts_of(*rows, kRows);
  const int64_t blocks = (w->m + kOuts - 1) / kOuts, tasks = blocks * int64_t(parts.size());
  const int64_t behind = parts.empty() ? 0 : parts.back().end;
  std::memset(y + behind * w->m, 0, size_t(rows->count - behind) * w->m * 2);
#pragma omp parallel num_threads(threads)
  {
    Packed packed;
    packed.pairs = (w->k + 1) / 2 + (w->rank + 1) / 2;
    packed.at.resize(kRows * packed.pairs);
    std::vector<uint16_t> own(kHigh * 2 * packed.pairs, 0);
    int64_t held = -1;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t which = task / blocks, out = task % blocks * kOuts;
      const Part& part = parts[which];
      if (which != held) {
        held = which;
        packed.put(0, part.end - part.first, w->k, [&](int64_t i) {
          const int64_t at = part.first + i;
          return x + (rows->rows ? rows->rows[at] : at) * x_stride;
        });
        packed.put((w->k + 1) / 2, part.end - part.first, w->rank,
                   [&](int64_t i) { return w->left + (part.first + i) * w->rank; });
      }
      forward_task(part, out, std::min(out + kOuts, w->m), packed, *w, own, y);
    }
  }
#endif
}

#ifdef FALQON_BF16
namespace {

constexpr int64_t kColumns = 64, kLow = 6;  // columns of W, and rows of dL/dO, in registers

// 32 numbers of one row below those of another, each two in 32 bits.
void put_pairs(uint32_t* to, __m512i one, __m512i other) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(one));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(one, 1));
  const __m512i over = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(other));
  const __m512i next = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(other, 1));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(over, 16)));
  _mm512_storeu_si512(to + 16, _mm512_or_si512(high, _mm512_slli_epi32(next, 16)));
}

// run(std::integral_constant of count), for the few counts that there are.
template <class Run>
void by_count(int64_t count, Run run) {
  switch (count) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
  }
}

// Rows of codes as [pair of rows][64 columns] of values, from a row of pairs on.
void decode_columns(uint32_t* to, const uint8_t* code, int64_t rows, int64_t stride, int64_t columns,
                    const Table& table) {
  constexpr int64_t kAhead = 64;  // a row is a page or more from the next: no hardware looks ahead
  for (int64_t i = 0; i < rows; i += 2) {
    if (i + kAhead + 1 < rows) {
      __builtin_prefetch(code + (i + kAhead) * stride, 0, 0);
      __builtin_prefetch(code + (i + kAhead + 1) * stride, 0, 0);
    }
    for (int64_t j = 0; j < kColumns; j += 32) {
      const __mmask32 some = first(columns - j);
      const uint8_t* at = code + i * stride + j;
      const __m512i a = table(_mm256_maskz_loadu_epi8(some, at));
      const __mmask32 second = i + 1 < rows ? some : 0;
      const __m512i b = table(_mm256_maskz_loadu_epi8(second, at + (i + 1 < rows ? stride : 0)));
      put_pairs(to + (i / 2) * kColumns + j, a, b);
    }
  }
}

// Adds `Low` rows of pairs times [pair][64 columns] to sums, which are registers.
template <int Low>
__attribute__((always_inline)) inline void add_product(__m512 (*sum)[4], const uint16_t* rows, int64_t stride, int64_t count,
                 const uint32_t* columns) {
  const int64_t whole = count / 2;
  for (int64_t p = 0; p < whole; ++p) {
    Pairs w[4];
    for (int c = 0; c < 4; ++c) w[c] = _mm512_loadu_si512(columns + p * kColumns + 16 * c);
    for (int i = 0; i < Low; ++i) {
      int32_t pair;
      std::memcpy(&pair, rows + i * stride + 2 * p, sizeof pair);
      for (int c = 0; c < 4; ++c) sum[i][c] = times(sum[i][c], w[c], _mm512_set1_epi32(pair));
    }
  }
  if (count % 2) {
    for (int i = 0; i < Low; ++i) {
      const Pairs pair = _mm512_set1_epi32(rows[i * stride + count - 1]);
      for (int c = 0; c < 4; ++c) {
        const Pairs w = _mm512_loadu_si512(columns + whole * kColumns + 16 * c);
        sum[i][c] = times(sum[i][c], w, pair);
      }
    }
  }
}

struct Grad {
  const uint16_t* g;  // [S, m]
  const Stack* w;
  const Rows* rows;
  const uint32_t *of_w, *of_a;  // decoded columns
  float* sums;                  // [n, k], or null
  uint16_t* to;                 // [S, k], where sums is null
};

template <int Low>
void grad_rows(const Grad& of, int64_t row, int64_t column) {
  __m512 sum[Low][4];
  for (int i = 0; i < Low; ++i) {
    for (int c = 0; c < 4; ++c) sum[i][c] = _mm512_setzero_ps();
  }
  const Stack& w = *of.w;
  add_product<Low>(sum, of.g + row * w.m, w.m, w.m, of.of_w);
  if (w.rank) add_product<Low>(sum, w.left + row * w.rank, w.rank, w.rank, of.of_a);
  for (int i = 0; i < Low; ++i) {
    for (int c = 0; c < 4; ++c) {
      const int64_t left = std::min<int64_t>(16, w.k - column - 16 * c);
      if (left <= 0) break;
      const __mmask16 some = __mmask16((1u << left) - 1u);
      if (of.sums) {
        const int64_t own = of.rows->rows[row + i];
        float* at = of.sums + own * w.k + column + 16 * c;
        _mm512_mask_storeu_ps(at, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, at), sum[i][c]));
      } else {
        uint16_t* at = of.to + (row + i) * w.k + column + 16 * c;
        _mm256_mask_storeu_epi16(at, some, narrow(sum[i][c]));
      }
    }
  }
}

}  // namespace
#endif

// g_e · W_e + left_e · dq(right_e) of g [count, m] in bfloat16: added to sums [n, k], float32, in the
// rows that `rows` names, in their order; or without `rows` as `to` [count, k] in bfloat16, whose rows
// behind the last expert's are zeros.
extern "C" void falqon_experts_backward(const uint16_t* g, const Rows* rows, const Stack* w,
                                        int64_t threads, float* sums, uint16_t* to) {
#ifdef FALQON_BF16
  const std::vector<Part> parts = parts_of(*rows, rows->count);
  const int64_t behind = parts.empty() ? 0 : parts.back().end;
  if (to) std::memset(to + behind * w->k, 0, size_t(rows->count - behind) * w->k * 2);
  const Table table(1.0f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> of_w((w->m + 1) / 2 * kColumns), of_a((w->rank + 1) / 2 * kColumns);
    // A thread has some columns of all rows, so that none adds to a row that another adds to.
#pragma omp for schedule(dynamic)
    for (int64_t column = 0; column < w->k; column += kColumns) {
      for (const Part& part : parts) {
        const int64_t left = w->k - column;
        const uint8_t* code = w->code + part.expert * w->m * w->k + column;
        decode_columns(of_w.data(), code, w->m, w->k, left, table);
        if (w->rank) {
          const auto* right = static_cast<const uint8_t*>(w->right);
          decode_columns(of_a.data(), right + part.expert * w->rank * w->k + column, w->rank, w->k,
                         left, table);
        }
        const Grad of{g, w, rows, of_w.data(), of_a.data(), sums, to};
        for (int64_t row = part.first; row < part.end; row += kLow) {
          by_count(std::min(kLow, part.end - row),
                   [&](auto low) { grad_rows<low>(of, row, column); });
        }
      }
    }
  }
#endif
}

#ifdef FALQON_BF16
namespace {

// What is summed over each expert's rows: low [S, r] with wide [.., k], bfloat16 or (codes) E4M3.
struct Outer {
  const uint16_t* low;
  const uint16_t* wide;
  const uint8_t* codes;
  int64_t rank, k;
  float factor;
};

// Neighbouring rows of `wide` as [pair of rows][64 columns].
void pair_rows(uint32_t* to, const Outer& of, const Rows& rows, const Part& part, int64_t column,
               const Table& table) {
  for (int64_t i = part.first; i < part.end; i += 2, to += kColumns) {
    for (int64_t j = 0; j < kColumns; j += 32) {
      const __mmask32 some = first(of.k - column - j);
      __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t h = 0; h < std::min<int64_t>(2, part.end - i); ++h) {
        const int64_t row = rows.rows ? rows.rows[i + h] : i + h, at = row * of.k + column + j;
        both[h] = of.codes ? table(_mm256_maskz_loadu_epi8(some, of.codes + at))
                           : _mm512_maskz_loadu_epi16(some, of.wide + at);
      }
      put_pairs(to + j, both[0], both[1]);
    }
  }
}

// factor times `Low` rows of pairs times those of `wide`, as [row][64 columns].
template <int Low>
void outer_rows(float* to, const uint16_t* low, int64_t stride, int64_t pairs, const uint32_t* wide,
                float factor) {
  __m512 sum[Low][4];
  for (int i = 0; i < Low; ++i) {
    for (int c = 0; c < 4; ++c) sum[i][c] = _mm512_setzero_ps();
  }
  add_product<Low>(sum, low, stride, 2 * pairs, wide);
  const __m512 times = _mm512_set1_ps(factor);
  for (int i = 0; i < Low; ++i) {
    for (int c = 0; c < 4; ++c) {
      _mm512_storeu_ps(to + i * kColumns + 16 * c, _mm512_mul_ps(sum[i][c], times));
    }
  }
}

// What an outer product is stored as: float32 or bfloat16, some of 16 numbers from a place on.
struct Stored {
  float* wide;
  uint16_t* half;

  void put(int64_t at, __m512 value, int64_t count) const {
    const __mmask16 some = count >= 16 ? 0xFFFF : __mmask16((1u << count) - 1u);
    if (wide) _mm512_mask_storeu_ps(wide + at, some, value);
    else _mm256_mask_storeu_epi16(half + at, some, narrow(value));
  }
};

// Up to 16 experts' [rank][64 columns] as [column, rank, experts], from the expert `first` on.
void store_fastest(const Stored& to, const float* made, int64_t first, int64_t count,
                   const Outer& of, int64_t experts, int64_t column) {
  for (int64_t j = 0; j < of.rank; ++j) {
    for (int64_t c = 0; c < std::min(kColumns, of.k - column); c += 16) {
      __m512i v[kTile];
      for (int64_t e = 0; e < kTile; ++e) {
        const float* from = made + (std::min(e, count - 1) * of.rank + j) * kColumns + c;
        v[e] = _mm512_loadu_si512(from);
      }
      turn(v);
      for (int64_t i = 0; i < std::min<int64_t>(16, of.k - column - c); ++i) {
        const int64_t at = ((column + c + i) * of.rank + j) * experts + first;
        to.put(at, (__m512)v[i], count);
      }
    }
  }
}

// One expert's as [experts · rank, columns].
void store_slowest(const Stored& to, const float* made, int64_t expert, const Outer& of,
                   int64_t column) {
  for (int64_t j = 0; j < of.rank; ++j) {
    for (int64_t c = 0; c < std::min(kColumns, of.k - column); c += 16) {
      const int64_t at = (expert * of.rank + j) * of.k + column + c;
      to.put(at, _mm512_loadu_ps(made + j * kColumns + c), of.k - column - c);
    }
  }
}

// Rows [S, r] as [part][r][rows of the part], each padded to pairs.
std::vector<uint16_t> turned_parts(const Outer& of, const std::vector<Part>& parts,
                                   std::vector<int64_t>& places) {
  int64_t size = 0;
  for (const Part& part : parts) {
    places.push_back(size);
    size += of.rank * ((part.end - part.first + 1) / 2 * 2);
  }
  std::vector<uint16_t> turned(size, 0);
  for (size_t p = 0; p < parts.size(); ++p) {
    const int64_t count = parts[p].end - parts[p].first, stride = (count + 1) / 2 * 2;
    const uint16_t* from = of.low + parts[p].first * of.rank;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < of.rank; ++j) {
        turned[places[p] + j * stride + i] = from[i * of.rank + j];
      }
    }
  }
  return turned;
}

}  // namespace
#endif

// factor · low_eᵀ · wide_e of each expert, summed over its rows, which `rows` names in wide alone; as
// [experts · r, k], or with `fastest` as [k, r · experts], the experts fastest.
extern "C" void falqon_experts_outer(const uint16_t* low, const uint16_t* wide, const uint8_t* codes,
                                     const Rows* rows, int64_t rank, int64_t k, int64_t fastest,
                                     int64_t threads, float factor, int64_t to_bfloat16, void* to) {
#ifdef FALQON_BF16
  const Outer of{low, wide, codes, rank, k, factor};
  const std::vector<Part> parts = parts_of(*rows, rows->count);
  std::vector<int64_t> places, own(rows->experts, -1);  // of an expert, its part
  int64_t most = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    own[parts[p].expert] = int64_t(p);
    most = std::max(most, parts[p].end - parts[p].first);
  }
  const std::vector<uint16_t> turned = turned_parts(of, parts, places);
  const Stored stored{to_bfloat16 ? nullptr : static_cast<float*>(to),
                      to_bfloat16 ? static_cast<uint16_t*>(to) : nullptr};
  const Table table(1.0f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> columns((most + 1) / 2 * kColumns);
    std::vector<float> made(kTile * rank * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t column = 0; column < k; column += kColumns) {
      for (int64_t expert = 0; expert < rows->experts; ++expert) {
        float* to = made.data() + (fastest ? expert % kTile : 0) * rank * kColumns;
        if (own[expert] < 0) {
          std::fill(to, to + rank * kColumns, 0.0f);
        } else {
          const Part& part = parts[own[expert]];
          const int64_t pairs = (part.end - part.first + 1) / 2;
          pair_rows(columns.data(), of, *rows, part, column, table);
          for (int64_t j = 0; j < rank; j += kLow) {
            const uint16_t* from = turned.data() + places[own[expert]] + j * 2 * pairs;
            by_count(std::min(kLow, rank - j), [&](auto low_rows) {
              outer_rows<low_rows>(to + j * kColumns, from, 2 * pairs, pairs, columns.data(),
                                   factor);
            });
          }
        }
        if (!fastest) {
          store_slowest(stored, to, expert, of, column);
        } else if (expert % kTile == kTile - 1 || expert == rows->experts - 1) {
          const int64_t first = expert / kTile * kTile;
          store_fastest(stored, made.data(), first, expert - first + 1, of, rows->experts, column);
        }
      }
    }
  }
#endif
}
