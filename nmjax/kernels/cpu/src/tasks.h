// What the kernels of one instruction set are asked to do, and the table of those kernels.
//
// A panel holds input pixels feature by feature: feature k of pixel p is panel[k * stride + p].
// A pixel is whatever one output position is computed for: a row of a matmul's batch, or a pixel of
// an image. Several neighboring pixels fill a vector, so a weight is broadcast and never gathered.
#pragma once

#include <cstdint>

namespace nmjax {

constexpr int kRoomAhead = 12;

enum class Type : int32_t { kF32, kBF16, kI8 };

struct Tensor {
  void* data;
  Type type;
};

// Copies features [feature_begin, feature_end) of pixels [pixel_begin, pixel_end) into a panel.
struct PackTask {
  Tensor x;
  const int64_t* sources;  // where in x each pixel's features begin, or -1 for a pixel of zeros
  Tensor panel;
  int64_t stride;
  int64_t pixel_begin, pixel_end;
  int64_t feature_begin, feature_end;
};

// A weight of 1xN blocks. A block is taps * n numbers: n outputs of the first tap, then the next.
struct Blocks {
  Tensor values;
  const void* indices;           // the input of each block
  int32_t index_bytes;           // 1, 2 or 4
  const int32_t* row_pointers;   // where rows of blocks begin and end; null if all are alike
  int64_t rows, kept;            // blocks in all if rows have pointers, else in a row
  int64_t n, taps, inputs;

  // Always inlined, as everything here must be that has code: see vectors.h.
  [[gnu::always_inline]] int64_t begin(int64_t row) const {
    return row_pointers ? row_pointers[row] : row * kept;
  }
  [[gnu::always_inline]] int64_t end(int64_t row) const { return begin(row + 1); }
};

// What happens to finished sums.
struct Finish {
  const float* bias;  // null for none
  bool relu;
  Tensor y;
  const float* scales;  // of the outputs' sums; null for none
};

// Panels of the same size, one behind the other, for outputs that follow each other.
struct Panels {
  Tensor data;
  int64_t outputs;              // pixels that a panel computes
  int64_t stride, size;         // numbers from one feature, and from one panel, to the next
  const int32_t* tap_offsets;   // in pixels
  const int64_t* destinations;  // where in y each output pixel's numbers begin, or -1 for none
  int64_t count;                // output pixels of all panels; the last one may have fewer
};

// Rows of blocks [row_begin, row_end) times panels.
struct PanelTask {
  const Blocks* blocks;
  const Finish* finish;
  const Panels* panels;
  int64_t row_begin, row_end;
  // Scratch, aligned to 64 bytes.
  float* sums;  // outputs of the rows, each of sums_stride pixels
  int64_t sums_stride;
  int32_t* offsets;   // as many as blocks in a row, and kRoomAhead more
  float* weights;     // room for a row's values as float32
  float* transposed;  // lanes * (outputs of the rows + lanes)
};

// Rows of blocks [row_begin, row_end) times a few rows of x.
struct VectorTask {
  const Blocks* blocks;
  const Finish* finish;
  const float* x;  // feature by feature, `batch` numbers each
  int64_t batch;
  int64_t row_begin, row_end;
};

// A weight of N:M groups, outputs last: values (groups, n, outputs), codes (bytes, outputs). The
// outputs fill whole vectors, and n and m are at most 32.
struct Groups {
  Tensor values;
  const uint8_t* codes;
  int64_t groups, n, m, outputs;
  int32_t width;  // bits of a position, or 0 if a group's code is a bitmask of m bits
};

// Outputs [begin, end) of a group-sparse weight times a few rows of x.
struct GroupVectorTask {
  const Groups* groups;
  const Finish* finish;
  const float* x;  // (batch, inputs)
  int64_t batch;
  int64_t begin, end;
  // Scratch, aligned to 64 bytes.
  float* sums;    // 8 * (end - begin)
  float* tables;  // 8 * 8 * 16
};

// Outputs [begin, end) of a group-sparse weight times panels of float32.
struct GroupPanelTask {
  const Groups* groups;
  const Finish* finish;
  const Panels* panels;
  int64_t begin, end;
  int64_t groups_at_once;  // whose pixels fit into the cache
  // Scratch, aligned to 64 bytes.
  float* sums;  // outputs, each of sums_stride pixels
  int64_t sums_stride;
  int32_t* offsets;   // outputs * places of the groups at once
  float* weights;     // the same
  float* transposed;  // lanes * (outputs + lanes)
};

// Rows of blocks [row_begin, row_end), of int8, times rows of int8.
struct IntegerTask {
  const Blocks* blocks;
  const Finish* finish;      // with scales
  const int8_t* x;           // (pixels, inputs), of a few rows
  const uint8_t* panels;     // (panels, inputs, integer_rows), of many rows
  const float* row_scales;   // of each pixel; of whole panels
  const int64_t* destinations;
  int64_t pixels;
  int64_t row_begin, row_end;
  // Scratch, aligned to 64 bytes; a few rows use the indices only.
  uint32_t* indices;  // as many as blocks in a row
  float* sums;        // outputs of the rows, each of sums_stride pixels
  int64_t sums_stride;
  int32_t* quads;     // a row's values, four blocks in one number
  int32_t* excess;    // n
  int32_t* tile;      // n * integer_rows
  void* woven;        // integer_scratch bytes
  float* transposed;  // lanes * (outputs of the rows + 2 * lanes)
};

struct Kernels {
  const char* name;
  int64_t lanes;  // float32 numbers in a vector
  int64_t tile;   // pixels that one pass over a panel computes for blocks
  int64_t group_tile;  // and for groups, at most
  bool multiplies_bf16;
  void (*pack)(const PackTask&);
  // False if an index is out of range; nothing outside the arrays is touched.
  bool (*blocks_times_panels)(const PanelTask&);
  bool (*blocks_times_vectors)(const VectorTask&);
  void (*groups_times_panels)(const GroupPanelTask&);
  void (*groups_times_vectors)(const GroupVectorTask&);
  int64_t integer_rows, integer_scratch;  // rows of a panel of int8
  void (*pack_integers)(const int8_t* x, int64_t inputs, int64_t begin, int64_t end,
                        uint8_t* panel);
  bool (*integers_times_panels)(const IntegerTask&);
  bool (*integers_times_vectors)(const IntegerTask&);
};

const Kernels* portable_kernels();
#ifdef NMJAX_X86
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();
#endif

}  // namespace nmjax
