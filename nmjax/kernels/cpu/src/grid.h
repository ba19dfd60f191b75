// Which pixels an operation reads and writes, as tables that know nothing of convolutions.
//
// Input pixels are laid out in planes, one for each remainder of a tap's position by the stride, so
// that whatever the stride and the dilation, a tap is a fixed distance from an output's pixel. An
// output row is as wide as a plane; what lies behind its last output is computed and thrown away.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nmjax {

struct Window {
  int64_t taps[2], strides[2], padding[2], dilation[2];  // padding in front
};

struct Grid {
  int64_t images;
  int64_t planes, plane_size;       // of an image, in pixels
  int64_t outputs;                  // pixels of a plane that may be an output, from the first on
  int64_t image_size, output_size;  // numbers from one image to the next, in x and in y
  std::vector<int64_t> sources;     // of the first image's planes; -1 for a pixel of zeros
  std::vector<int64_t> destinations;
  struct Tap {
    int64_t plane, step;  // pixels from an output's own
  };
  std::vector<Tap> taps;

  int64_t reach() const {
    int64_t furthest = 0;
    for (const Tap& tap : taps) furthest = std::max(furthest, tap.step);
    return furthest;
  }
};

inline Grid make_grid(int64_t images, const int64_t (&input)[2], const int64_t (&output)[2],
                      int64_t features, int64_t channels, const Window& window) {
  std::vector<int64_t> remainders[2], places[2], steps[2];
  int64_t sizes[2];
  for (int axis = 0; axis < 2; ++axis) {
    int64_t furthest = 0;
    for (int64_t tap = 0; tap < window.taps[axis]; ++tap) {
      const int64_t at = tap * window.dilation[axis];
      const int64_t remainder = at % window.strides[axis], step = at / window.strides[axis];
      auto& known = remainders[axis];
      const auto found = std::find(known.begin(), known.end(), remainder);
      places[axis].push_back(found - known.begin());
      if (found == known.end()) known.push_back(remainder);
      steps[axis].push_back(step);
      furthest = std::max(furthest, step);
    }
    sizes[axis] = output[axis] + furthest;
  }
  const int64_t plane = sizes[0] * sizes[1], across = remainders[1].size();
  Grid grid;
  grid.images = images;
  grid.planes = static_cast<int64_t>(remainders[0].size()) * across;
  grid.plane_size = plane;
  grid.outputs = (output[0] - 1) * sizes[1] + output[1];
  grid.image_size = input[0] * input[1] * features;
  grid.output_size = output[0] * output[1] * channels;
  grid.sources.reserve(grid.planes * plane);
  for (const int64_t below : remainders[0]) {
    for (const int64_t right : remainders[1]) {
      for (int64_t u = 0; u < sizes[0]; ++u) {
        const int64_t row = u * window.strides[0] + below - window.padding[0];
        for (int64_t v = 0; v < sizes[1]; ++v) {
          const int64_t column = v * window.strides[1] + right - window.padding[1];
          const bool inside = row >= 0 && row < input[0] && column >= 0 && column < input[1];
          grid.sources.push_back(inside ? (row * input[1] + column) * features : -1);
        }
      }
    }
  }
  grid.destinations.assign(grid.outputs, -1);
  for (int64_t u = 0; u < output[0]; ++u) {
    for (int64_t v = 0; v < output[1]; ++v) {
      grid.destinations[u * sizes[1] + v] = (u * output[1] + v) * channels;
    }
  }
  for (int64_t i = 0; i < window.taps[0]; ++i) {
    for (int64_t j = 0; j < window.taps[1]; ++j) {
      grid.taps.push_back(
          {places[0][i] * across + places[1][j], steps[0][i] * sizes[1] + steps[1][j]});
    }
  }
  // If an output needs one pixel only, all images are one list of pixels without gaps.
  if (grid.taps.size() == 1 && images > 1) {
    const auto repeat = [&](std::vector<int64_t>& table, int64_t size) {
      const int64_t count = table.size();
      for (int64_t image = 1; image < images; ++image) {
        for (int64_t p = 0; p < count; ++p) {
          table.push_back(table[p] < 0 ? -1 : table[p] + image * size);
        }
      }
    };
    repeat(grid.sources, grid.image_size);
    repeat(grid.destinations, grid.output_size);
    grid.plane_size *= images;
    grid.outputs = grid.plane_size;
    grid.images = 1;
  }
  return grid;
}

}  // namespace nmjax
