// Matrix products for kernels: C = A B or C += A B, C in fp32. `Left` (A [rows, k]) and `Right` (B [k, cols]) hide how an
// instruction set wants its operands; kernels only say what is multiplied.
//
//   typename Engine<T>::Session session;                       // one in every task, before its first product
//   auto a = Engine<T>::left(src, rows, k, row_stride, k_stride, scratch);      // src in T or float
//   auto b = Engine<T>::right(src, k, cols, k_stride, col_stride, scratch);
//   Engine<T>::template multiply<accumulate>(rows, cols, k, a, b, c, ldc);
//
// Operands are fp32, except for BFloat16 with AMX or AVX512_BF16, where they are bfloat16; with AMX ReuseEngine<float>
// splits fp32 for the tiles. Scratch holds left_size(rows, k) and right_size(k, cols) floats and must live, with src, as
// long as the operand. C [rows, cols] must have ldc >= round_up(cols, kLanes) and memory for round_up(rows, kRowPad) rows:
// what lies beyond rows x cols is overwritten, with zeros (or, accumulating, left as it was) up to round_up(cols, kLanes),
// with rubbish in further rows.
#pragma once

#include "float_engine.h"
#if defined(__AMX_BF16__)
#include "amx_split.h"
#elif defined(__AVX512BF16__)
#include "bf16_dot.h"
#endif

namespace nystromgan::NYSTROMGAN_ISA {

template <class T>
struct Engine : FloatEngine<T> {};

// For operands that are used often enough to repay packing: fp32 goes to tiles too.
template <class T>
struct ReuseEngine : Engine<T> {};

#if defined(__AMX_BF16__)
template <>
struct Engine<BFloat16> : AmxEngine {};
template <>
struct ReuseEngine<BFloat16> : AmxEngine {};
template <>
struct ReuseEngine<float> : SplitEngine {};
#elif defined(__AVX512BF16__)
template <>
struct Engine<BFloat16> : DotEngine {};
template <>
struct ReuseEngine<BFloat16> : DotEngine {};
#endif

}  // namespace nystromgan::NYSTROMGAN_ISA
