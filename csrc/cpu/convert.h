// Between tensors in their storage type and fp32: vectors, rows, and matrices of any strides.
#pragma once

#include "simd.h"
#include "../common/types.h"

namespace nystromgan::NYSTROMGAN_ISA {

// GCC takes two steps for __builtin_convertvector where AVX-512 has one instruction.
NYSTROMGAN_INLINE Vec widen(BFloat16, HalfBitsVec bits) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
  return (Vec)(__builtin_convertvector(bits, BitsVec) << 16);
#endif
}

NYSTROMGAN_INLINE Vec widen(Half, HalfBitsVec bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  const BitsVec wide = __builtin_convertvector(bits, BitsVec);
  const BitsVec sign = (wide & 0x8000) << 16;
  const BitsVec magnitude = (wide & 0x7fff) << 13;
  const Vec finite = (Vec)magnitude * 0x1p112f;  // moves the exponent's bias, subnormals included
  const BitsVec special = magnitude | 0x7f800000;
  return (Vec)(sign | (magnitude >= 0x0f800000 ? special : (BitsVec)finite));
#endif
}

// bfloat16 in the low half of every lane, rounded to the nearest even; a NaN stays one, quiet.
NYSTROMGAN_INLINE BitsVec round_to_bfloat16(Vec x) {
  const BitsVec bits = (BitsVec)x, quiet = (BitsVec)(x != x) & 0x7fc00000;
  return ((bits + 0x7fff + ((bits >> 16) & 1)) | quiet) >> 16;
}

NYSTROMGAN_INLINE HalfBitsVec narrow(BFloat16, Vec x) {
#if defined(__AVX512BF16__)
  return (HalfBitsVec)_mm512_cvtneps_pbh(x);  // the same, but that it flushes what is below 2^-126
#elif defined(__AVX512F__)
  return (HalfBitsVec)_mm512_cvtepi32_epi16((__m512i)round_to_bfloat16(x));
#else
  return __builtin_convertvector(round_to_bfloat16(x), HalfBitsVec);
#endif
}

NYSTROMGAN_INLINE HalfBitsVec narrow(Half, Vec x) {
#if defined(__AVX512F__)
  return (HalfBitsVec)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfBitsVec)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const BitsVec bits = (BitsVec)x;
  const BitsVec magnitude = bits & 0x7fffffff;
  const BitsVec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const BitsVec subnormal = (BitsVec)((Vec)magnitude + 0.5f) - 0x3f000000;  // the adder rounds to 2^-24
  BitsVec half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? BitsVec{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? BitsVec{} + 0x7e00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfBitsVec);
#endif
}

// The bits of both, one after the other. In memory they would wait for two stores before they are read as one: bfloat16
// outputs took four times as long.
template <class T>
NYSTROMGAN_INLINE Vec narrow_two(T type, Vec first, Vec second) {
  const HalfBitsVec low = narrow(type, first), high = narrow(type, second);
#if defined(__AVX512F__)
  return (Vec)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#elif defined(__AVX2__)
  return (Vec)_mm256_set_m128i((__m128i)high, (__m128i)low);
#else
  const HalfBitsVec both[] = {low, high};
  Vec bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
NYSTROMGAN_INLINE Vec narrow_two(BFloat16, Vec first, Vec second) {
  // each half of the register has a half of both
  const __m256i packed = _mm256_packus_epi32((__m256i)round_to_bfloat16(first), (__m256i)round_to_bfloat16(second));
  return (Vec)_mm256_permute4x64_epi64(packed, 0xd8);
}
#endif

template <class T>
NYSTROMGAN_INLINE Vec load(const T* p) {
  HalfBitsVec bits;
  memcpy(&bits, p, sizeof bits);
  return widen(T{}, bits);
}

template <class T>
NYSTROMGAN_INLINE void store(T* p, Vec x) {
  const HalfBitsVec bits = narrow(T{}, x);
  memcpy(p, &bits, sizeof bits);
}

// The first n < kLanes elements; zeros after them. A masked access where there is one: through memory, every short row
// waits for its own stores (heads of 8 took twice the time).
template <class T>
NYSTROMGAN_INLINE Vec load_first(const T* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_maskz_loadu_ps((1u << n) - 1, p);
  else return widen(T{}, (HalfBitsVec)_mm256_maskz_loadu_epi16((1u << n) - 1, p));
#else
  T buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
#endif
}

template <class T>
NYSTROMGAN_INLINE void store_first(T* p, Vec x, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == sizeof(float)) _mm512_mask_storeu_ps(p, (1u << n) - 1, x);
  else _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)narrow(T{}, x));
#else
  T buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
#endif
}

NYSTROMGAN_INLINE float to_float(float x) { return x; }
template <class T>
NYSTROMGAN_INLINE float to_float(T x) {
  return load_first(&x, 1)[0];
}

template <class T>
NYSTROMGAN_INLINE T from_float(float x) {
  T y;
  store_first(&y, splat(x), 1);
  return y;
}
template <>
NYSTROMGAN_INLINE float from_float<float>(float x) {
  return x;
}

template <class T>
inline void to_float(const T* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store_first(dst + i, load_first(src + i, n - i), n - i);
}

// Stores past the cache: plain ones first read what they overwrite. Only for what is larger than the caches, and read by
// other threads only after they have waited for this one at a lock or an atomic step, which orders such stores too.
NYSTROMGAN_INLINE void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#else
  store(p, x);
#endif
}

template <class T>
NYSTROMGAN_INLINE void stream(T* p, Vec x) {
  store(p, x);  // half a vector is no whole line
}

template <class T>
NYSTROMGAN_INLINE bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(float)) == 0;
}

NYSTROMGAN_INLINE void stream_two(float* p, Vec first, Vec second) {
  stream(p, first);
  stream(p + kLanes, second);
}

template <class T>
NYSTROMGAN_INLINE void stream_two(T* p, Vec first, Vec second) {
  stream(reinterpret_cast<float*>(p), narrow_two(T{}, first, second));
}

template <class T>
inline void from_float(const float* src, T* dst, int64_t n, bool past_cache = false) {
  int64_t i = 0;
  if (past_cache && is_aligned(dst))
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) stream_two(dst + i, load(src + i), load(src + i + kLanes));
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store_first(dst + i, load_first(src + i, n - i), n - i);
}

// A kLanes x kLanes block of a matrix with contiguous columns, transposed; zeros outside rows x cols.
template <class T>
NYSTROMGAN_INLINE void load_transposed(const T* src, int64_t rows, int64_t cols, int64_t col_stride, Vec (&x)[kLanes]) {
  for (int c = 0; c < kLanes; ++c) {
    if (c >= cols) x[c] = Vec{};
    else x[c] = rows >= kLanes ? load(src + c * col_stride) : load_first(src + c * col_stride, rows);
  }
  transpose(x);
}

// Copies a matrix of any strides, src [rows, cols], to fp32 rows: dst [rows, ld], zeros up to round_up(cols, kLanes).
template <class T>
inline void gather(
    const T* src, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, float* dst, int64_t ld) {
  const int64_t whole = cols / kLanes * kLanes;
  if (col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = src + r * row_stride;
      float* to = dst + r * ld;
      for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(from + c));
      if (whole < cols) store(to + whole, load_first(from + whole, cols - whole));
    }
  } else if (row_stride == 1) {
    for (int64_t r = 0; r < rows; r += kLanes)
      for (int64_t c = 0; c < cols; c += kLanes) {
        Vec x[kLanes];
        load_transposed(src + r + c * col_stride, rows - r, cols - c, col_stride, x);
        for (int64_t i = 0; i < min(kLanes, rows - r); ++i) store(dst + (r + i) * ld + c, x[i]);
      }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < round_up(cols, kLanes); ++c)
        dst[r * ld + c] = c < cols ? to_float(src[r * row_stride + c * col_stride]) : 0.0f;
  }
}

// Copies fp32 rows, src [rows, ld], to a matrix of any strides, dst [rows, cols], past the cache on request. Reads up to
// round_up(cols, kLanes).
template <class T>
inline void scatter(
    const float* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t row_stride, int64_t col_stride,
    bool past_cache = false) {
  if (col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) from_float(src + r * ld, dst + r * row_stride, cols, past_cache);
  } else if (row_stride == 1) {
    for (int64_t r = 0; r < rows; r += kLanes)
      for (int64_t c = 0; c < cols; c += kLanes) {
        Vec x[kLanes];
        load_transposed(src + r * ld + c, kLanes, rows - r, ld, x);
        for (int64_t i = 0; i < min(kLanes, cols - c); ++i) {
          T* to = dst + r + (c + i) * col_stride;
          if (rows - r >= kLanes) store(to, x[i]);
          else store_first(to, x[i], rows - r);
        }
      }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) dst[r * row_stride + c * col_stride] = from_float<T>(src[r * ld + c]);
  }
}

// `scatter` of each row times its factor; src is scaled in place where columns are apart.
template <class T>
inline void scatter_scaled(
    float* src, int64_t ld, int64_t rows, int64_t cols, const float* factor, T* dst, int64_t row_stride,
    int64_t col_stride, bool past_cache = false) {
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    float* from = src + r * ld;
    const Vec scale = splat(factor[r]);
    if (col_stride != 1) {
      for (int64_t c = 0; c < round_up(cols, kLanes); c += kLanes) store(from + c, scale * load(from + c));
      continue;
    }
    T* to = dst + r * row_stride;
    int64_t c = 0;
    if (past_cache && is_aligned(to))
      for (; c + 2 * kLanes <= whole; c += 2 * kLanes)
        stream_two(to + c, scale * load(from + c), scale * load(from + c + kLanes));
    for (; c < whole; c += kLanes) store(to + c, scale * load(from + c));
    if (whole < cols) store_first(to + whole, scale * load(from + whole), cols - whole);
  }
  if (col_stride != 1) scatter(src, ld, rows, cols, dst, row_stride, col_stride);
}

}  // namespace nystromgan::NYSTROMGAN_ISA
