// The engine of fp32 vectors: operands lie in memory as they are, or in fp32 rows.
#pragma once

#include "convert.h"
#include "matmul.h"

namespace nystromgan::NYSTROMGAN_ISA {

template <class T>
struct FloatEngine {
  using Left = StridedMatrix;
  struct Right {
    const float* data;  // [k, ld], columns padded with zeros to kLanes
    int64_t ld;
  };
  struct Session {
    Session() {}
    ~Session() {}  // not trivial, so that no compiler calls the variable unused
  };
  static constexpr int64_t kRowPad = 1;
  static constexpr bool kRounds = false;  // whether operands are bfloat16

  // A matrix [rows, cols] that a kernel computes two rows of a vector at a time, to use as a left or a right operand, or
  // as both. `data`, with rows `ld` apart, is the kernel's own, which fp32 takes in place; AMX packs to the scratch of
  // left_size(rows, cols) and right_size(rows, cols).
  template <bool as_left, bool as_right>
  class Computed {
   public:
    Computed(float* data, int64_t ld, int64_t, int64_t, float*, float*) : data_(data), ld_(ld) {}
    NYSTROMGAN_INLINE void put(int64_t row, int64_t col, Vec even, Vec odd) {
      store(data_ + row * ld_ + col, even);
      store(data_ + (row + 1) * ld_ + col, odd);
    }
    Left left() const { return {data_, ld_, 1}; }
    Right right() const { return {data_, ld_}; }

   private:
    float* data_;
    int64_t ld_;
  };

  static int64_t left_size(int64_t rows, int64_t k) {
    return sizeof(T) == sizeof(float) ? 0 : round_up(rows, kLanes) * round_up(k, kLanes);
  }
  static int64_t right_size(int64_t k, int64_t cols) { return k * round_up(cols, kLanes); }
  static int64_t right_split_size(int64_t k, int64_t cols) { return right_size(k, cols); }

  // fp32 is used where it lies, whatever its strides.
  static Left left(const float* src, int64_t, int64_t, int64_t row_stride, int64_t k_stride, float*) {
    return {src, row_stride, k_stride};
  }
  template <class S>
  static Left left(const S* src, int64_t rows, int64_t k, int64_t row_stride, int64_t k_stride, float* scratch) {
    if (row_stride == 1) {
      const int64_t ld = round_up(rows, kLanes);
      gather(src, k, rows, k_stride, 1, scratch, ld);
      return {scratch, 1, ld};
    }
    const int64_t ld = round_up(k, kLanes);
    gather(src, rows, k, row_stride, k_stride, scratch, ld);
    return {scratch, ld, 1};
  }

  // fp32 rows of whole vectors are used where they lie.
  static Right right(const float* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    if (col_stride == 1 && cols % kLanes == 0) return {src, k_stride};
    return packed(src, k, cols, k_stride, col_stride, scratch);
  }
  template <class S>
  static Right right(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    return packed(src, k, cols, k_stride, col_stride, scratch);
  }
  // For an operand whose rounding matters; fp32 has no need of it.
  template <class S>
  static Right right_split(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    return right(src, k, cols, k_stride, col_stride, scratch);
  }

  template <bool accumulate>
  static void multiply(int64_t rows, int64_t cols, int64_t k, Left a, Right b, float* c, int64_t ldc) {
    constexpr int64_t kBlock = 128;  // sums of 512 at once put outputs over 512 landmarks off by 2.3 times eager's error
    multiply_float<accumulate>(rows, cols, min(k, kBlock), a, b.data, b.ld, c, ldc);
    for (int64_t i = kBlock; i < k; i += kBlock)
      multiply_float<true>(
          rows, cols, min(k - i, kBlock), {a.data + i * a.k_stride, a.row_stride, a.k_stride}, b.data + i * b.ld, b.ld, c, ldc);
  }

 private:
  template <class S>
  static Right packed(const S* src, int64_t k, int64_t cols, int64_t k_stride, int64_t col_stride, float* scratch) {
    const int64_t ld = round_up(cols, kLanes);
    gather(src, k, cols, k_stride, col_stride, scratch, ld);
    return {scratch, ld};
  }
};

}  // namespace nystromgan::NYSTROMGAN_ISA
