// 1xN blocks of int8 times rows of int8: products are summed exactly, in int32.
//
// One instruction adds four products of unsigned by signed bytes to a sum of 32 bits. So inputs are
// stored with 128 added, and each output's sum starts at -128 times the sum of its weights.
#pragma once

#include "panels.h"

namespace nmjax::NMJAX_ISA {

// Pixels of a panel; a vector holds four bytes for each of kLanes pixels.
constexpr int kWoven = 4;
constexpr int kRows = kWoven * kLanes;
// Vectors of pixels and outputs whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int kIntegerVectors = 4, kIntegerOutputs = 4;
#else
constexpr int kIntegerVectors = 2, kIntegerOutputs = 2;
#endif
// Groups of four blocks whose pixels, woven, stay in the first-level cache.
constexpr int kQuads = 64;

// Where in a panel's row of bytes the pixel is that lands in vector p / kLanes, lane p % kLanes.
inline int64_t place_of(int64_t p) {
  const int64_t lane = p % kLanes;
  return 16 * (lane / 4) + 4 * (p / kLanes) + lane % 4;
}

// sums += four products of bytes in each lane, pixels unsigned and weights signed.
inline Integers add_products(Integers sums, Integers pixels, Integers weights) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)pixels, (__m512i)weights);
#elif defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi16(255), p = (__m512i)pixels, w = (__m512i)weights;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(p, low),
                                         _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(p, 8), _mm512_srai_epi16(w, 8));
  return sums + (Integers)_mm512_add_epi32(even, odd);
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(255), p = (__m256i)pixels, w = (__m256i)weights;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(p, low),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(p, 8), _mm256_srai_epi16(w, 8));
  return sums + (Integers)_mm256_add_epi32(even, odd);
#else
  const Bits p = (Bits)pixels, w = (Bits)weights;
  NMJAX_UNROLL for (int i = 0; i < 4; ++i) {
    sums += (Integers)(p >> (8 * i) & 255) * ((Integers)(w << (24 - 8 * i)) >> 24);
  }
  return sums;
#endif
}

// Four rows of kRows bytes -> vectors with one byte of each row in every lane.
inline void weave(const uint8_t* const (&rows)[4], Integers (&woven)[kWoven]) {
#if defined(__AVX512F__)
  const __m512i a = load<__m512i>(rows[0]), b = load<__m512i>(rows[1]),
                c = load<__m512i>(rows[2]), d = load<__m512i>(rows[3]);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  woven[0] = (Integers)_mm512_unpacklo_epi16(ab, cd);
  woven[1] = (Integers)_mm512_unpackhi_epi16(ab, cd);
  woven[2] = (Integers)_mm512_unpacklo_epi16(AB, CD);
  woven[3] = (Integers)_mm512_unpackhi_epi16(AB, CD);
#elif defined(__AVX2__)
  const __m256i a = load<__m256i>(rows[0]), b = load<__m256i>(rows[1]),
                c = load<__m256i>(rows[2]), d = load<__m256i>(rows[3]);
  const __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
  const __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
  woven[0] = (Integers)_mm256_unpacklo_epi16(ab, cd);
  woven[1] = (Integers)_mm256_unpackhi_epi16(ab, cd);
  woven[2] = (Integers)_mm256_unpacklo_epi16(AB, CD);
  woven[3] = (Integers)_mm256_unpackhi_epi16(AB, CD);
#else
  for (int p = 0; p < kRows; ++p) {
    const int64_t at = place_of(p);
    uint32_t lane = 0;
    for (int i = 0; i < 4; ++i) lane |= static_cast<uint32_t>(rows[i][at]) << (8 * i);
    woven[p / kLanes][p % kLanes] = static_cast<int32_t>(lane);
  }
#endif
}

// Weights of four blocks side by side for each output; zeros beyond the last block.
inline void weave_weights(const int8_t* w, int64_t n, int64_t count, int32_t* quads) {
  for (int64_t k = 0; k < count; k += 4, quads += n) {
    int64_t j = 0;
#if defined(__AVX2__) || defined(__AVX512F__)
    for (; k + 4 <= count && j + 16 <= n; j += 16) {
      const int8_t* from = w + k * n + j;
      const __m128i a = load<__m128i>(from), b = load<__m128i>(from + n),
                    c = load<__m128i>(from + 2 * n), d = load<__m128i>(from + 3 * n);
      const __m128i ab = _mm_unpacklo_epi8(a, b), AB = _mm_unpackhi_epi8(a, b);
      const __m128i cd = _mm_unpacklo_epi8(c, d), CD = _mm_unpackhi_epi8(c, d);
      store(quads + j, _mm_unpacklo_epi16(ab, cd));
      store(quads + j + 4, _mm_unpackhi_epi16(ab, cd));
      store(quads + j + 8, _mm_unpacklo_epi16(AB, CD));
      store(quads + j + 12, _mm_unpackhi_epi16(AB, CD));
    }
#endif
    for (; j < n; ++j) {
      uint32_t quad = 0;
      for (int i = 0; i < 4 && k + i < count; ++i) {
        quad |= static_cast<uint32_t>(static_cast<uint8_t>(w[(k + i) * n + j])) << (8 * i);
      }
      quads[j] = static_cast<int32_t>(quad);
    }
  }
}

// What 128 more in every input adds to the sum of an output.
inline int32_t excess(const int8_t* w, int64_t n, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += w[k * n];
  return 128 * sum;
}

template <int kV, int kJ>
inline void multiply_woven(int32_t* sums, const Integers* woven, const int32_t* quads, int64_t n,
                           int64_t count) {
  Integers sum[kJ][kV];
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] = load<Integers>(sums + j * kRows + v * kLanes);
  }
  for (int64_t k = 0; k < count; ++k, woven += kWoven, quads += n) {
    Integers p[kV];
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) p[v] = woven[v];
    NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
      const Integers w = quads[j] + Integers{};
      NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] = add_products(sum[j][v], p[v], w);
    }
  }
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) store(sums + j * kRows + v * kLanes, sum[j][v]);
  }
}

// Sums of n outputs, kV vectors of pixels each.
template <int kV>
inline void multiply_outputs(int32_t* sums, const Integers* woven, const int32_t* quads, int64_t n,
                             int64_t count) {
  int64_t j = 0;
  for (; j + kIntegerOutputs <= n; j += kIntegerOutputs) {
    multiply_woven<kV, kIntegerOutputs>(sums + j * kRows, woven, quads + j, n, count);
  }
  for (; j < n; ++j) multiply_woven<kV, 1>(sums + j * kRows, woven, quads + j, n, count);
}

// sums (n, kRows) += blocks [0, count) x the first pixels of one panel.
inline void multiply_panel(const IntegerTask& task, const uint8_t* panel, int64_t pixels,
                           int64_t count, int32_t* sums) {
  const int64_t n = task.blocks->n;
  Integers* woven = static_cast<Integers*>(task.woven);
  for (int64_t begin = 0; begin < count; begin += 4 * kQuads) {
    const int64_t end = least(begin + 4 * kQuads, count), quads = (end - begin + 3) / 4;
    for (int64_t q = 0; q < quads; ++q) {
      const uint8_t* rows[4];
      for (int i = 0; i < 4; ++i) {
        // Beyond the last block any pixels do: their weights are zeros.
        const int64_t k = least(begin + 4 * q + i, count - 1);
        rows[i] = panel + static_cast<int64_t>(task.indices[k]) * kRows;
      }
      Integers four[kWoven];
      weave(rows, four);
      for (int v = 0; v < kWoven; ++v) woven[q * kWoven + v] = four[v];
    }
    const int32_t* weights = task.quads + begin / 4 * n;
    for (int v = 0; v < kWoven && v * kLanes < pixels; v += kIntegerVectors) {
      int32_t* to = sums + v * kLanes;
      if (pixels - v * kLanes <= 2 * kLanes) {
        multiply_outputs<2>(to, woven + v, weights, n, quads);
      } else {
        multiply_outputs<kIntegerVectors>(to, woven + v, weights, n, quads);
      }
    }
  }
}

// The indices of a row of blocks, widened; false if one is out of range.
inline bool read_indices(const Blocks& b, int64_t begin, int64_t end, uint32_t* indices) {
  uint32_t largest = 0;
  for (int64_t k = begin; k < end; ++k) {
    const uint32_t index = b.index_bytes == 1   ? static_cast<const uint8_t*>(b.indices)[k]
                           : b.index_bytes == 2 ? static_cast<const uint16_t*>(b.indices)[k]
                                                : static_cast<const uint32_t*>(b.indices)[k];
    largest = index > largest ? index : largest;
    indices[k - begin] = index;
  }
  return begin == end || largest < b.inputs;
}

// The inverse of `weave`.
inline void unweave(const Integers (&woven)[kWoven], uint8_t* const (&rows)[4]) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i s[kWoven];
  for (int v = 0; v < kWoven; ++v) s[v] = _mm512_shuffle_epi8((__m512i)woven[v], bytes);
  const __m512i a = _mm512_unpacklo_epi32(s[0], s[1]), b = _mm512_unpacklo_epi32(s[2], s[3]);
  const __m512i c = _mm512_unpackhi_epi32(s[0], s[1]), d = _mm512_unpackhi_epi32(s[2], s[3]);
  store(rows[0], _mm512_unpacklo_epi64(a, b));
  store(rows[1], _mm512_unpackhi_epi64(a, b));
  store(rows[2], _mm512_unpacklo_epi64(c, d));
  store(rows[3], _mm512_unpackhi_epi64(c, d));
#else
  for (int p = 0; p < kRows; ++p) {
    const uint32_t lane = static_cast<uint32_t>(woven[p / kLanes][p % kLanes]);
    for (int i = 0; i < 4; ++i) rows[i][place_of(p)] = static_cast<uint8_t>(lane >> (8 * i));
  }
#endif
}

// Rows of int8 [begin, end) into their panel, with 128 added; missing rows are zeros.
inline void pack_integers(const int8_t* x, int64_t inputs, int64_t begin, int64_t end,
                          uint8_t* panel) {
  constexpr int64_t kStrip = 4 * kLanes;
  int64_t k = 0;
  for (; k + kStrip <= inputs; k += kStrip) {
    Vector squares[kWoven][kLanes];
    for (int v = 0; v < kWoven; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t p = begin + v * kLanes + i;
        squares[v][i] = p < end ? load<Vector>(x + p * inputs + k) : Vector{};
      }
      transpose(squares[v]);
    }
    for (int q = 0; q < kLanes; ++q) {
      Integers woven[kWoven];
      for (int v = 0; v < kWoven; ++v) {
        woven[v] = reinterpret_cast<Integers>(squares[v][q]) ^ static_cast<int32_t>(0x80808080);
      }
      uint8_t* to = panel + (k + 4 * q) * kRows;
      unweave(woven, {to, to + kRows, to + 2 * kRows, to + 3 * kRows});
    }
  }
  for (; k < inputs; ++k) {
    for (int64_t p = 0; p < kRows; ++p) {
      const int8_t number = begin + p < end ? x[(begin + p) * inputs + k] : int8_t{0};
      panel[k * kRows + place_of(p)] = static_cast<uint8_t>(number) ^ 128;
    }
  }
}

inline bool integers_times_panels(const IntegerTask& task) {
  const Blocks& b = *task.blocks;
  const int64_t n = b.n, first = task.row_begin * n, outputs = (task.row_end - task.row_begin) * n;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t begin = b.begin(row), count = b.end(row) - begin;
    if (!read_indices(b, begin, begin + count, task.indices)) return false;
    const int8_t* w = static_cast<const int8_t*>(b.values.data) + begin * n;
    weave_weights(w, n, count, task.quads);
    for (int64_t j = 0; j < n; ++j) task.excess[j] = excess(w + j, n, count);
    float* floats = task.sums + (row - task.row_begin) * n * task.sums_stride;
    for (int64_t p = 0; p < task.pixels; p += kRows) {
      int32_t* sums = task.tile;
      for (int64_t j = 0; j < n; ++j) {
        const Integers start = Integers{} - task.excess[j];
        for (int i = 0; i < kRows; i += kLanes) store(sums + j * kRows + i, start);
      }
      if (count) {
        multiply_panel(task, task.panels + p * b.inputs, task.pixels - p, count, sums);
      }
      for (int64_t j = 0; j < n; ++j) {
        for (int i = 0; i < kRows; i += kLanes) {
          const Vector exact = __builtin_convertvector(load<Integers>(sums + j * kRows + i), Vector);
          store(floats + j * task.sums_stride + p + i,
                exact * load<Vector>(task.row_scales + p + i));
        }
      }
    }
  }
  write_outputs(*task.finish, task.sums, task.sums_stride, outputs, first, task.destinations,
                task.pixels, task.transposed);
  return true;
}

// One row of blocks times one row of x.
template <int kN>
inline void multiply_one(const int8_t* w, const uint32_t* indices, int64_t count, const int8_t* x,
                         int32_t* sums) {
  int64_t k = 0;
#if defined(__AVX512F__)
  if constexpr (kN == 16) {
    // Bytes of four blocks, so that each lane has the four weights of one output.
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const Integers halves = (Integers)_mm512_set1_epi8(static_cast<char>(128));
    Integers sum[2] = {}, more[2] = {};
    for (; k + 8 <= count; k += 8) {
      NMJAX_UNROLL for (int u = 0; u < 2; ++u) {
        const uint32_t* at = indices + k + 4 * u;
        const auto byte = [&](int i) {
          return static_cast<uint32_t>(static_cast<uint8_t>(x[at[i]])) << (8 * i);
        };
        const uint32_t four = (byte(0) | byte(1) | byte(2) | byte(3)) ^ 0x80808080u;
        const __m512i loaded = _mm512_loadu_si512(w + (k + 4 * u) * 16);
        const Integers quads = (Integers)_mm512_shuffle_epi8(
            _mm512_permutexvar_epi32(lanes, loaded), bytes);
        sum[u] = add_products(sum[u], (Integers)_mm512_set1_epi32(static_cast<int>(four)), quads);
        more[u] = add_products(more[u], halves, quads);
      }
    }
    store(sums, sum[0] + sum[1] - more[0] - more[1]);
  }
#endif
  if (k == 0) {
    for (int j = 0; j < kN; ++j) sums[j] = 0;
  }
  for (; k < count; ++k) {
    const int32_t input = x[indices[k]];
    for (int j = 0; j < kN; ++j) sums[j] += input * w[k * kN + j];
  }
}

template <int kN>
inline bool integers_times_vectors(const IntegerTask& task) {
  const Blocks& b = *task.blocks;
  int32_t sums[kN];
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t begin = b.begin(row), count = b.end(row) - begin;
    if (!read_indices(b, begin, begin + count, task.indices)) return false;
    const int8_t* w = static_cast<const int8_t*>(b.values.data) + begin * kN;
    for (int64_t p = 0; p < task.pixels; ++p) {
      multiply_one<kN>(w, task.indices, count, task.x + p * b.inputs, sums);
      for (int j = 0; j < kN; ++j) {
        const int64_t o = row * kN + j;
        float y = static_cast<float>(sums[j]) * task.row_scales[p] * task.finish->scales[o];
        if (task.finish->bias) y += task.finish->bias[o];
        if (task.finish->relu && y < 0) y = 0;
        store_number(task.finish->y, p * b.rows * kN + o, y);
      }
    }
  }
  return true;
}

inline bool integers_times_vectors(const IntegerTask& task) {
  switch (task.blocks->n) {
    case 4:
      return integers_times_vectors<4>(task);
    case 8:
      return integers_times_vectors<8>(task);
    case 16:
      return integers_times_vectors<16>(task);
    case 32:
      return integers_times_vectors<32>(task);
    default:
      return integers_times_vectors<64>(task);
  }
}

}  // namespace nmjax::NMJAX_ISA
