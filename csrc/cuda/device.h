// What kernels are written in: threads, barriers, copies and tensor-core products; on a GPU, or emulated on a CPU.
//
// A kernel takes one struct of parameters, a grid and blocks of one axis, and dynamic shared memory only.
#pragma once

#include <stdint.h>

#include "../common/types.h"

#if NYSTROMGAN_EMULATION
#include <math.h>

#include "emulation/emulation.h"
#define DEVICE inline
#define HAS_CLUSTERS 1
#define UNROLL
#define KERNEL(name, Params, threads, blocks)                                        \
  static void name##_body(const Params& p);                                          \
  extern "C" void name(const void* p) { name##_body(*static_cast<const Params*>(p)); } \
  static void name##_body(const Params& p)
#else
#include <cooperative_groups.h>
#define DEVICE __device__ __forceinline__
#define HAS_CLUSTERS (__CUDA_ARCH__ >= 900)
#define UNROLL _Pragma("unroll")
// At most `threads` a block, and registers for `blocks` of them on a multiprocessor.
#define KERNEL(name, Params, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#endif

namespace nystromgan {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct alignas(8) Two {
  float x[2];
};
struct alignas(16) Four {
  float x[4];
};

struct Fragment {  // float32 results of m16n8: rows g and g + 8, columns 2t and 2t + 1, where lane = 4g + t
  float x[4];
};

#if NYSTROMGAN_EMULATION

inline int thread_index() { return emulation::place.thread.x; }
inline int num_threads() { return emulation::place.threads.x; }
inline int block_index() { return emulation::place.block.x; }
inline int num_blocks() { return emulation::place.block_count.x; }
inline char* shared_memory() { return emulation::shared; }
inline void sync_block() { emulation::sync_block(); }
inline void sync_warp() {
  char none = 0;
  emulation::gather(&none, 0, &none, 0, [](const char*, char*) {});
}
inline void sync_grid() { emulation::sync_grid(); }
inline int cluster_rank() { return emulation::place.rank; }
inline void sync_cluster() { emulation::sync_grid(); }  // one cluster runs at a time
inline Four load_remote(const void* own, int rank) {
  return *reinterpret_cast<const Four*>(emulation::remote(own, rank));
}
inline void commit_copies() { emulation::commit_copies(); }
inline void copy_async(void* target, const void* source, int bytes) {
  emulation::copy_later(target, source, bytes, 16 - bytes);
}
template <int PENDING>
inline void wait_copies() {
  emulation::wait_copies(PENDING);
}

inline float exp2_of(float x) { return exp2f(x); }
inline float log2_of(float x) { return log2f(x); }
inline float max_of(float a, float b) { return a > b ? a : b; }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float load_float(const float* p) { return *p; }
inline Four load_four(const float* p) { return *reinterpret_cast<const Four*>(p); }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  _Float16 value;
  memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  Half half;
  memcpy(&half.bits, &value, 2);
  return half;
}

// Two numbers in the halves of a register, the first in the low one.
template <class T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

inline uint32_t tf32_of(float x) { return (bits_of(x) + 0x1000) & 0xffffe000; }

// Adds to a counter in shared memory, whichever thread comes first: only of integers does that give the same bits.
inline void add_to_counter(int* counter, int x) { *counter += x; }

inline float shuffle_xor(float x, int mask) {
  struct Operand {
    float x;
    int mask;
  } operand{x, mask};
  float result;
  emulation::gather(&operand, sizeof operand, &result, 4, [](const char* operands, char* results) {
    const int lanes = reinterpret_cast<const Operand*>(operands)->mask;
    for (int i = 0; i < 32; ++i)
      memcpy(results + 64 * i, &reinterpret_cast<const Operand*>(operands + 64 * (i ^ lanes))->x, 4);
  });
  return result;
}

// x of one lane.
inline int shuffle(int x, int lane) {
  struct Operand {
    int x, lane;
  } operand{x, lane};
  int result;
  emulation::gather(&operand, sizeof operand, &result, 4, [](const char* operands, char* results) {
    for (int i = 0; i < 32; ++i) {
      const int from = reinterpret_cast<const Operand*>(operands + 64 * i)->lane;
      memcpy(results + 64 * i, &reinterpret_cast<const Operand*>(operands + 64 * from)->x, 4);
    }
  });
  return result;
}

// Whether any lane of the warp says so.
inline bool any_of(bool x) {
  bool result;
  emulation::gather(&x, 1, &result, 1, [](const char* operands, char* results) {
    char any = 0;
    for (int i = 0; i < 32; ++i) any |= operands[64 * i];
    for (int i = 0; i < 32; ++i) results[64 * i] = any;
  });
  return result;
}

namespace emulation {

struct Product {
  uint32_t a[4], b[2];
  float c[4];
};

// The float32 product of gathered fragments, `pack` elements a register and 4 pack elements deep, twice.
template <int PACK, class ToFloat>
inline void multiply(const char* operands, char* results, ToFloat to_value) {
  auto lane = [&](int i) { return reinterpret_cast<const Product*>(operands + 64 * i); };
  for (int i = 0; i < 32; ++i) {
    float sums[4];
    for (int r = 0; r < 4; ++r) {
      const int row = i / 4 + 8 * (r / 2), column = 2 * (i % 4) + r % 2;
      float sum = lane(i)->c[r];
      for (int k = 0; k < 8 * PACK; ++k) {
        const int half = k / (4 * PACK), t = k % (4 * PACK) / PACK, part = k % PACK;
        const uint32_t a = lane(4 * (row % 8) + t)->a[row / 8 + 2 * half], b = lane(4 * column + t)->b[half];
        sum += to_value(a, part) * to_value(b, part);
      }
      sums[r] = sum;
    }
    memcpy(results + 64 * i, sums, 16);
  }
}

template <class Compute>
inline void product(Fragment& c, const uint32_t (&a)[4], const uint32_t (&b)[2], Compute compute) {
  Product operand;
  memcpy(operand.a, a, 16);
  memcpy(operand.b, b, 8);
  memcpy(operand.c, c.x, 16);
  gather(&operand, sizeof operand, c.x, 16, compute);
}

}  // namespace emulation

// c += a b, m16n8k8, of float32 cut to tf32.
inline void multiply_tf32(Fragment& c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::product(c, a, b, [](const char* operands, char* results) {
    emulation::multiply<1>(operands, results, [](uint32_t x, int) { return float_of(x & 0xffffe000); });
  });
}

// c += a b, m16n8k16.
template <class T>
inline void multiply_half(Fragment& c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::product(c, a, b, [](const char* operands, char* results) {
    emulation::multiply<2>(operands, results, [](uint32_t x, int part) {
      return to_float(T{static_cast<uint16_t>(x >> (16 * part))});
    });
  });
}

// Four 8 x 8 matrices of 16-bit elements, whose rows' addresses the lanes give; each lane gets two of a row of each.
template <bool TRANSPOSED>
inline void load_matrices(uint32_t (&x)[4], const void* row) {
  emulation::gather(&row, sizeof row, x, 16, [](const char* operands, char* results) {
    for (int i = 0; i < 32; ++i)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int part = 0; part < 2; ++part) {
          const int r = TRANSPOSED ? 2 * (i % 4) + part : i / 4, column = TRANSPOSED ? i / 4 : 2 * (i % 4) + part;
          const uint16_t* source;
          memcpy(&source, operands + 64 * (8 * matrix + r), sizeof source);
          pair |= uint32_t{source[column]} << (16 * part);
        }
        memcpy(results + 64 * i + 4 * matrix, &pair, 4);
      }
  });
}

#else

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int num_threads() { return blockDim.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int num_blocks() { return gridDim.x; }
DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char nystromgan_shared[];
  return nystromgan_shared;
}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// Of a cooperative launch: all blocks have come here, and see what the others wrote.
DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
// Of a launch in clusters, on sm_90 and later: this block's place in its cluster; all its blocks have come here, and see what
// the others wrote, also into their shared memory.
DEVICE int cluster_rank() {
  int rank = 0;
#if HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
DEVICE void sync_cluster() {
#if HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DEVICE void stop() { asm volatile("trap;"); }
// 16 bytes of another block's shared memory, from where `own` is in this block's.
DEVICE Four load_remote(const void* own, int rank) {
  Four x{};
#if HAS_CLUSTERS
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x[0]), "=f"(x.x[1]), "=f"(x.x[2]), "=f"(x.x[3])
               : "r"(address)
               : "memory");
#endif
  return x;
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// 16 bytes to shared memory: the first `bytes` of them from global memory, which are all that is read, and zeros.
DEVICE void copy_async(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_of(float x) { return log2f(x); }
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Past the first level of cache, where another multiprocessor's writes do not show.
DEVICE float load_float(const float* p) { return __ldcg(p); }
DEVICE Four load_four(const float* p) {
  const float4 x = __ldcg(reinterpret_cast<const float4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
DEVICE T from_float(float x) {
  T y;
  if constexpr (sizeof(T) == 4)
    y = x;
  else if constexpr (__is_same(T, BFloat16))
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two numbers in the halves of a register, the first in the low one.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (__is_same(T, BFloat16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE uint32_t tf32_of(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Adds to a counter in shared memory, whichever thread comes first: only of integers does that give the same bits.
DEVICE void add_to_counter(int* counter, int x) { atomicAdd(counter, x); }

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
// x of one lane.
DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
// Whether any lane of the warp says so.
DEVICE bool any_of(bool x) { return __any_sync(0xffffffff, x); }

// c += a b, m16n8k8, of float32 cut to tf32.
DEVICE void multiply_tf32(Fragment& c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b, m16n8k16.
template <class T>
DEVICE void multiply_half(Fragment& c, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, BFloat16))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements, whose rows' addresses the lanes give; each lane gets two of a row of each.
template <bool TRANSPOSED>
DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif

template <class T>
DEVICE T minimum(T a, T b) {
  return a < b ? a : b;
}

template <class T>
DEVICE T ceil_div(T n, T divisor) {
  return (n + divisor - 1) / divisor;
}

DEVICE int warp_index() { return thread_index() / 32; }
DEVICE int lane_index() { return thread_index() % 32; }

DEVICE float warp_sum(float x) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

DEVICE float warp_max(float x) {
  UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace nystromgan
