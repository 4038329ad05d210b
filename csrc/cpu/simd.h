// Vectors of float as wide as the instruction set that this file is compiled for, through GCC and Clang vector types.
// Everything lives in the namespace of that instruction set, so that no two builds of one template share a symbol.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC bug 105593: it takes the undefined operand of unmasked intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef NYSTROMGAN_ISA
#error "compile with -DNYSTROMGAN_ISA=<namespace>, one of portable, avx2, avx512, avx512bf16, amx"
#endif

#define NYSTROMGAN_INLINE inline __attribute__((always_inline))

namespace nystromgan::NYSTROMGAN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitsVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBitsVec __attribute__((vector_size(kLanes * 2)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// x - 0 folds away, which 0 + x does not: it makes 0 of -0.
NYSTROMGAN_INLINE Vec splat(float x) { return x - Vec{}; }

NYSTROMGAN_INLINE Vec load(const float* p) {
  typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

NYSTROMGAN_INLINE void store(float* p, Vec x) {
  typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  *reinterpret_cast<Unaligned*>(p) = x;
}

// The larger of the two; x where either is NaN, so a NaN of x is kept.
NYSTROMGAN_INLINE Vec max(Vec floor, Vec x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(floor, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(floor, x);
#else
  return floor > x ? floor : x;
#endif
}

NYSTROMGAN_INLINE float reduce_add(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

// The largest lane; which one, when there is a NaN, is not said.
NYSTROMGAN_INLINE float reduce_max(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

NYSTROMGAN_INLINE int32_t reduce_min(IntVec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epi32((__m512i)x);
#else
  int32_t least = x[0];
  for (int i = 1; i < kLanes; ++i) least = x[i] < least ? x[i] : least;
  return least;
#endif
}

// 2^x, exactly 1 at 0, to 2e-7 relative, to 3e-6 where it becomes a T of half precision, or as near as rounding allows for
// a T of double; 0 below 2^-126, or below 2^-126.5 where there is no AVX-512; NaN stays NaN. x at most 127.
template <class T = float>
NYSTROMGAN_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = max(splat(-127.0f), x);
  const Vec shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: rounds to an integer in the low bits, biased as exponents are
  const Vec n = shifted - 12583039.0f;
#endif
  // Two chains at once: one alone leaves the multipliers waiting, a tenth of a softmax on AVX2.
  const Vec f = x - n, square = f * f;
  Vec p;
  if constexpr (sizeof(T) > sizeof(float)) {
    const Vec low = f * 0.6931472028550945f + 1.0f;
    const Vec middle = f * 0.05550332471042011f + 0.2402264791362753f;
    const Vec high = f * 0.0013398874452434423f + 0.009618437357637098f;
    p = ((square * 0.00015353361998061418f + high) * square + middle) * square + low;
  } else if constexpr (sizeof(T) == sizeof(float)) {
    const Vec low = f * 0.6931470036506653f + 1.0f;
    const Vec middle = f * 0.05550733581185341f + 0.24022242426872253f;
    const Vec high = f * 0.001326472731307149f + 0.009671512991189957f;
    p = (high * square + middle) * square + low;
  } else {
    const Vec low = f * 0.6931241750717163f + 1.0f;
    const Vec middle = f * 0.055906426161527634f + 0.24024099111557007f;
    p = (square * 0.009582852944731712f + middle) * square + low;
  }
#if defined(__AVX512F__)
  // Below -126 the lane is zeroed, -inf included, where x - n is NaN; the comparison is false for NaN, which stays.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), p, n);
#else
  return p * (Vec)((IntVec)shifted << 23);  // at -127 the factor's bits are 0
#endif
}

// GCC has Clang's word from version 12 on.
#if defined(__clang__)
#define NYSTROMGAN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define NYSTROMGAN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// The elements of a and b in turn: a0 b0 a1 b1 ..., first and second half.
NYSTROMGAN_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  low = NYSTROMGAN_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = NYSTROMGAN_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  low = NYSTROMGAN_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = NYSTROMGAN_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = NYSTROMGAN_SHUFFLE(a, b, 0, 4, 1, 5);
  high = NYSTROMGAN_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Transposes kLanes vectors in registers: log2(kLanes) perfect shuffles of all kLanes^2 elements.
NYSTROMGAN_INLINE void transpose(Vec (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) interleave(x[i], x[i + kLanes / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// Lane i of the result is all lanes of x[i], combined: kLanes - 1 steps on pairs of vectors, whose lanes become those of
// two rows in turn.
template <class Combine>
NYSTROMGAN_INLINE Vec reduce_each(Vec (&x)[kLanes], Combine combine) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      Vec low, high;
      interleave(x[i], x[i + half], low, high);
      x[i] = combine(low, high);
    }
  }
  return x[0];
}

// Heap memory for floats, aligned to a cache line and not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(aligned_alloc(64, round_up(count * 4 + 64, 64)))) {
    if (data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data_; }
  float* get() const { return data_; }  // where a template must deduce the type

 private:
  float* data_;
};

// Scratch that a thread's tasks take in the same order each, so that only the first allocates: memory that every task
// returned to the system cost as many page faults as the output itself.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() {
    for (Slot& slot : slots_) free(slot.data);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void reset() { used_ = 0; }

  // Room for count floats until the next reset, aligned to a cache line and not initialised.
  float* take(int64_t count) {
    if (used_ == kSlots) abort();
    Slot& slot = slots_[used_++];
    if (slot.size < count || slot.data == nullptr) {
      free(slot.data);
      slot = {static_cast<float*>(aligned_alloc(64, round_up(count * 4 + 64, 64))), count};
      if (slot.data == nullptr) abort();
    }
    return slot.data;
  }

 private:
  struct Slot {
    float* data = nullptr;
    int64_t size = 0;
  };
  static constexpr int kSlots = 24;
  Slot slots_[kSlots];
  int used_ = 0;
};

}  // namespace nystromgan::NYSTROMGAN_ISA
