// How pixels are laid out in panels, and shared out among tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "grid.h"
#include "parallel.h"
#include "tasks.h"

namespace nmjax {

constexpr int64_t kLine = 16;                       // float32 numbers in a cache line
constexpr int64_t kPixelsAtOnce = 256;  // that share the reading of a weight

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rounds up to an odd number of cache lines: rows whose distance is a power of two
// would share a few sets of the cache.
inline int64_t odd_lines(int64_t numbers) { return (ceil_div(numbers, kLine) | 1) * kLine; }

// Waking a thread does not pay for less than about 20 microseconds of work.
inline int64_t useful_threads(int64_t multiply_adds, int64_t threads) {
  return multiply_adds < 2'000'000 ? 1 : threads;
}

inline Tensor offset_by(Tensor tensor, int64_t numbers) {
  const int64_t bytes = numbers * (tensor.type == Type::kF32 ? 4 : 2);
  return {static_cast<char*>(tensor.data) + bytes, tensor.type};
}

inline float number_at(Tensor tensor, int64_t at) {
  if (tensor.type == Type::kF32) return static_cast<const float*>(tensor.data)[at];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(tensor.data)[at]} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Panels are as narrow as they can be, so that the features at hand lie on few memory pages. Where
// every output needs one pixel that is a tile. Taps need the pixels around it too, and for them
// panels are wider, since neighboring panels overlap.
struct PanelPlan {
  Type type;
  int64_t outputs;           // pixels that a panel computes
  int64_t segment;           // pixels of a plane in a panel
  int64_t stride, size;      // numbers from one feature, and from one panel, to the next
  int64_t batch;             // panels that share the reading of a weight: one task's
  int64_t panels, batches;   // of an image
  int64_t inputs;
  std::vector<int32_t> tap_offsets;

  PanelPlan(const Grid& grid, int64_t inputs, Type type, int64_t tile) : type(type), inputs(inputs) {
    const bool one_tap = grid.taps.size() == 1;
    const int64_t wide = ceil_div(std::min(grid.outputs, kPixelsAtOnce), tile) * tile;
    outputs = one_tap ? tile : wide;
    segment = outputs + grid.reach();
    stride = one_tap ? tile : odd_lines(segment * grid.planes + tile);
    size = stride * inputs;
    panels = ceil_div(grid.outputs, outputs);
    batch = std::min(panels, std::max<int64_t>(kPixelsAtOnce / outputs, 1));
    batches = ceil_div(panels, batch);
    for (const Grid::Tap& tap : grid.taps) tap_offsets.push_back(tap.plane * segment + tap.step);
  }
};

// Packs features [begin, end) of one panel of an image; does nothing beyond the last panel.
inline void pack_panel(const Kernels& kernels, const PanelPlan& plan, const Grid& grid, Tensor x,
                       int64_t image, int64_t panel, Tensor to, int64_t begin, int64_t end) {
  if (panel >= plan.panels) return;
  thread_local Scratch memory;
  int64_t* sources = memory.get<int64_t>(plan.segment * grid.planes);
  const int64_t first = panel * plan.outputs;
  for (int64_t plane = 0; plane < grid.planes; ++plane) {
    for (int64_t p = 0; p < plan.segment; ++p) {
      const bool inside = first + p < grid.plane_size;
      sources[plane * plan.segment + p] =
          inside ? grid.sources[plane * grid.plane_size + first + p] : -1;
    }
  }
  kernels.pack({offset_by(x, image * grid.image_size), sources, to, plan.stride, 0,
                plan.segment * grid.planes, begin, end});
}

// The panels of one batch, and where its outputs go.
inline Panels panels_of(const PanelPlan& plan, const Grid& grid, Tensor data, int64_t batch) {
  const int64_t first = batch % plan.batches * plan.batch * plan.outputs;
  return {data,
          plan.outputs,
          plan.stride,
          plan.size,
          plan.tap_offsets.data(),
          grid.destinations.data() + first,
          std::min(plan.batch * plan.outputs, grid.outputs - first)};
}

// Packs every batch of panels and calls multiply(panels, finish, part) for each of its parts.
//
// Many batches are tasks that each pack for themselves, so that panels never leave a core's cache.
// Few are packed by all threads and then multiplied by all threads.
template <typename F>
Outcome for_each_part(const Kernels& kernels, const PanelPlan& plan, const Grid& grid, Tensor x,
                      const Finish& finish, int64_t parts, int64_t threads,
                      const ParallelFor& parallel, const F& multiply) {
  const int64_t bytes = plan.batch * plan.size * (plan.type == Type::kF32 ? 4 : 2);
  const auto pack = [&](int64_t batch, Tensor data, int64_t panel, int64_t begin, int64_t end) {
    pack_panel(kernels, plan, grid, x, batch / plan.batches,
               batch % plan.batches * plan.batch + panel, offset_by(data, panel * plan.size), begin,
               end);
  };
  const auto multiply_part = [&](int64_t batch, Tensor data, int64_t part) {
    Finish here = finish;
    here.y = offset_by(finish.y, batch / plan.batches * grid.output_size);
    return multiply(panels_of(plan, grid, data, batch), here, part);
  };
  const int64_t batches = plan.batches * grid.images;
  if (threads == 1 || batches >= 3 * threads) {
    return parallel(batches, [&](int64_t batch) {
      thread_local Scratch memory;
      const Tensor data{memory.get<char>(bytes), plan.type};
      for (int64_t panel = 0; panel < plan.batch; ++panel) pack(batch, data, panel, 0, plan.inputs);
      Outcome outcome = Outcome::kGood;
      for (int64_t part = 0; part < parts && outcome == Outcome::kGood; ++part) {
        outcome = multiply_part(batch, data, part);
      }
      return outcome;
    });
  }
  thread_local Scratch memory;
  const Tensor data{memory.get<char>(bytes), plan.type};
  const int64_t strips = std::clamp<int64_t>(4 * threads / plan.batch, 1,
                                             ceil_div(plan.inputs, kernels.lanes));
  const int64_t features = ceil_div(ceil_div(plan.inputs, strips), kernels.lanes) * kernels.lanes;
  Outcome outcome = Outcome::kGood;
  for (int64_t batch = 0; batch < batches && outcome == Outcome::kGood; ++batch) {
    outcome = parallel(plan.batch * strips, [&](int64_t i) {
      const int64_t begin = std::min(i / plan.batch * features, plan.inputs);
      pack(batch, data, i % plan.batch, begin, std::min(begin + features, plan.inputs));
      return Outcome::kGood;
    });
    if (outcome != Outcome::kGood) break;
    outcome = parallel(parts, [&](int64_t part) { return multiply_part(batch, data, part); });
  }
  return outcome;
}

}  // namespace nmjax
