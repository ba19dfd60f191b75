// Vectors of float32 for the instruction set that this file is compiled for.
//
// Everything here, and in whatever includes it, lives in a namespace of that instruction set, and
// nothing of the standard library is instantiated: the linker keeps one copy of an inline function,
// and a copy with AVX-512 in it must not be the one that an older machine runs.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "tasks.h"

namespace nmjax::NMJAX_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));  // what may overflow
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename V>
inline V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

inline Vector relu(Vector v) { return v < 0 ? Vector{} : v; }  // NaN stays

inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// __builtin_convertvector, for which g++ 12 needs many instructions.
inline Integers integers(Halves from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(from)));
#else
  return __builtin_convertvector(from, Integers);
#endif
}

// kLanes bytes from memory.
inline Integers load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(load<Bytes>(from), Integers);
#endif
}

// int8 numbers from memory, as many as a vector of float32 has.
template <typename Floats>
inline Floats load_signed(const int8_t* from) {
  constexpr int kCount = sizeof(Floats) / 4;
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kCount == 8) {
    return reinterpret_cast<Floats>(
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))));
  }
#endif
  float numbers[kCount];
  for (int i = 0; i < kCount; ++i) numbers[i] = from[i];
  return load<Floats>(numbers);
}

inline Vector widen(Halves bf16) {
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(integers(bf16)) << 16);
}

inline Halves narrow(Vector v) {
  Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
  bits = (v == v ? rounded : bits | 0x400000) >> 16;
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

// kLanes numbers, from float32 or bfloat16.
inline Vector load_numbers(Tensor from, int64_t at) {
  if (from.type == Type::kF32) return load<Vector>(static_cast<const float*>(from.data) + at);
  return widen(load<Halves>(static_cast<const uint16_t*>(from.data) + at));
}

inline float load_number(Tensor from, int64_t at) {
  if (from.type == Type::kF32) return static_cast<const float*>(from.data)[at];
  return widen(static_cast<const uint16_t*>(from.data)[at]);
}

inline void store_numbers(Tensor to, int64_t at, Vector v) {
  if (to.type == Type::kF32) {
    store(static_cast<float*>(to.data) + at, v);
  } else {
    store(static_cast<uint16_t*>(to.data) + at, narrow(v));
  }
}

inline void store_number(Tensor to, int64_t at, float f) {
  if (to.type == Type::kF32) {
    static_cast<float*>(to.data)[at] = f;
  } else {
    static_cast<uint16_t*>(to.data)[at] = narrow(f);
  }
}

// Of small loops over registers, which the compiler must know apart early.
#define NMJAX_UNROLL _Pragma("GCC unroll 16")

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Makes rows columns.
#if defined(__AVX512F__)
inline void transpose(Vector (&rows)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#elif defined(__AVX2__)
inline void transpose(Vector (&rows)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#else
inline void transpose(Vector (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float f = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = f;
    }
  }
}
#endif

}  // namespace nmjax::NMJAX_ISA
