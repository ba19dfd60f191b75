// 1xN blocks: kept blocks times pixels of a panel, or times a few vectors.
#pragma once

#include "panels.h"

namespace nmjax::NMJAX_ISA {

// Vectors of pixels and outputs that one pass keeps in registers: as many sums as hide the latency
// of a multiply-add and leave registers for the pixels and a weight.
#if defined(__AVX512F__)
constexpr int kPixelVectors = 2, kOutputs = 8;
#else
constexpr int kPixelVectors = 3, kOutputs = 4;
#endif
constexpr int kTile = kPixelVectors * kLanes;

// How many blocks ahead their pixels are fetched into the cache.
constexpr int kAhead = kRoomAhead;

// do_tile(where in the panels, which pixel of them all, how many pixels from there on).
template <typename F>
inline void for_each_tile(const Panels& panels, const F& do_tile) {
  int64_t at = 0;
  for (int64_t first = 0; first < panels.count; first += panels.outputs, at += panels.size) {
    const int64_t count = least(panels.outputs, panels.count - first);
    for (int64_t p = 0; p < count; p += kTile) do_tile(at + p, first + p, count - p);
  }
}

template <typename Index>
inline bool find_offsets(const Index* indices, int64_t begin, int64_t end, int64_t inputs,
                         int64_t stride, int32_t* offsets) {
  uint32_t largest = 0;
  for (int64_t k = begin; k < end; ++k) {
    const uint32_t index = indices[k];
    largest = index > largest ? index : largest;
    offsets[k - begin] = static_cast<int32_t>(index * stride);
  }
  for (int64_t k = 0; k < kAhead; ++k) offsets[end - begin + k] = 0;
  return largest < inputs;
}

// Where in a panel the inputs of blocks [begin, end) are; false if one is out of range.
inline bool find_offsets(const Blocks& blocks, int64_t begin, int64_t end, int64_t stride,
                         int32_t* offsets) {
  if (begin == end) return true;
  switch (blocks.index_bytes) {
    case 1:
      return find_offsets(static_cast<const uint8_t*>(blocks.indices), begin, end, blocks.inputs,
                          stride, offsets);
    case 2:
      return find_offsets(static_cast<const uint16_t*>(blocks.indices), begin, end, blocks.inputs,
                          stride, offsets);
    default:
      return find_offsets(static_cast<const uint32_t*>(blocks.indices), begin, end, blocks.inputs,
                          stride, offsets);
  }
}

// sums (kJ outputs, kV vectors of pixels) += blocks x pixels.
template <int kV, int kJ, bool kTaps>
inline void multiply(float* sums, int64_t sums_stride, const float* w, int64_t n, const float* x,
                     const int32_t* offsets, int64_t count, const int32_t* tap_offsets,
                     int64_t taps) {
  Vector sum[kJ][kV];
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] = load<Vector>(sums + j * sums_stride + v * kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    const float* pixels = x + offsets[k];
    const float* soon = x + offsets[k + kAhead];
    for (int64_t t = 0; t < (kTaps ? taps : 1); ++t, w += n) {
      Vector p[kV];
      NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
        const int64_t at = (kTaps ? tap_offsets[t] : 0) + v * kLanes;
        p[v] = load<Vector>(pixels + at);
        if (!kTaps) __builtin_prefetch(soon + at);
      }
      NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
        NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] += w[j] * p[v];
      }
    }
  }
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) store(sums + j * sums_stride + v * kLanes, sum[j][v]);
  }
}

template <int kV, bool kTaps>
inline void multiply_row(const PanelTask& task, float* sums, const float* w, const float* x,
                         int64_t count) {
  const Blocks& b = *task.blocks;
  int64_t j = 0;
  for (; j + kOutputs <= b.n; j += kOutputs) {
    multiply<kV, kOutputs, kTaps>(sums + j * task.sums_stride, task.sums_stride, w + j, b.n, x,
                                  task.offsets, count, task.panels->tap_offsets, b.taps);
  }
  for (; j + 4 <= b.n; j += 4) {
    multiply<kV, 4, kTaps>(sums + j * task.sums_stride, task.sums_stride, w + j, b.n, x,
                           task.offsets, count, task.panels->tap_offsets, b.taps);
  }
  for (; j < b.n; ++j) {
    multiply<kV, 1, kTaps>(sums + j * task.sums_stride, task.sums_stride, w + j, b.n, x,
                           task.offsets, count, task.panels->tap_offsets, b.taps);
  }
}

// The values of blocks [begin, end) as float32.
inline const float* widened(const Blocks& b, int64_t begin, int64_t end, float* weights) {
  const int64_t block = b.n * b.taps;
  if (b.values.type == Type::kF32) {
    return static_cast<const float*>(b.values.data) + begin * block;
  }
  const int64_t count = (end - begin) * block;
  int64_t i = 0;
  if (b.values.type == Type::kI8) {
    const int8_t* from = static_cast<const int8_t*>(b.values.data) + begin * block;
    for (; i + kLanes <= count; i += kLanes) store(weights + i, load_signed<Vector>(from + i));
    for (; i < count; ++i) weights[i] = from[i];
    return weights;
  }
  const uint16_t* from = static_cast<const uint16_t*>(b.values.data) + begin * block;
  for (; i + kLanes <= count; i += kLanes) store(weights + i, widen(load<Halves>(from + i)));
  for (; i < count; ++i) weights[i] = widen(from[i]);
  return weights;
}

inline void multiply_tiles(const PanelTask& task, float* sums, int64_t begin, int64_t end) {
  const Blocks& b = *task.blocks;
  const float* w = widened(b, begin, end, task.weights);
  const int64_t count = end - begin;
  for_each_tile(*task.panels, [&](int64_t at, int64_t pixel, int64_t left) {
    const float* x = static_cast<const float*>(task.panels->data.data) + at;
    if (left <= kLanes) {
      b.taps == 1 ? multiply_row<1, false>(task, sums + pixel, w, x, count)
                  : multiply_row<1, true>(task, sums + pixel, w, x, count);
    } else {
      b.taps == 1 ? multiply_row<kPixelVectors, false>(task, sums + pixel, w, x, count)
                  : multiply_row<kPixelVectors, true>(task, sums + pixel, w, x, count);
    }
  });
}

#if defined(__AVX512BF16__)
// The same for panels and values of bfloat16, whose products are added two inputs at a time.

// Weights of two blocks, side by side for each output; of an odd last one, zeros beside it.
inline void pair_weights(const uint16_t* first, const uint16_t* second, int64_t size,
                         uint16_t* pairs) {
  for (int64_t i = 0; i < size; ++i) {
    pairs[2 * i] = first[i];
    pairs[2 * i + 1] = second ? second[i] : 0;
  }
}

template <int kV, int kJ>
inline void multiply_pairs(float* sums, int64_t sums_stride, const uint16_t* pairs, int64_t n,
                           const uint16_t* x, const int32_t* offsets, int64_t count,
                           const int32_t* tap_offsets, int64_t taps) {
  const __m512i low = load<__m512i>(
      (const uint16_t[32]){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47});
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512 sum[kJ][kV];
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] = _mm512_loadu_ps(sums + j * sums_stride + v * 16);
  }
  for (int64_t k = 0; k < count; k += 2) {
    const uint16_t* a = x + offsets[k];
    const uint16_t* b = x + offsets[k + 1 < count ? k + 1 : k];
    // Beside an odd last block there are no pixels: zeros of weights would make NaNs of infinities.
    const __mmask32 both = k + 1 < count ? ~__mmask32{0} : 0;
    for (int64_t t = 0; t < taps; ++t, pairs += 2 * n) {
      const __m512i pa = _mm512_loadu_si512(a + tap_offsets[t]);
      const __m512i pb = _mm512_maskz_loadu_epi16(both, b + tap_offsets[t]);
      __m512bh p[2] = {(__m512bh)_mm512_permutex2var_epi16(pa, low, pb),
                       (__m512bh)_mm512_permutex2var_epi16(pa, high, pb)};
      NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(load<int32_t>(pairs + 2 * j));
        NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[j][v] = _mm512_dpbf16_ps(sum[j][v], w, p[v]);
      }
    }
  }
  NMJAX_UNROLL for (int j = 0; j < kJ; ++j) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) _mm512_storeu_ps(sums + j * sums_stride + v * 16, sum[j][v]);
  }
}

template <int kV>
inline void multiply_row_of_pairs(const PanelTask& task, float* sums, const uint16_t* pairs,
                                  const uint16_t* x, int64_t count) {
  const Blocks& b = *task.blocks;
  int64_t j = 0;
  for (; j + kOutputs <= b.n; j += kOutputs) {
    multiply_pairs<kV, kOutputs>(sums + j * task.sums_stride, task.sums_stride, pairs + 2 * j, b.n,
                                 x, task.offsets, count,
                                 task.panels->tap_offsets, b.taps);
  }
  for (; j < b.n; ++j) {
    multiply_pairs<kV, 1>(sums + j * task.sums_stride, task.sums_stride, pairs + 2 * j, b.n, x,
                          task.offsets, count, task.panels->tap_offsets, b.taps);
  }
}

inline void multiply_tiles_of_pairs(const PanelTask& task, float* sums, int64_t begin,
                                    int64_t end) {
  const Blocks& b = *task.blocks;
  const int64_t block = b.n * b.taps, count = end - begin;
  const uint16_t* values = static_cast<const uint16_t*>(b.values.data) + begin * block;
  uint16_t* pairs = reinterpret_cast<uint16_t*>(task.weights);
  for (int64_t k = 0; k < count; k += 2) {
    pair_weights(values + k * block, k + 1 < count ? values + (k + 1) * block : nullptr, block,
                 pairs + k * block);
  }
  for_each_tile(*task.panels, [&](int64_t at, int64_t pixel, int64_t left) {
    const uint16_t* x = static_cast<const uint16_t*>(task.panels->data.data) + at;
    if (left <= kLanes) {
      multiply_row_of_pairs<1>(task, sums + pixel, pairs, x, count);
    } else {
      multiply_row_of_pairs<2>(task, sums + pixel, pairs, x, count);
    }
  });
}
#endif

inline bool blocks_times_panels(const PanelTask& task) {
  const Blocks& b = *task.blocks;
  const int64_t pixels = task.panels->count, first = task.row_begin * b.n;
  const int64_t outputs = (task.row_end - task.row_begin) * b.n;
  for (int64_t o = 0; o < outputs; ++o) {
    // With scales, the bias has to wait for them.
    const bool add = task.finish->bias && !task.finish->scales;
    const Vector start = (add ? task.finish->bias[first + o] : 0.0f) + Vector{};
    for (int64_t p = 0; p < pixels; p += kLanes) store(task.sums + o * task.sums_stride + p, start);
  }
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t begin = b.begin(row), end = b.end(row);
    if (!find_offsets(b, begin, end, task.panels->stride, task.offsets)) return false;
    float* sums = task.sums + (row - task.row_begin) * b.n * task.sums_stride;
#if defined(__AVX512BF16__)
    if (task.panels->data.type == Type::kBF16) {
      multiply_tiles_of_pairs(task, sums, begin, end);
      continue;
    }
#endif
    multiply_tiles(task, sums, begin, end);
  }
  write_outputs(*task.finish, task.sums, task.sums_stride, outputs, first,
                task.panels->destinations, pixels, task.transposed);
  return true;
}

// One row of blocks times kB vectors, n = kW lanes * kV vectors; kU sums of each hide latencies.
template <int kW, int kV, int kB, int kU, typename Value, typename Index>
inline void multiply_vectors(const Value* w, const Index* indices, int64_t count, const float* x,
                             int64_t batch, float* sums) {
  typedef float Lanes __attribute__((vector_size(kW * 4)));
  typedef uint32_t Wide __attribute__((vector_size(kW * 4)));
  typedef uint16_t Short __attribute__((vector_size(kW * 2)));
  Lanes sum[kU][kB][kV] = {};
  const auto add = [&](int u, int64_t k) {
    const float* inputs = x + static_cast<int64_t>(indices[k]) * batch;
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
      const Value* from = w + (k * kV + v) * kW;
      Lanes weights;
      if constexpr (sizeof(Value) == 4) {
        weights = load<Lanes>(from);
      } else if constexpr (sizeof(Value) == 1) {
        weights = load_signed<Lanes>(from);
      } else {
        weights = reinterpret_cast<Lanes>(
            __builtin_convertvector(load<Short>(from), Wide) << 16);
      }
      NMJAX_UNROLL for (int b = 0; b < kB; ++b) sum[u][b][v] += inputs[b] * weights;
    }
  };
  int64_t k = 0;
  for (; k + kU <= count; k += kU) {
    NMJAX_UNROLL for (int u = 0; u < kU; ++u) add(u, k + u);
  }
  for (; k < count; ++k) add(0, k);
  NMJAX_UNROLL for (int b = 0; b < kB; ++b) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
      NMJAX_UNROLL for (int u = 1; u < kU; ++u) sum[0][b][v] += sum[u][b][v];
      store(sums + b * kW * kV + v * kW, sum[0][b][v]);
    }
  }
}

// How many sums of one vector, kV registers each, stay in registers.
constexpr int vectors_of_one(int v) {
  const int most = (kLanes == 16 ? 16 : 8) / v;
  return most > 8 ? 8 : most < 1 ? 1 : most;
}

template <int kW, int kV, typename Value, typename Index>
inline void multiply_batch(const Value* w, const Index* indices, int64_t count, const float* x,
                           int64_t batch, int64_t left, float* sums) {
  constexpr int kOne = vectors_of_one(kV);
  if (left >= 4 && kOne >= 4) {
    multiply_vectors<kW, kV, 4, (kOne >= 4 ? kOne / 4 : 1)>(w, indices, count, x, batch, sums);
  } else if (left >= 2 && kOne >= 2) {
    multiply_vectors<kW, kV, 2, (kOne >= 2 ? kOne / 2 : 1)>(w, indices, count, x, batch, sums);
  } else {
    multiply_vectors<kW, kV, 1, kOne>(w, indices, count, x, batch, sums);
  }
}

template <int kW, int kV>
inline int vectors_at_once(int64_t left) {
  constexpr int kOne = vectors_of_one(kV);
  return left >= 4 && kOne >= 4 ? 4 : left >= 2 && kOne >= 2 ? 2 : 1;
}

template <int kW, int kV, typename Value, typename Index>
inline bool blocks_times_vectors(const VectorTask& task) {
  const Blocks& b = *task.blocks;
  constexpr int kN = kW * kV;
  float sums[4 * kN];
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t begin = b.begin(row), count = b.end(row) - begin;
    const Index* indices = static_cast<const Index*>(b.indices) + begin;
    const Value* w = static_cast<const Value*>(b.values.data) + begin * kN;
    uint32_t largest = 0;
    for (int64_t k = 0; k < count; ++k) largest = indices[k] > largest ? indices[k] : largest;
    if (count && largest >= b.inputs) return false;
    for (int64_t i = 0; i < task.batch;) {
      const int at_once = vectors_at_once<kW, kV>(task.batch - i);
      multiply_batch<kW, kV>(w, indices, count, task.x + i, task.batch, task.batch - i, sums);
      for (int s = 0; s < at_once; ++s, ++i) {
        for (int j = 0; j < kN; ++j) {
          float y = sums[s * kN + j];
          if (task.finish->scales) y *= task.finish->scales[row * kN + j];
          if (task.finish->bias) y += task.finish->bias[row * kN + j];
          if (task.finish->relu && y < 0) y = 0;
          store_number(task.finish->y, (i * b.rows + row) * kN + j, y);
        }
      }
    }
  }
  return true;
}

template <int kW, int kV, typename Value>
inline bool blocks_times_vectors(const VectorTask& task) {
  switch (task.blocks->index_bytes) {
    case 1:
      return blocks_times_vectors<kW, kV, Value, uint8_t>(task);
    case 2:
      return blocks_times_vectors<kW, kV, Value, uint16_t>(task);
    default:
      return blocks_times_vectors<kW, kV, Value, uint32_t>(task);
  }
}

template <int kN>
inline bool blocks_times_vectors(const VectorTask& task) {
  constexpr int kW = kN < kLanes ? kN : kLanes;
  switch (task.blocks->values.type) {
    case Type::kF32:
      return blocks_times_vectors<kW, kN / kW, float>(task);
    case Type::kBF16:
      return blocks_times_vectors<kW, kN / kW, uint16_t>(task);
    default:
      return blocks_times_vectors<kW, kN / kW, int8_t>(task);
  }
}

inline bool blocks_times_vectors(const VectorTask& task) {
  switch (task.blocks->n) {
    case 4:
      return blocks_times_vectors<4>(task);
    case 8:
      return blocks_times_vectors<8>(task);
    case 16:
      return blocks_times_vectors<16>(task);
    case 32:
      return blocks_times_vectors<32>(task);
    default:
      return blocks_times_vectors<64>(task);
  }
}

}  // namespace nmjax::NMJAX_ISA
