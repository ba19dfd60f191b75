// The decode kernel for NVIDIA's GPUs from Ampere on: its tensor core instructions, and which
// variant a shape takes.
#include "decode.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.cuh"

namespace nmjax {
namespace {

struct Bf16 {
  __device__ __forceinline__ static void mma(float* c, const uint32_t* a, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
  __device__ __forceinline__ static uint16_t round(float sum) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(sum));
  }
  // a - b of two numbers in each; as a fused product with -1, which Ampere has too.
  __device__ __forceinline__ static uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return difference;
  }
};

struct F16 {
  __device__ __forceinline__ static void mma(float* c, const uint32_t* a, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
  __device__ __forceinline__ static uint16_t round(float sum) {
    return __half_as_ushort(__float2half_rn(sum));
  }
};

template <typename T, typename Value, int kOutputs, int kTiles>
cudaError_t launch(const Decode& work, cudaStream_t stream) {
  constexpr int kWarps = kTiles <= 2 ? 8 : 4;  // Registers for two blocks on a multiprocessor.
  const dim3 grid(static_cast<unsigned>(work.outputs / (8 * kOutputs)),
                  static_cast<unsigned>((work.batch + 8 * kTiles - 1) / (8 * kTiles)));
  decode_kernel<T, kOutputs, kTiles, kWarps, Value><<<grid, 32 * kWarps, 0, stream>>>(
      work.x, static_cast<const Value*>(work.values), work.codes, work.scales, work.bias, work.y,
      static_cast<int>(work.batch), work.inputs, work.outputs, work.relu);
  return cudaGetLastError();
}

template <typename T, typename Value, int kOutputs>
cudaError_t launch_rows(const Decode& work, cudaStream_t stream) {
  if (work.batch <= 8) return launch<T, Value, kOutputs, 1>(work, stream);
  if (work.batch <= 16) return launch<T, Value, kOutputs, 2>(work, stream);
  if (work.batch <= 32) return launch<T, Value, kOutputs, 4>(work, stream);
  return launch<T, Value, kOutputs, 8>(work, stream);
}

template <typename T, typename Value>
cudaError_t launch_outputs(const Decode& work, int64_t vector, cudaStream_t stream) {
  if (vector == 8) return launch_rows<T, Value, 8>(work, stream);
  if (vector == 4) return launch_rows<T, Value, 4>(work, stream);
  return launch_rows<T, Value, 2>(work, stream);
}

}  // namespace

cudaError_t decode(const Decode& work, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t wrong = cudaGetDevice(&device);
  if (wrong != cudaSuccess) return wrong;
  wrong = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (wrong != cudaSuccess) return wrong;
  // Long loads, as long as there is a block for every multiprocessor.
  int64_t vector = work.vector ? work.vector : 8;
  const auto too_long = [&] {
    return work.outputs % (8 * vector) != 0 ||
           (!work.vector && work.outputs / (8 * vector) < processors);
  };
  while (vector > 2 && too_long()) vector /= 2;
  switch (work.numbers) {
    case Numbers::kBf16:
      return launch_outputs<Bf16, uint16_t>(work, vector, stream);
    case Numbers::kF16:
      return launch_outputs<F16, uint16_t>(work, vector, stream);
    case Numbers::kInt8:
      return launch_outputs<Bf16, int8_t>(work, vector, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nmjax
