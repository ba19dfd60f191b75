// Between what XLA calls and what nvcc compiles.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace nmjax {

// Arrays as for decode_kernel; 16-bit numbers are bfloat16, or float16 if `half`.
struct Decode {
  const uint16_t *x, *values;
  const uint8_t* codes;
  const float* bias;  // nullptr if none.
  uint16_t* y;
  int64_t batch, inputs, outputs;
  bool relu, half;
  int64_t vector;  // Outputs of a lane: 2, 4 or 8; 0 picks.
};

// Queues the kernel; inputs and outputs are multiples of 16.
cudaError_t decode(const Decode& work, cudaStream_t stream);

}  // namespace nmjax
