// Products by groups of four warps, 64 rows at once, with operands in shared memory: wgmma of sm_90a, or emulated.
//
// An operand in shared memory is rows of 128 bytes, eight after each other from a multiple of 1,024 bytes on. Byte b of
// row r lies at b ^ 16 (r % 8) of it, so that neither a row nor a column of 16 bytes has two parts in the same banks.
#pragma once

#include "fragments.h"

#if NYSTROMGAN_EMULATION || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_GROUPS 1
#else
#define HAS_GROUPS 0
#endif

// A kernel for what has them; else one of so few threads that the launches see there is nothing to run.
#if HAS_GROUPS
#define GROUP_KERNEL(name, Params, threads, blocks, ...) \
  KERNEL(name, Params, threads, blocks) { __VA_ARGS__; }
#else
#define GROUP_KERNEL(name, Params, threads, blocks, ...) \
  KERNEL(name, Params, 32, 1) { stop(); }
#endif

namespace nystromgan {

constexpr int kGroupRows = 64, kGroupThreads = 128, kSwizzleBytes = 1024;

#if NYSTROMGAN_EMULATION

// Shared memory from its first multiple of kSwizzleBytes on.
inline char* swizzled_memory() { return emulation::shared; }
inline uint32_t place_in_shared(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulation::shared);
}
inline void fence_for_groups() {}

namespace emulation {

struct GroupProduct {
  uint32_t left[4];
  uint64_t left_place, right_place;
  Fragment* c;
  int warp;
};

// Where, in shared memory, element (line, within) of an operand begins.
inline int swizzled(uint64_t operand, int line, int within) {
  const int start = static_cast<int>(operand & 0x3fff) << 4, stride = static_cast<int>(operand >> 32 & 0x3fff) << 4;
  const int byte = start + line % 8 * 128 + line / 8 * stride + 2 * within;
  return byte ^ (byte >> 7 & 7) << 4;
}

template <class T>
float shared_at(int byte) {
  return to_float(*reinterpret_cast<const T*>(shared + byte));
}

// 16 rows, one warp's, of c += left right, N columns and 16 deep; operands in shared memory have depths or lines as rows.
template <class T, int N, bool LEFT_SHARED, bool BY_DEPTH>
void multiply_rows_of(const char* operands, char*) {
  auto at = [](uint64_t operand, int line, int depth) {
    return shared_at<T>(BY_DEPTH ? swizzled(operand, depth, line) : swizzled(operand, line, depth));
  };
  auto lane = [&](int i) { return reinterpret_cast<const GroupProduct*>(operands + 64 * i); };
  float left[16][16], right[16][N];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair = lane(4 * (row % 8) + k % 8 / 2)->left[row / 8 + 2 * (k / 8)];
      left[row][k] = LEFT_SHARED ? at(lane(0)->left_place, 16 * lane(0)->warp + row, k)
                                 : to_float(T{static_cast<uint16_t>(pair >> (16 * (k % 2)))});
    }
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < N; ++n) right[k][n] = at(lane(0)->right_place, n, k);
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < N / 8; ++j)
      for (int r = 0; r < 4; ++r) {
        float& sum = lane(i)->c[j].x[r];
        for (int k = 0; k < 16; ++k) sum += left[i / 4 + 8 * (r / 2)][k] * right[k][8 * j + 2 * (i % 4) + r % 2];
      }
}

}  // namespace emulation

template <class T, bool BY_DEPTH>
inline void multiply_shared(Fragment (&c)[8], uint64_t left, uint64_t right) {
  const emulation::GroupProduct product{{}, left, right, c, thread_index() / 32 % 4};
  emulation::gather(&product, sizeof product, nullptr, 0, emulation::multiply_rows_of<T, 64, true, BY_DEPTH>);
}
template <class T, int N, bool BY_DEPTH>
inline void multiply_shared(Fragment (&c)[N / 8], const Left<T>& left, uint64_t right) {
  static_assert(!BY_DEPTH || N == 64, "a row holds 64 columns");
  const emulation::GroupProduct product{{left.x[0], left.x[1], left.x[2], left.x[3]}, 0, right, c, 0};
  emulation::gather(&product, sizeof product, nullptr, 0, emulation::multiply_rows_of<T, N, false, BY_DEPTH>);
}
template <int COUNT>
inline void begin_products(Fragment (&)[COUNT]) {}
template <int COUNT>
inline void finish_products(Fragment (&)[COUNT]) {}

#else

DEVICE char* swizzled_memory() {
  char* s = shared_memory();
  return s + (-shared_address(s) & (kSwizzleBytes - 1));
}
DEVICE uint32_t place_in_shared(const void* p) { return shared_address(p); }
// What this thread wrote to shared memory is there for the tensor cores, once the block meets.
DEVICE void fence_for_groups() {
#if HAS_GROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if HAS_GROUPS

#define RESULT(c, j) "+f"(c[j].x[0]), "+f"(c[j].x[1]), "+f"(c[j].x[2]), "+f"(c[j].x[3])
#define RESULTS_16(c, j) RESULT(c, j), RESULT(c, j + 1), RESULT(c, j + 2), RESULT(c, j + 3)
#define RESULTS_32(c, j) RESULTS_16(c, j), RESULTS_16(c, j + 4)
#define RESULTS_64(c, j) RESULTS_32(c, j), RESULTS_32(c, j + 8)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                  \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
           "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Results, left operand and right one; both factors 1, then which operands lie with their depth in rows. `one` is a predicate
// that holds: results are added to what is there.
#define WGMMA(n, type, results, operands, major)                                                                 \
  "{\n.reg .pred one;\nsetp.eq.u32 one, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" results \
  "}, " operands ", one, 1, 1, " major ";\n}"

// c (64 rows, 64 columns) += left right, 16 deep. BY_DEPTH both are rows of a depth each in shared memory, and else rows of
// left and columns of right are rows there.
template <class T, bool BY_DEPTH>
DEVICE void multiply_shared(Fragment (&c)[8], uint64_t left, uint64_t right) {
  constexpr bool kBFloat16 = __is_same(T, BFloat16);
#define MULTIPLY_SHARED(type, major) \
  asm volatile(WGMMA("64", type, NAMES_32, "%32, %33", major) : RESULTS_32(c, 0) : "l"(left), "l"(right))
  if constexpr (kBFloat16 && BY_DEPTH) MULTIPLY_SHARED("bf16", "1, 1");
  if constexpr (kBFloat16 && !BY_DEPTH) MULTIPLY_SHARED("bf16", "0, 0");
  if constexpr (!kBFloat16 && BY_DEPTH) MULTIPLY_SHARED("f16", "1, 1");
  if constexpr (!kBFloat16 && !BY_DEPTH) MULTIPLY_SHARED("f16", "0, 0");
#undef MULTIPLY_SHARED
}

// c (64 rows, N columns) += left right, 16 deep; each warp has its rows of left.
template <class T, int N, bool BY_DEPTH>
DEVICE void multiply_shared(Fragment (&c)[N / 8], const Left<T>& left, uint64_t right) {
  static_assert(N == 64 || (!BY_DEPTH && (N == 32 || N == 128)), "what is spelled out below");
  constexpr bool kBFloat16 = __is_same(T, BFloat16);
#define MULTIPLY_REGISTERS(n, type, count, operands, major)                      \
  asm volatile(WGMMA(n, type, NAMES_##count, operands, major)                    \
               : RESULTS_##count(c, 0)                                           \
               : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "l"(right))
#define MULTIPLY_REGISTERS_64(type, major) MULTIPLY_REGISTERS("64", type, 32, "{%32, %33, %34, %35}, %36", major)
  if constexpr (N == 32 && kBFloat16) MULTIPLY_REGISTERS("32", "bf16", 16, "{%16, %17, %18, %19}, %20", "0");
  if constexpr (N == 32 && !kBFloat16) MULTIPLY_REGISTERS("32", "f16", 16, "{%16, %17, %18, %19}, %20", "0");
  if constexpr (N == 64 && kBFloat16 && !BY_DEPTH) MULTIPLY_REGISTERS_64("bf16", "0");
  if constexpr (N == 64 && !kBFloat16 && !BY_DEPTH) MULTIPLY_REGISTERS_64("f16", "0");
  if constexpr (N == 64 && kBFloat16 && BY_DEPTH) MULTIPLY_REGISTERS_64("bf16", "1");
  if constexpr (N == 64 && !kBFloat16 && BY_DEPTH) MULTIPLY_REGISTERS_64("f16", "1");
  if constexpr (N == 128 && kBFloat16) MULTIPLY_REGISTERS("128", "bf16", 64, "{%64, %65, %66, %67}, %68", "0");
  if constexpr (N == 128 && !kBFloat16) MULTIPLY_REGISTERS("128", "f16", 64, "{%64, %65, %66, %67}, %68", "0");
#undef MULTIPLY_REGISTERS
#undef MULTIPLY_REGISTERS_64
}

// Ordinary code has done with the results, so that products may change them; and the other way round.
template <int COUNT>
DEVICE void keep_in_order(Fragment (&c)[COUNT]) {
  UNROLL
  for (int j = 0; j < COUNT; ++j) asm volatile("" : RESULT(c, j)::"memory");
}
template <int COUNT>
DEVICE void begin_products(Fragment (&c)[COUNT]) {
  keep_in_order(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int COUNT>
DEVICE void finish_products(Fragment (&c)[COUNT]) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  keep_in_order(c);
}

#undef RESULT
#undef RESULTS_16
#undef RESULTS_32
#undef RESULTS_64
#undef NAMES_16
#undef NAMES_32
#undef NAMES_64
#undef WGMMA

#endif
#endif

// An operand that begins at p, as products take it: rows of 128 bytes, swizzled.
DEVICE uint64_t shared_operand(const void* p) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62, kEightRows = uint64_t{kSwizzleBytes >> 4} << 32;
  return (place_in_shared(p) >> 4 & 0x3fff) | kEightRows | kSwizzled;
}

}  // namespace nystromgan
