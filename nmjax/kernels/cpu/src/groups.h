// N:M groups: every output has its own positions, so nothing is shared between outputs.
#pragma once

#include "panels.h"

namespace nmjax::NMJAX_ISA {

// Codes of one column: strings of bits, the least significant first, of `width` bits a number.
struct Code {
  const uint8_t* low;   // one byte for each output
  const uint8_t* high;  // the next byte of each, or the same one where no number reaches into it
  int32_t shift;
};

inline Code code_at(const Groups& g, int64_t index, int64_t width) {
  const int64_t bit = index * width, byte = bit / 8;
  const bool crosses = bit % 8 + width > 8;
  const uint8_t* low = g.codes + byte * g.outputs;
  return {low, crosses ? low + g.outputs : low, static_cast<int32_t>(bit % 8)};
}

inline Integers load_code(const Code& code, int64_t output, int64_t width) {
  const Integers low = load_bytes(code.low + output);
  const Integers high = load_bytes(code.high + output);
  return ((low | high << 8) >> code.shift) & ((1 << width) - 1);
}

// The positions of a group's kept values, of kLanes outputs from `output` on; within the group
// whatever the codes are.
struct Positions {
  Integers of[32];
};

inline void load_positions(const Groups& g, int64_t group, int64_t output, Positions& positions) {
  const Integers m = static_cast<int32_t>(g.m) + Integers{};
  if (g.width) {
    for (int64_t i = 0; i < g.n; ++i) {
      const Integers at = load_code(code_at(g, group * g.n + i, g.width), output, g.width);
      positions.of[i] = at < m ? at : m - 1;
    }
    return;
  }
  Bits mask{};
  for (int64_t i = 0; i < g.m; ++i) {
    const Integers bit = load_code(code_at(g, group * g.m + i, 1), output, 1);
    mask |= reinterpret_cast<Bits>(bit) << static_cast<uint32_t>(i);
  }
  for (int64_t i = 0; i < g.n; ++i) {
    const Bits lowest = mask & -mask;
    // Its logarithm: the exponent of a float, exact for one bit; the sign bit is the highest.
    const Vector power = __builtin_convertvector(reinterpret_cast<Integers>(lowest), Vector);
    const Integers at = (reinterpret_cast<Integers>(power) >> 23 & 0xff) - 127;
    positions.of[i] = at < 0 ? Integers{} : at;
    mask ^= lowest;
  }
}

// Numbers of a small table, each lane by its own index; those of a group of up to 16.
#if defined(__AVX512F__)
constexpr int kTable = 16;
inline Vector look_up(const float* table, Integers index) {
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), load<Vector>(table));
}
#elif defined(__AVX2__)
constexpr int kTable = 16;
inline Vector look_up(const float* table, Integers index) {
  const __m256i i = reinterpret_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(load<Vector>(table), i);
  const __m256 high = _mm256_permutevar8x32_ps(load<Vector>(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
#else
constexpr int kTable = 16;
inline Vector look_up(const float* table, Integers index) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i]];
  return v;
}
#endif

// x of one group as tables: of every row of the batch kTable numbers, repeated to fill them.
inline void fill_tables(const float* x, int64_t batch, int64_t inputs, int64_t first, int64_t m,
                        float* tables) {
  for (int64_t b = 0; b < batch; ++b) {
    const float* from = x + b * inputs + first;
    for (int64_t i = 0, j = 0; i < kTable; ++i, j = j + 1 == m ? 0 : j + 1) {
      tables[b * kTable + i] = from[j];
    }
  }
}

// Kept values are counted through a column, in places. Eight codes of up to four bits fill whole
// bytes, so places are taken eight at a time.
constexpr int kPlaces = 8;

// The codes of places [place, place + count) of kLanes outputs, the first one lowest.
inline Integers load_places(const Groups& g, int64_t place, int64_t count, int64_t output) {
  const int64_t bytes = (count * g.width + 7) / 8;
  const uint8_t* row = g.codes + place / kPlaces * g.width * g.outputs + output;
  Bits codes = reinterpret_cast<Bits>(load_bytes(row));
  for (int64_t byte = 1; byte < bytes; ++byte) {
    row += g.outputs;
    codes |= reinterpret_cast<Bits>(load_bytes(row)) << static_cast<uint32_t>(8 * byte);
  }
  return reinterpret_cast<Integers>(codes);
}

template <typename Value>
inline Vector load_value(const Value* from) {
  if constexpr (sizeof(Value) == 4) {
    return load<Vector>(from);
  } else {
    return widen(load<Halves>(from));
  }
}

// Values that no cache holds are asked for this many bytes ahead: they lie in kPlaces rows, more
// than the hardware follows by itself. Within a cache that would only cost.
constexpr int64_t kBytesAhead = 1024, kCached = 8 << 20;

// sums (kB rows) += the values of kU places x what their indices find in tables.
template <int kB, int kU, bool kFar, typename Value>
inline void add_places(const Value* values, int64_t stride, Integers codes, int32_t width,
                       const float* const* tables, float* sums, int64_t sums_stride) {
  const Integers mask = ((1 << width) - 1) + Integers{};
  constexpr int kChains = kB == 1 && kU > 1 ? 2 : 1;  // of additions that wait for each other
  Vector sum[kChains][kB] = {};
  NMJAX_UNROLL for (int b = 0; b < kB; ++b) sum[0][b] = load<Vector>(sums + b * sums_stride);
  NMJAX_UNROLL for (int u = 0; u < kU; ++u) {
    const Vector w = load_value(values + u * stride);
    if (kFar) __builtin_prefetch(values + u * stride + kBytesAhead / sizeof(Value), 0, 0);
    const Integers index = codes & mask;
    codes >>= width;
    NMJAX_UNROLL for (int b = 0; b < kB; ++b) {
      sum[u % kChains][b] += w * look_up(tables[u] + b * kTable, index);
    }
  }
  NMJAX_UNROLL for (int b = 0; b < kB; ++b) {
    if (kChains == 2) sum[0][b] += sum[kChains - 1][b];
    store(sums + b * sums_stride, sum[0][b]);
  }
}

// Positions of up to four bits.
template <int kB, typename Value>
inline void add_short_codes(const GroupVectorTask& task, const float* x, float* sums) {
  const Groups& g = *task.groups;
  const int64_t outputs = task.end - task.begin, places = g.groups * g.n;
  const Value* values = static_cast<const Value*>(g.values.data) + task.begin;
  const bool far = places * g.outputs * static_cast<int64_t>(sizeof(Value)) > kCached;
  const auto add =
      far ? add_places<kB, kPlaces, true, Value> : add_places<kB, kPlaces, false, Value>;
  for (int64_t place = 0; place < places; place += kPlaces, values += kPlaces * g.outputs) {
    const int64_t count = least(kPlaces, places - place);
    const float* tables[kPlaces];
    int64_t filled = -1;
    for (int64_t u = 0; u < count; ++u) {
      const int64_t group = (place + u) / g.n;
      float* table = task.tables + u * kB * kTable;
      if (group != filled) fill_tables(x, kB, g.groups * g.m, group * g.m, g.m, table);
      tables[u] = group == filled ? tables[u - 1] : table;
      filled = group;
    }
    for (int64_t o = 0; o < outputs; o += kLanes) {
      const Integers codes = load_places(g, place, count, task.begin + o);
      if (count == kPlaces) {
        add(values + o, g.outputs, codes, g.width, tables, sums + o, outputs);
        continue;
      }
      for (int64_t u = 0; u < count; ++u) {
        add_places<kB, 1, false>(values + u * g.outputs + o, g.outputs,
                                 codes >> static_cast<int32_t>(u * g.width), g.width, tables + u,
                                 sums + o, outputs);
      }
    }
  }
}

// Bitmasks, and positions of more bits.
template <int kB>
inline void add_groups(const GroupVectorTask& task, const float* x, float* sums) {
  const Groups& g = *task.groups;
  const int64_t inputs = g.groups * g.m, width = task.end - task.begin;
  for (int64_t group = 0; group < g.groups; ++group) {
    if (g.m <= kTable) fill_tables(x, kB, inputs, group * g.m, g.m, task.tables);
    for (int64_t o = 0; o < width; o += kLanes) {
      Positions positions;
      load_positions(g, group, task.begin + o, positions);
      for (int64_t i = 0; i < g.n; ++i) {
        const Vector w = load_numbers(g.values, (group * g.n + i) * g.outputs + task.begin + o);
        for (int b = 0; b < kB; ++b) {
          Vector chosen;
          if (g.m <= kTable) {
            chosen = look_up(task.tables + b * kTable, positions.of[i]);
          } else {
            const float* from = x + b * inputs + group * g.m;
            for (int lane = 0; lane < kLanes; ++lane) chosen[lane] = from[positions.of[i][lane]];
          }
          float* sum = sums + b * width + o;
          store(sum, load<Vector>(sum) + w * chosen);
        }
      }
    }
  }
}

template <int kB>
inline void groups_times_rows(const GroupVectorTask& task, int64_t row) {
  const Groups& g = *task.groups;
  const float* x = task.x + row * g.groups * g.m;
  const int64_t width = task.end - task.begin;
  for (int64_t i = 0; i < kB * width; i += kLanes) store(task.sums + i, Vector{});
  if (g.width == 0 || g.width > 4) {
    add_groups<kB>(task, x, task.sums);
  } else if (g.values.type == Type::kF32) {
    add_short_codes<kB, float>(task, x, task.sums);
  } else {
    add_short_codes<kB, uint16_t>(task, x, task.sums);
  }
  for (int b = 0; b < kB; ++b) {
    for (int64_t o = 0; o < width; o += kLanes) {
      Vector y = load<Vector>(task.sums + b * width + o);
      if (task.finish->bias) y += load<Vector>(task.finish->bias + task.begin + o);
      if (task.finish->relu) y = relu(y);
      store_numbers(task.finish->y, (row + b) * g.outputs + task.begin + o, y);
    }
  }
}

inline void groups_times_vectors(const GroupVectorTask& task) {
  int64_t row = 0;
  for (; row + 8 <= task.batch; row += 8) groups_times_rows<8>(task, row);
  for (; row + 4 <= task.batch; row += 4) groups_times_rows<4>(task, row);
  for (; row + 2 <= task.batch; row += 2) groups_times_rows<2>(task, row);
  for (; row < task.batch; ++row) groups_times_rows<1>(task, row);
}

// Many rows: pixels of panels fill the vectors, an output's values are broadcast one by one.

// Vectors of pixels, for two outputs, that stay in registers.
constexpr int kGroupVectors = kLanes == 16 ? 8 : 4;

// sums (kO outputs, kV vectors of pixels) += places x pixels; a place has kLanes outputs.
template <int kV, int kO>
inline void add_outputs(float* sums, int64_t sums_stride, const float* w, const int32_t* offsets,
                        int64_t count, const float* x) {
  Vector sum[kO][kV];
  NMJAX_UNROLL for (int o = 0; o < kO; ++o) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
      sum[o][v] = load<Vector>(sums + o * sums_stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < count; ++k, w += kLanes, offsets += kLanes) {
    NMJAX_UNROLL for (int o = 0; o < kO; ++o) {
      const float* pixels = x + offsets[o];
      NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
        sum[o][v] += w[o] * load<Vector>(pixels + v * kLanes);
      }
    }
  }
  NMJAX_UNROLL for (int o = 0; o < kO; ++o) {
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
      store(sums + o * sums_stride + v * kLanes, sum[o][v]);
    }
  }
}

// Values and offsets of groups [first, last) of kLanes outputs, place by place.
inline void decode_groups(const GroupPanelTask& task, int64_t output, int64_t first, int64_t last,
                          float* weights, int32_t* offsets) {
  const Groups& g = *task.groups;
  const int32_t stride = static_cast<int32_t>(task.panels->stride);
  const auto add = [&](int64_t place, int64_t group, Integers position) {
    store(weights, load_numbers(g.values, place * g.outputs + output));
    store(offsets, (position + static_cast<int32_t>(group * g.m)) * stride);
    weights += kLanes;
    offsets += kLanes;
  };
  if (g.width > 0 && g.width <= 4) {
    const Integers mask = ((1 << g.width) - 1) + Integers{};
    const Integers most = static_cast<int32_t>(g.m - 1) + Integers{};
    int64_t group = first, member = 0;
    for (int64_t place = first * g.n; place < last * g.n; place += kPlaces) {
      const int64_t count = least(kPlaces, last * g.n - place);
      Integers codes = load_places(g, place, count, output);
      for (int64_t u = 0; u < count; ++u, codes >>= g.width) {
        const Integers position = codes & mask;
        add(place + u, group, position > most ? most : position);
        if (++member == g.n) {
          member = 0;
          ++group;
        }
      }
    }
  } else {
    for (int64_t group = first; group < last; ++group) {
      Positions positions;
      load_positions(g, group, output, positions);
      for (int64_t i = 0; i < g.n; ++i) add(group * g.n + i, group, positions.of[i]);
    }
  }
}

inline void groups_times_panels(const GroupPanelTask& task) {
  const Groups& g = *task.groups;
  const int64_t outputs = task.end - task.begin;
  const Panels& panels = *task.panels;
  for (int64_t o = 0; o < outputs; ++o) {
    const Vector start =
        (task.finish->bias ? task.finish->bias[task.begin + o] : 0.0f) + Vector{};
    for (int64_t p = 0; p < panels.count; p += kLanes) {
      store(task.sums + o * task.sums_stride + p, start);
    }
  }
  // Some features of one panel stay in the first-level cache while all outputs use them.
  const int64_t room = task.groups_at_once * g.n;
  for (int64_t first = 0; first < g.groups; first += task.groups_at_once) {
    const int64_t last = least(first + task.groups_at_once, g.groups);
    for (int64_t o = 0; o < outputs; o += kLanes) {
      decode_groups(task, task.begin + o, first, last, task.weights + o * room,
                    task.offsets + o * room);
    }
    int64_t at = 0;
    for (int64_t p = 0; p < panels.count; p += panels.outputs, at += panels.size) {
      const float* x = static_cast<const float*>(panels.data.data) + at;
      const int64_t left = least(panels.outputs, panels.count - p), count = (last - first) * g.n;
      for (int64_t o = 0; o < outputs; o += 2) {  // There are whole vectors of them.
        float* sums = task.sums + o * task.sums_stride + p;
        const int64_t vector = o / kLanes * kLanes * room + o % kLanes;
        const float* w = task.weights + vector;
        const int32_t* offsets = task.offsets + vector;
        if (kGroupVectors == 8 && left > 4 * kLanes) {
          add_outputs<kGroupVectors, 2>(sums, task.sums_stride, w, offsets, count, x);
        } else if (left > 2 * kLanes) {
          add_outputs<4, 2>(sums, task.sums_stride, w, offsets, count, x);
        } else if (left > kLanes) {
          add_outputs<2, 2>(sums, task.sums_stride, w, offsets, count, x);
        } else {
          add_outputs<1, 2>(sums, task.sums_stride, w, offsets, count, x);
        }
      }
    }
  }
  write_outputs(*task.finish, task.sums, task.sums_stride, outputs, task.begin,
                panels.destinations, panels.count, task.transposed);
}

}  // namespace nmjax::NMJAX_ISA
