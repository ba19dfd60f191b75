// Into panels, and from sums back to rows of outputs: both are transpositions of small squares.
#pragma once

#include "vectors.h"

namespace nmjax::NMJAX_ISA {

// Pixels of `from` at `sources`, features [k, k + count): one vector of pixels for each feature.
inline void load_square(Tensor from, const int64_t* sources, int64_t pixels, int64_t k,
                        int64_t count, Vector (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = Vector{};
    if (i >= pixels || sources[i] < 0) continue;
    if (count == kLanes) {
      rows[i] = load_numbers(from, sources[i] + k);
    } else {
      for (int j = 0; j < count; ++j) rows[i][j] = load_number(from, sources[i] + k + j);
    }
  }
  transpose(rows);
}

inline void pack(const PackTask& task) {
  for (int64_t p = task.pixel_begin; p < task.pixel_end; p += kLanes) {
    const int64_t pixels = least(kLanes, task.pixel_end - p);
    for (int64_t k = task.feature_begin; k < task.feature_end; k += kLanes) {
      const int64_t count = least(kLanes, task.feature_end - k);
      Vector rows[kLanes];
      load_square(task.x, task.sources + p, pixels, k, count, rows);
      // Whole vectors: a panel's rows have room behind their last pixel.
      for (int j = 0; j < count; ++j) {
        store_numbers(task.panel, (k + j) * task.stride + p, rows[j]);
      }
    }
  }
}

// Outputs [output, output + count) of some pixels, times their scales, plus their biases.
inline void scale(const Finish& finish, int64_t output, int64_t count, Vector (&rows)[kLanes]) {
  Vector scales{}, biases{};
  for (int j = 0; j < count; ++j) {
    scales[j] = finish.scales[output + j];
    if (finish.bias) biases[j] = finish.bias[output + j];
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = rows[i] * scales + biases;
}

// Applies scales, and the bias that waits for them, and relu; then writes outputs [first, first + outputs) of each pixel.
//
// Outputs of one pixel are gathered first and written in one run: writing one vector to each of
// several rows whose distance is a power of two is slow, since they share a cache set.
inline void write_outputs(const Finish& finish, const float* sums, int64_t sums_stride,
                          int64_t outputs, int64_t first, const int64_t* destinations,
                          int64_t pixels, float* transposed) {
  const int64_t row = outputs + kLanes;
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t o = 0; o < outputs; o += kLanes) {
      Vector rows[kLanes];
      const int64_t count = least(kLanes, outputs - o);
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < count ? load<Vector>(sums + (o + i) * sums_stride + p) : Vector{};
      }
      transpose(rows);
      if (finish.scales) scale(finish, first + o, count, rows);
      for (int i = 0; i < kLanes; ++i) {
        store(transposed + i * row + o, finish.relu ? relu(rows[i]) : rows[i]);
      }
    }
    const int64_t count = least(kLanes, pixels - p);
    for (int64_t i = 0; i < count; ++i) {
      if (destinations[p + i] < 0) continue;
      const int64_t to = destinations[p + i] + first;
      const float* from = transposed + i * row;
      int64_t o = 0;
      for (; o + kLanes <= outputs; o += kLanes) {
        store_numbers(finish.y, to + o, load<Vector>(from + o));
      }
      for (; o < outputs; ++o) store_number(finish.y, to + o, from[o]);
    }
  }
}

}  // namespace nmjax::NMJAX_ISA
