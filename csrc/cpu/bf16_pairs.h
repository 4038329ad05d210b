// Vectors of bfloat16 for products that take k by pairs: on tiles (amx.h), and by dot products of pairs (bf16_dot.h).
#pragma once

#include "convert.h"

namespace nystromgan::NYSTROMGAN_ISA {

// Whether a right operand [k, cols] whose rounding matters is split in high + low, to 16 bits: only a thin one. Two products
// cost twice the time, which little work does not show, and the errors of few sums do not average out. The others round less
// often than eager bfloat16 does.
inline bool is_split(int64_t k, int64_t cols) {
  constexpr int64_t kThin = 16;
  return k <= kThin || cols <= kThin;
}

// The first n of up to 32 values along k.
NYSTROMGAN_INLINE __m512i load_along(const BFloat16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
}

// The first n of up to 16 values of k = 0 and of k = 1, in pairs; zero for k = 1 where it is absent.
NYSTROMGAN_INLINE __m512i load_pairs(const BFloat16* p, int64_t k_stride, bool second, int64_t n) {
  const __mmask16 mask = n >= 16 ? 0xffff : (1u << n) - 1;
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second ? mask : 0, p + (second ? k_stride : 0)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

NYSTROMGAN_INLINE Vec load_masked(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0, p);
}

NYSTROMGAN_INLINE __m512i round_two(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

NYSTROMGAN_INLINE __m512i interleave_halves(__m512i x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, x);
}

NYSTROMGAN_INLINE __m512i load_along(const float* p, int64_t n) {
  return round_two(load_masked(p, n), n > 16 ? load_masked(p + 16, n - 16) : Vec{});
}

NYSTROMGAN_INLINE __m512i load_pairs(const float* p, int64_t k_stride, bool second, int64_t n) {
  return interleave_halves(round_two(load_masked(p, n), second ? load_masked(p + k_stride, n) : Vec{}));
}

}  // namespace nystromgan::NYSTROMGAN_ISA
