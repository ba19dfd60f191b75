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
  const Integers low = __builtin_convertvector(load<Bytes>(code.low + output), Integers);
  const Integers high = __builtin_convertvector(load<Bytes>(code.high + output), Integers);
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
  Integers mask{};
  for (int64_t i = 0; i < g.m; ++i) {
    mask |= load_code(code_at(g, group * g.m + i, 1), output, 1) << static_cast<int32_t>(i);
  }
  for (int64_t i = 0; i < g.n; ++i) {
    const Integers lowest = mask & -mask;
    // Its logarithm: the exponent of a float, exact for one bit; the sign bit is the highest.
    const Vector power = __builtin_convertvector(lowest, Vector);
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

// sums (kB rows) += values of kU kept places of kLanes outputs; tables[u] is x of that group.
template <int kB, int kU>
inline void add_places(const Tensor& values, int64_t at, int64_t stride, const Integers* index,
                       const float* const* tables, float* sums, int64_t width) {
  Vector sum[kB];
  NMJAX_UNROLL for (int b = 0; b < kB; ++b) sum[b] = load<Vector>(sums + b * width);
  NMJAX_UNROLL for (int u = 0; u < kU; ++u) {
    const Vector w = load_numbers(values, at + u * stride);
    NMJAX_UNROLL for (int b = 0; b < kB; ++b) sum[b] += w * look_up(tables[u] + b * kTable, index[u]);
  }
  NMJAX_UNROLL for (int b = 0; b < kB; ++b) store(sums + b * width, sum[b]);
}

// Groups whose codes of four places share a byte, such as 2:4 and 1:4.
template <int kB>
inline void add_bytes_of_four(const GroupVectorTask& task, const float* x, float* sums) {
  const Groups& g = *task.groups;
  const int64_t inputs = g.groups * g.m, width = task.end - task.begin;
  const int64_t places = g.groups * g.n;
  float* tables = task.tables;
  for (int64_t place = 0; place < places; place += 4) {
    const int64_t count = least(4, places - place);
    const float* table[4];
    for (int64_t u = 0; u < 4; ++u) {
      const int64_t group = (place + (u < count ? u : 0)) / g.n;
      float* mine = tables + u * kB * kTable;
      if (u == 0 || (place + u) % g.n == 0 || u >= count) {
        fill_tables(x, kB, inputs, group * g.m, g.m, mine);
        table[u] = mine;
      } else {
        table[u] = table[u - 1];
      }
    }
    const uint8_t* codes = g.codes + place / 4 * g.outputs;
    for (int64_t o = 0; o < width; o += kLanes) {
      // Look-ups see the lowest bits only, and tables repeat, so what is above them may stay.
      const Integers code =
          __builtin_convertvector(load<Bytes>(codes + task.begin + o), Integers);
      const Integers index[4] = {code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6 & 3};
      const int64_t at = place * g.outputs + task.begin + o;
      if (count == 4) {
        add_places<kB, 4>(g.values, at, g.outputs, index, table, sums + o, width);
      } else {
        for (int64_t u = 0; u < count; ++u) {
          add_places<kB, 1>(g.values, at + u * g.outputs, g.outputs, index + u, table + u,
                            sums + o, width);
        }
      }
    }
  }
}

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
        const int64_t at = (group * g.n + i) * g.outputs + task.begin + o;
        if (g.m <= kTable) {
          const float* table = task.tables;
          add_places<kB, 1>(g.values, at, 0, &positions.of[i], &table, sums + o, width);
          continue;
        }
        const Vector w = load_numbers(g.values, at);
        for (int b = 0; b < kB; ++b) {
          const float* from = x + b * inputs + group * g.m;
          Vector chosen;
          for (int lane = 0; lane < kLanes; ++lane) chosen[lane] = from[positions.of[i][lane]];
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
  g.width == 2 && g.m == 4 ? add_bytes_of_four<kB>(task, x, task.sums)
                           : add_groups<kB>(task, x, task.sums);
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

constexpr int kGroupVectors = 8;
constexpr int kGroupTile = kGroupVectors * kLanes;

template <int kV>
inline void add_output(float* sums, const float* w, const int32_t* offsets, int64_t count,
                       const float* x) {
  Vector sum[kV];
  NMJAX_UNROLL for (int v = 0; v < kV; ++v) sum[v] = load<Vector>(sums + v * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    const float* pixels = x + offsets[k];
    NMJAX_UNROLL for (int v = 0; v < kV; ++v) {
      sum[v] += w[k] * load<Vector>(pixels + v * kLanes);
    }
  }
  NMJAX_UNROLL for (int v = 0; v < kV; ++v) store(sums + v * kLanes, sum[v]);
}

// Values and offsets of groups [first, last), output by output: places apart by `room`.
inline void decode_groups(const GroupPanelTask& task, int64_t output, int64_t first, int64_t last,
                          int64_t room) {
  const Groups& g = *task.groups;
  const int32_t stride = static_cast<int32_t>(task.panels->stride);
  Vector values[kLanes];
  Vector offsets[kLanes];
  int64_t filled = 0, done = 0;
  const auto flush = [&] {
    for (int64_t i = filled; i < kLanes; ++i) values[i] = offsets[i] = Vector{};
    transpose(values);
    transpose(offsets);
    for (int lane = 0; lane < kLanes; ++lane) {
      store(task.weights + lane * room + done, values[lane]);
      store(task.offsets + lane * room + done, offsets[lane]);
    }
    done += filled;
    filled = 0;
  };
  for (int64_t group = first; group < last; ++group) {
    Positions positions;
    load_positions(g, group, output, positions);
    for (int64_t i = 0; i < g.n; ++i) {
      values[filled] = load_numbers(g.values, (group * g.n + i) * g.outputs + output);
      const Integers at = (positions.of[i] + static_cast<int32_t>(group * g.m)) * stride;
      offsets[filled] = reinterpret_cast<Vector>(at);
      if (++filled == kLanes) flush();
    }
  }
  if (filled) flush();
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
  const int64_t room = (task.groups_at_once * g.n + kLanes - 1) / kLanes * kLanes;
  for (int64_t first = 0; first < g.groups; first += task.groups_at_once) {
    const int64_t last = least(first + task.groups_at_once, g.groups);
    const int64_t count = (last - first) * g.n;
    for (int64_t o = 0; o < outputs; o += kLanes) {
      decode_groups(task, task.begin + o, first, last, room);
      int64_t at = 0;
      for (int64_t p = 0; p < panels.count; p += panels.outputs, at += panels.size) {
        const float* x = static_cast<const float*>(panels.data.data) + at;
        const int64_t left = least(panels.outputs, panels.count - p);
        for (int lane = 0; lane < kLanes; ++lane) {
          float* sums = task.sums + (o + lane) * task.sums_stride + p;
          const float* w = task.weights + lane * room;
          const int32_t* offsets = task.offsets + lane * room;
          if (left > 4 * kLanes) {
            add_output<8>(sums, w, offsets, count, x);
          } else if (left > 2 * kLanes) {
            add_output<4>(sums, w, offsets, count, x);
          } else if (left > kLanes) {
            add_output<2>(sums, w, offsets, count, x);
          } else {
            add_output<1>(sums, w, offsets, count, x);
          }
        }
      }
    }
  }
  write_outputs(*task.finish, task.sums, task.sums_stride, outputs, task.begin,
                panels.destinations, panels.count, task.transposed);
}

}  // namespace nmjax::NMJAX_ISA
