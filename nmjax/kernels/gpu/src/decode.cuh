// Few rows times a packed 2:4 weight: the weight's bytes are the cost, so it is read packed, once,
// as nmjax packs it, and expanded in registers for the dense tensor cores. Values are of x's dtype,
// or int8 with a scale for each output, which become bfloat16 in registers, exactly.
//
// A lane of `mma` m16n8k16 holds entries k = 2t, 2t+1, 2t+8, 2t+9 of two rows of A and one column
// of B (t = lane % 4). The sum may run in any order, so those four are a group of the weight: a
// lane expands whole groups and reads the four entries of x that belong to them in one load. Rows
// of A may be any outputs, so a lane takes neighboring ones, which are neighbors in memory.
#pragma once

#include <cstdint>

namespace nmjax {

template <int kBytes>
struct Load;
template <>
struct Load<16> {
  using Type = uint4;
};
template <>
struct Load<8> {
  using Type = uint2;
};
template <>
struct Load<4> {
  using Type = unsigned int;
};
template <>
struct Load<2> {
  using Type = unsigned short;
};

// Number `i` of the 32-bit words of what was loaded.
template <typename Loaded>
__device__ __forceinline__ uint32_t word(const Loaded& loaded, int i) {
  if constexpr (sizeof(Loaded) < 4) {
    return loaded;
  } else {
    return reinterpret_cast<const uint32_t*>(&loaded)[i];
  }
}

// kCount things of kBytes bytes together, read once and not kept in the first cache: that is for x.
template <int kBytes>
__device__ __forceinline__ typename Load<kBytes>::Type read_once(const void* from) {
  return __ldcs(reinterpret_cast<const typename Load<kBytes>::Type*>(from));
}

// For each code of two positions, where the four 16-bit slots of a group come from, as selectors
// of __byte_perm(values, 0): the first value is bytes 0 and 1, the second 2 and 3, zero 4.
__device__ __forceinline__ uint32_t selectors_of(uint32_t code) {
  return 0x44444444u ^ (0x54u << 8 * (code & 3)) ^ (0x76u << 8 * (code >> 2 & 3));
}

// The two kept values of one output's group as 16-bit numbers, the first in the low half. `first`
// and `second` are words that hold them, among other outputs' values, at `place`.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second, int place, uint16_t) {
  return __byte_perm(first, second, place ? 0x7632 : 0x5410);
}

// The integer's low seven bits behind 0x43 are 128 more than they are in bfloat16. 128 is then taken
// away, or 256 where the integer is negative; both differences are exact.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second, int place, int8_t) {
  const uint32_t bytes = __byte_perm(first, second, 0x4400 + 0x1111 * place);
  return T::subtract((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) | 0x43004300u);
}

// What a lane reads of the weight in one step of 16 inputs: one group of kOutputs outputs.
template <typename T, int kOutputs, typename Value>
struct Groups {
  static constexpr int kInWord = 4 / sizeof(Value);
  typename Load<kOutputs * sizeof(Value)>::Type first, second;  // The kept values.
  typename Load<kOutputs>::Type codes;                          // A byte holds two groups' codes.

  __device__ __forceinline__ void read(const Value* values, const uint8_t* codes_of_all,
                                       int64_t group, int64_t outputs, int64_t output) {
    const Value* here = values + 2 * group * outputs + output;
    first = read_once<kOutputs * sizeof(Value)>(here);
    second = read_once<kOutputs * sizeof(Value)>(here + outputs);
    codes = read_once<kOutputs>(codes_of_all + group / 2 * outputs + output);
  }

  // The four slots of one output's group, two in each word.
  __device__ __forceinline__ void expand(int output, int half, const uint32_t* selectors,
                                         uint32_t* low, uint32_t* high) const {
    const uint32_t pair = pair_of<T>(word(first, output / kInWord), word(second, output / kInWord),
                                     output % kInWord, Value{});
    const uint32_t code = word(codes, output / 4) >> (8 * (output % 4) + 4 * half) & 15;
    const uint32_t selector = selectors[code];
    *low = __byte_perm(pair, 0, selector & 0xffff);
    *high = __byte_perm(pair, 0, selector >> 16);
  }
};

// y (batch, outputs) = x (batch, inputs) times the weight; values (groups, 2, outputs), codes
// (groups / 2, outputs). A block computes 8 * kOutputs outputs of 8 * kTiles rows; its warps share
// the inputs among them. T is Bf16 or F16, from who includes this; Value is uint16_t for numbers of
// T, or int8_t. `scales` and `bias` (outputs) may be nullptr.
template <typename T, int kOutputs, int kTiles, int kWarps, typename Value>
__global__ void __launch_bounds__(32 * kWarps)
    decode_kernel(const uint16_t* __restrict__ x, const Value* __restrict__ values,
                  const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                  const float* __restrict__ bias, uint16_t* __restrict__ y, int batch,
                  int64_t inputs, int64_t outputs, bool relu) {
  // Many tiles fill the registers with sums, and give enough to do while little is read ahead.
  constexpr int kRows = 8 * kTiles, kWide = 8 * kOutputs, kAhead = kTiles > 4 ? 2 : 4;
  __shared__ uint32_t selectors[16];
  __shared__ float sums[kWarps][8][kWide];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_of_lane = lane / 4, group_of_lane = lane % 4;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kWide;
  const int first_row = blockIdx.y * kRows;
  if (threadIdx.x < 16) selectors[threadIdx.x] = selectors_of(threadIdx.x);
  __syncthreads();

  float c[kOutputs / 2][kTiles][4] = {};
  const int64_t steps = inputs / 16;
  for (int64_t step = warp; step < steps; step += kWarps * kAhead) {
    Groups<T, kOutputs, Value> groups[kAhead];
    uint2 b[kAhead][kTiles];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int64_t at = step + ahead * kWarps;
      if (at >= steps) break;
      const int64_t group = 4 * at + group_of_lane;
      groups[ahead].read(values, codes, group, outputs, first_output + row_of_lane * kOutputs);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = first_row + 8 * tile + row_of_lane;
        b[ahead][tile] = make_uint2(0, 0);
        if (row < batch) {
          b[ahead][tile] = __ldg(reinterpret_cast<const uint2*>(x + row * inputs + 4 * group));
        }
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (step + ahead * kWarps >= steps) break;
#pragma unroll
      for (int pair = 0; pair < kOutputs / 2; ++pair) {
        uint32_t a[4];
        groups[ahead].expand(2 * pair, group_of_lane % 2, selectors, &a[0], &a[2]);
        groups[ahead].expand(2 * pair + 1, group_of_lane % 2, selectors, &a[1], &a[3]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) T::mma(c[pair][tile], a, b[ahead][tile]);
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile) __syncthreads();
#pragma unroll
    for (int pair = 0; pair < kOutputs / 2; ++pair) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp][2 * group_of_lane + i % 2][row_of_lane * kOutputs + 2 * pair + i / 2] =
            c[pair][tile][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * kWide; i += 32 * kWarps) {
      const int row = first_row + 8 * tile + i / kWide;
      if (row >= batch) continue;
      const int64_t output = first_output + i % kWide;
      float sum = 0;
      for (int other = 0; other < kWarps; ++other) sum += sums[other][i / kWide][i % kWide];
      if (scales != nullptr) sum *= scales[output];
      if (bias != nullptr) sum += bias[output];
      if (relu && sum < 0) sum = 0;
      y[row * outputs + output] = T::round(sum);
    }
  }
}

}  // namespace nmjax
