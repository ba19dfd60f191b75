// The decode kernel, its own source, run on the CPU.
#include "cuda_on_cpu.h"

#include <cstring>
#include <mutex>

#include "decode.cuh"

namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float from_f16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

struct Bf16 {
  static void mma(float* c, const uint32_t* a, uint2 b) { mma_16x8x16<from_bf16>(c, a, b); }
  static uint16_t round(float sum) {
    uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static uint32_t subtract(uint32_t a, uint32_t b) {
    const auto one = [](uint32_t left, uint32_t right) -> uint32_t {
      return round(from_bf16(static_cast<uint16_t>(left)) - from_bf16(static_cast<uint16_t>(right)));
    };
    return one(a & 0xffff, b & 0xffff) | one(a >> 16, b >> 16) << 16;
  }
};

struct F16 {
  static void mma(float* c, const uint32_t* a, uint2 b) { mma_16x8x16<from_f16>(c, a, b); }
  static uint16_t round(float sum) {
    const auto narrow = static_cast<_Float16>(sum);
    uint16_t bits;
    std::memcpy(&bits, &narrow, 2);
    return bits;
  }
};

struct Work {
  const uint16_t* x;
  const void* values;
  const uint8_t* codes;
  const float *scales, *bias;
  uint16_t* y;
  int64_t batch, inputs, outputs;
  bool relu;
};

template <typename T, int kOutputs, int kTiles, int kWarps, typename Value>
void run(const Work& w) {
  run_on_cpu(static_cast<unsigned>(w.outputs / (8 * kOutputs)),
             static_cast<unsigned>((w.batch + 8 * kTiles - 1) / (8 * kTiles)), 32 * kWarps, [=] {
               nmjax::decode_kernel<T, kOutputs, kTiles, kWarps, Value>(
                   w.x, static_cast<const Value*>(w.values), w.codes, w.scales, w.bias, w.y,
                   static_cast<int>(w.batch), w.inputs, w.outputs, w.relu);
             });
}

template <typename T, typename Value>
bool pick(const Work& w, int outputs, int tiles) {
  if (outputs == 8 && tiles == 1) run<T, 8, 1, 8, Value>(w);
  else if (outputs == 8 && tiles == 2) run<T, 8, 2, 8, Value>(w);
  else if (outputs == 8 && tiles == 8) run<T, 8, 8, 4, Value>(w);
  else if (outputs == 4 && tiles == 4) run<T, 4, 4, 4, Value>(w);
  else if (outputs == 2 && tiles == 1) run<T, 2, 1, 8, Value>(w);
  else return false;
  return true;
}

}  // namespace

// Whether it ran, and read nothing but its arguments. `numbers`: 0 bfloat16, 1 float16, 2 int8
// beside bfloat16.
extern "C" int decode_on_cpu(int numbers, int outputs_of_lane, int tiles, const uint16_t* x,
                             const void* values, const uint8_t* codes, const float* scales,
                             const float* bias, uint16_t* y, int64_t batch, int64_t inputs,
                             int64_t outputs, int relu) {
  // Simulated devices take turns: there is one thread block's memory.
  static std::mutex& mutex = *new std::mutex;
  const std::lock_guard<std::mutex> turn(mutex);
  const auto range = [](const void* from, int64_t bytes) {
    return Range{static_cast<const char*>(from), static_cast<size_t>(bytes)};
  };
  readable = {range(x, 2 * batch * inputs),
              range(values, (numbers == 2 ? 1 : 2) * inputs / 2 * outputs),
              range(codes, inputs / 8 * outputs)};
  strayed = false;
  const Work work{x, values, codes, scales, bias, y, batch, inputs, outputs, relu != 0};
  const bool ran = numbers == 0   ? pick<Bf16, uint16_t>(work, outputs_of_lane, tiles)
                   : numbers == 1 ? pick<F16, uint16_t>(work, outputs_of_lane, tiles)
                                  : pick<Bf16, int8_t>(work, outputs_of_lane, tiles);
  return ran && !strayed;
}
