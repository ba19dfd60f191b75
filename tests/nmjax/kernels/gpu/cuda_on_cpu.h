// As much of CUDA as nmjax's own kernels use, on the CPU: a thread for each thread of a block, and
// the tensor cores' instruction from the layouts of its fragments in the PTX manual (m16n8k16).
#pragma once

#include <barrier>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // Blocks run one after the other.

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct Index {
  unsigned x, y;
};
inline thread_local Index threadIdx, blockIdx;

// Where may be read; and whether anything else was, or at an address that is no multiple.
struct Range {
  const char* from;
  size_t bytes;
};
inline std::vector<Range> readable;
inline bool strayed = false;

template <typename T>
T checked_read(const T* from) {
  const auto* at = reinterpret_cast<const char*>(from);
  bool inside = reinterpret_cast<uintptr_t>(at) % sizeof(T) == 0;
  bool found = false;
  for (const Range& range : readable) {
    found |= at >= range.from && at + sizeof(T) <= range.from + range.bytes;
  }
  if (!inside || !found) {
    strayed = true;
    return {};
  }
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return checked_read(from);
}
template <typename T>
T __ldg(const T* from) {
  return checked_read(from);
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 7;
    result |= static_cast<uint32_t>(both >> 8 * from & 255) << 8 * i;
  }
  return result;
}

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

struct Warp {
  float a[16][16], b[16][8];
};
inline Warp warps[32];

template <float (*kDecode)(uint16_t)>
void mma_16x8x16(float* c, const uint32_t* a, uint2 b) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Warp& warp = warps[threadIdx.x / 32];
  auto& barrier = *warp_barriers[threadIdx.x / 32];
  for (int i = 0; i < 8; ++i) {
    const int row = i % 4 < 2 ? g : g + 8, column = 2 * t + i % 2 + (i < 4 ? 0 : 8);
    warp.a[row][column] = kDecode(static_cast<uint16_t>(a[i / 2] >> 16 * (i % 2)));
  }
  for (int i = 0; i < 4; ++i) {
    const int row = 2 * t + i % 2 + (i < 2 ? 0 : 8);
    warp.b[row][g] = kDecode(static_cast<uint16_t>((i < 2 ? b.x : b.y) >> 16 * (i % 2)));
  }
  barrier.arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? g : g + 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += warp.a[row][k] * warp.b[k][column];
  }
  barrier.arrive_and_wait();
}

// Runs `kernel` in every thread of every block.
template <typename Kernel>
void run_on_cpu(unsigned blocks_x, unsigned blocks_y, unsigned threads, Kernel kernel) {
  for (unsigned block = 0; block < blocks_x * blocks_y; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (unsigned warp = 0; warp < threads / 32; ++warp) {
      warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
    }
    std::vector<std::thread> all;
    for (unsigned thread = 0; thread < threads; ++thread) {
      all.emplace_back([=] {
        threadIdx = {thread, 0};
        blockIdx = {block % blocks_x, block / blocks_x};
        kernel();
      });
    }
    for (auto& one : all) one.join();
  }
}
