// Between what XLA calls and what nvcc compiles.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace nmjax {

// What x and y are, and the values: of the same, or int8 beside bfloat16.
enum class Numbers { kBf16, kF16, kInt8 };

// Arrays as for decode_kernel.
struct Decode {
  const uint16_t* x;
  const void* values;
  const uint8_t* codes;
  const float *scales, *bias;  // nullptr if none.
  uint16_t* y;
  int64_t batch, inputs, outputs;
  bool relu;
  Numbers numbers;
  int64_t vector;  // Outputs of a lane: 2, 4 or 8; 0 picks.
};

// Queues the kernel; inputs and outputs are multiples of 16.
cudaError_t decode(const Decode& work, cudaStream_t stream);

}  // namespace nmjax
