// The iterative Moore-Penrose inverse of one fp32 matrix, forward and backward, for the kernels that need one.
//
//   Z_0 = A^T / c,  X = A Z,  T2 = 15 I - 7 X + X^2,  T3 = 13 I - X T2,  Z <- 1/4 Z T3
//
// A square is [m, ld] with ld = padded_ld(m), zero in its last columns. Gradients of A and Z are kept transposed.
//
// The backward goes forward. While c stays, Z = A^T f(A A^T) for a polynomial f, so Z^T is the gradient in A of a number,
// tr P(A A^T) with 2 P' = f, and the derivative of a gradient is its own adjoint: dA = (Z')^T for a gradient G of Z, where
// Z' is the derivative of Z as A moves along A' = G^T. X' = A' Z + A Z', T2' and T3' are symmetric as X, T2 and T3 are:
// 5 products a step, where the way back takes 8. And Z(t A, t^2 c) = Z(A, c) / t gives d c = -(<G, Z> + <A, dA>) / 2c.
#pragma once

#include "engine.h"
#include "pinv_plan.h"
#include "../common/types.h"

namespace nystromgan::NYSTROMGAN_ISA {

// Rows of an odd number of cache lines: 2 KiB apart, the rows of a 512-wide panel would share eight L1 sets.
inline int64_t padded_ld(int64_t m) {
  const int64_t lines = round_up(m, 16) / 16;
  return 16 * (lines >= 8 && lines % 2 == 0 ? lines + 1 : lines);
}

inline int64_t square_size(int64_t m) { return m * padded_ld(m); }

// From this size on, one matrix is shared by all threads where a matrix a thread would leave more than a fifth of them idle:
// shared, a matrix takes 1.15 times its part of the threads' time (512 rows, 2 threads).
constexpr int64_t kSharedSize = 128;

inline bool shares_matrix(int64_t threads, int64_t count, int64_t m) {
  const int64_t rounds = (count + threads - 1) / threads;
  return m >= kSharedSize && 4 * rounds * threads > 5 * count;
}

// Runs body(i, team) for every matrix: side by side, or one after the other, each with the whole team.
template <class Body>
inline void for_each_matrix(ParallelRun run, int64_t threads, int64_t count, int64_t m, Body body) {
  if (shares_matrix(threads, count, m)) {
    for (int64_t i = 0; i < count; ++i) body(i, run);
  } else {
    parallel(run, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, nullptr);
    });
  }
}

template <class Body>
inline void shared(ParallelRun team, int64_t tasks, Body body) {
  if (team == nullptr) body(0, tasks);
  else parallel(team, tasks, body);
}

#if defined(__AMX_BF16__)
// Where tiles take less time than vectors, packing included.
inline bool suits_tiles(int64_t rows, int64_t cols, int64_t k) { return min(rows, min(cols, k)) >= 96; }

// Of n rows of blocks below a diagonal, the t-th when each short one follows a long one: any half of them is half the work.
inline int64_t long_with_short(int64_t t, int64_t n) { return t % 2 == 0 ? n - 1 - t / 2 : t / 2; }

// 128 k at a time: so much of B stays in L2, and of a strip of A in L1. With `lower`, blocks above the diagonal are left out.
template <bool accumulate, bool lower, class Finish>
inline void tile_product(
    ParallelRun team, int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c,
    int64_t ldc, Finish finish) {
  constexpr int64_t kBlock = 2 * kTileRows, kBlockK = 128;
  Scratch scratch(SplitEngine::right_size(k, cols));
  BFloat16* const right = reinterpret_cast<BFloat16*>(scratch.get());
  shared(team, (cols + kTileRows - 1) / kTileRows, [&](int64_t begin, int64_t end) {
    split_tiles<false>(begin, end - begin, b, cols, k, 1, ldb, right);
  });
  const int64_t next = depth_of(k) * kParts * kTileSize, blocks = (rows + kBlock - 1) / kBlock;
  shared(team, blocks, [&](int64_t begin, int64_t end) {
    Scratch left(SplitEngine::left_size(kBlock, kBlockK));
    BFloat16* const strip = reinterpret_cast<BFloat16*>(left.get());
    const SplitEngine::Session session;
    for (int64_t i = 0; i < k; i += kBlockK)
      for (int64_t t = begin; t < end; ++t) {
        const int64_t r = kBlock * (lower ? long_with_short(t, blocks) : t), count = min(kBlock, rows - r);
        const int64_t width = lower ? r + count : cols;
        const int64_t depth = min(kBlockK, k - i), own = depth_of(depth) * kParts * kTileSize;
        split_tiles<true>(a.data + r * a.row_stride + i * a.k_stride, count, depth, a.row_stride, a.k_stride, strip);
        const BFloat16* part = right + i / kTileDepth * kParts * kTileSize;
        if (accumulate || i > 0)
          multiply_split<true>(count, width, depth, strip, part, own, next, c + r * ldc, ldc);
        else
          multiply_split<false>(count, width, depth, strip, part, own, next, c + r * ldc, ldc);
        if (i + kBlockK >= k) finish(r, count);
      }
  });
}
#endif

// Not inlined: amid the registers of a larger function the loop of 12 products takes 30 instructions in the place of 24.
template <bool accumulate>
__attribute__((noinline)) inline void multiply_block(
    int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  multiply_float<accumulate>(rows, cols, k, a, b, ldb, c, ldc);
}

// Row above which lie t of n equal parts of the triangle below a diagonal.
inline int64_t triangle_row(int64_t rows, int64_t t, int64_t n) {
  return static_cast<int64_t>(static_cast<double>(rows) * __builtin_sqrt(static_cast<double>(t) / static_cast<double>(n)));
}

// C = A B or C += A B, shared by a team of threads when there is one; then finish(first, rows) on each thread's rows, while
// they are in its cache. Sums over blocks of 64 k round 0.75 times as badly as over 128, at 0.93 (512 rows) to 1.03 times
// the time. With `lower`, what lies above the diagonal is not written, but for some columns beside it: panel by panel, the
// rows from the diagonal on, which reads B once.
template <bool accumulate, bool lower = false, class Finish>
inline void product(
    ParallelRun team, int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c,
    int64_t ldc, Finish finish) {
#if defined(__AMX_BF16__)
  if (suits_tiles(rows, cols, k))
    return tile_product<accumulate, lower>(team, rows, cols, k, a, b, ldb, c, ldc, finish);
#endif
  constexpr int64_t kBlockRows = 6, kBlockK = 64, kPanel = 2 * kLanes;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  shared(team, blocks, [&](int64_t begin, int64_t end) {
    const int64_t first = lower ? triangle_row(rows, begin, blocks) : begin * kBlockRows;
    const int64_t last = lower ? triangle_row(rows, end, blocks) : min(end * kBlockRows, rows);
    const int64_t width = lower ? last : cols, panel = lower ? kPanel : cols;
    for (int64_t i = 0; i < k; i += kBlockK)
      for (int64_t col = 0; col < width; col += panel) {
        const int64_t top = lower ? max(first, col) : first, count = min(panel, width - col), depth = min(kBlockK, k - i);
        const StridedMatrix block{a.data + top * a.row_stride + i * a.k_stride, a.row_stride, a.k_stride};
        const auto multiply = accumulate || i > 0 ? multiply_block<true> : multiply_block<false>;
        multiply(last - top, count, depth, block, b + i * ldb + col, ldb, c + top * ldc + col, ldc);
      }
    finish(first, last - first);
  });
}

template <bool accumulate, bool lower = false>
inline void product(
    ParallelRun team, int64_t rows, int64_t cols, int64_t k, StridedMatrix a, const float* b, int64_t ldb, float* c,
    int64_t ldc) {
  product<accumulate, lower>(team, rows, cols, k, a, b, ldb, c, ldc, [](int64_t, int64_t) {});
}

// Blocks of kLanes above the diagonal of a square become those below it, transposed; for the rows of block `i`.
inline void mirror(int64_t m, int64_t i, float* c) {
  const int64_t ld = padded_ld(m), row = i * kLanes, whole = m / kLanes * kLanes, padded = round_up(m, kLanes);
  for (int64_t col = row + kLanes; col < whole; col += kLanes) {
    Vec x[kLanes];
    for (int r = 0; r < kLanes; ++r) x[r] = load(c + (col + r) * ld + row);
    transpose(x);
    for (int r = 0; r < kLanes; ++r) store(c + (row + r) * ld + col, x[r]);
  }
  for (int64_t r = row; r < min(row + kLanes, m); ++r) {
    if (row < whole)
      for (int64_t col = whole; col < m; ++col) c[r * ld + col] = c[col * ld + r];
    for (int64_t col = m; col < padded; ++col) c[r * ld + col] = 0.0f;
  }
}

// The same for all rows. Above the diagonal alone is written, and below it read, so that no thread waits for another.
inline void mirror(ParallelRun team, int64_t m, float* c) {
  shared(team, (m + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mirror(m, i, c);
  });
}

// c = a b of squares, then finish(first, rows); half the work where the product is `symmetric`: then `finish` sees what
// lies above the diagonal only as rubbish, which the mirrored rest replaces.
template <class Finish>
inline void square_product(
    ParallelRun team, int64_t m, const float* a, const float* b, bool symmetric, float* c, Finish finish) {
  const int64_t ld = padded_ld(m);
  if (!symmetric) return product<false>(team, m, m, m, {a, ld, 1}, b, ld, c, ld, finish);
  product<false, true>(team, m, m, m, {a, ld, 1}, b, ld, c, ld, finish);
  mirror(team, m, c);
}

// c = a b + d e of squares, then finish(first, rows); half the work where the sum is `symmetric`.
template <class Finish>
inline void sum_of_products(
    ParallelRun team, int64_t m, const float* a, const float* b, const float* d, const float* e, bool symmetric, float* c,
    Finish finish) {
  const int64_t ld = padded_ld(m);
  if (!symmetric) {
    product<false>(team, m, m, m, {a, ld, 1}, b, ld, c, ld);
    return product<true>(team, m, m, m, {d, ld, 1}, e, ld, c, ld, finish);
  }
  product<false, true>(team, m, m, m, {a, ld, 1}, b, ld, c, ld);
  product<true, true>(team, m, m, m, {d, ld, 1}, e, ld, c, ld, finish);
  mirror(team, m, c);
}

inline void scale_in_place(int64_t size, float factor, float* x) {
  for (int64_t i = 0; i < size; i += kLanes) store(x + i, factor * load(x + i));
}

// dst [cols, ldd] = factor * src^T of src [rows, lds], zero up to ldd, a multiple of kLanes.
inline void scaled_transpose(
    int64_t rows, int64_t cols, float factor, const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t width = min(kLanes, cols - c);
    for (int64_t r = 0; r < ldd; r += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const float* from = src + (r + i) * lds + c;
        x[i] = r + i >= rows ? Vec{} : width == kLanes ? load(from) : load_first(from, width);
      }
      transpose(x);
      for (int64_t i = 0; i < width; ++i) store(dst + (c + i) * ldd + r, factor * x[i]);
    }
  }
}

// |A|_1 and |A|_inf with where they are attained (the first of equals; a NaN is kept).
struct Norms {
  float column = 0, row = 0;
  int64_t column_index = 0, row_index = 0;
};

NYSTROMGAN_INLINE Vec magnitudes(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

inline bool larger(float x, float y) { return x > y || (x != x && y == y); }

inline Norms norms(int64_t m, const float* a, float* scratch /* ld */) {
  const int64_t ld = padded_ld(m), padded = round_up(m, kLanes);
  memset(scratch, 0, ld * sizeof(float));
  Norms best;
  for (int64_t r = 0; r < m; ++r) {
    Vec sum{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec magnitude = magnitudes(load(a + r * ld + c));
      sum += magnitude;
      store(scratch + c, load(scratch + c) + magnitude);
    }
    const float total = reduce_add(sum);
    if (larger(total, best.row)) best.row = total, best.row_index = r;
  }
  for (int64_t c = 0; c < m; ++c)
    if (larger(scratch[c], best.column)) best.column = scratch[c], best.column_index = c;
  return best;
}

// c of Z_0 = A^T / c; 1 for a zero matrix, whose inverse is zero.
inline float initial_scale(float column, float row) { return column * row == 0.0f ? 1.0f : column * row; }

// One step's factors, kept for the backward.
struct PinvStep {
  float *z, *x, *t2, *t3;  // squares
};

inline PinvStep pinv_step(float* chain, int64_t m, int64_t step) {
  const int64_t size = square_size(m);
  float* base = chain + 4 * step * size;
  return {base, base + size, base + 2 * size, base + 3 * size};
}

// X, T2 = 15 I - 7 X + X^2 and T3 of a step from A and Z. All are polynomials of A A^T, and `symmetric` halves the work.
inline void pinv_factors(ParallelRun team, int64_t m, const float* a, PinvStep step, bool symmetric) {
  const int64_t ld = padded_ld(m);
  square_product(team, m, a, step.z, symmetric, step.x, [](int64_t, int64_t) {});
  square_product(team, m, step.x, step.x, symmetric, step.t2, [&](int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
      for (int64_t c = r * ld; c < (r + 1) * ld; c += kLanes)
        store(step.t2 + c, load(step.t2 + c) - 7.0f * load(step.x + c));
      step.t2[r * ld + r] += 15.0f;
    }
  });
  square_product(team, m, step.x, step.t2, symmetric, step.t3, [&](int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
      for (int64_t c = r * ld; c < (r + 1) * ld; c += kLanes) store(step.t3 + c, -load(step.t3 + c));
      step.t3[r * ld + r] += 13.0f;
    }
  });
}

// Z_next = 1/4 Z T3
inline void pinv_advance(ParallelRun team, int64_t m, PinvStep step, float* next) {
  const int64_t ld = padded_ld(m);
  product<false>(team, m, m, m, {step.z, ld, 1}, step.t3, ld, next, ld, [&](int64_t first, int64_t rows) {
    scale_in_place(rows * ld, 0.25f, next + first * ld);
  });
}

// Of up to so many steps, X is taken for symmetric, but in the last. What rounding leaves of asymmetry keeps Z's rounding out
// of the null space of A: without it, that grows 3.25 times a step, until a plain step takes most of it back. After 6 steps
// outputs are off by 0.8 times eager's error, as they are by plain products, where a symmetric last step made it 1.3 times
// (96 to 192 rows); after 12 it would be 2 to 4 times.
constexpr int64_t kSymmetricSteps = 6;

inline bool is_symmetric(int64_t m, int64_t step, int64_t steps) {
  return m >= kSymmetricSize && steps <= kSymmetricSteps && step + 1 < steps;
}

// Runs `steps` steps of `all`. With keep, step i's factors stay in chain + 4 i squares, else two steps' memory is used in turn;
// returns the last Z. `chain` holds keep ? 4 steps + 1 : 8 squares.
inline float* pinv_chain(
    ParallelRun team, int64_t m, const float* a, float c, int64_t steps, int64_t all, bool keep, float* chain) {
  const int64_t ld = padded_ld(m);
  scaled_transpose(m, m, 1.0f / c, a, ld, pinv_step(chain, m, 0).z, ld);
  for (int64_t i = 0; i < steps; ++i) {
    const PinvStep step = pinv_step(chain, m, keep ? i : i % 2);
    pinv_factors(team, m, a, step, is_symmetric(m, i, all));
    pinv_advance(team, m, step, pinv_step(chain, m, keep ? i + 1 : (i + 1) % 2).z);
  }
  return pinv_step(chain, m, keep ? steps : steps % 2).z;
}

// Z' of the next step from a step's; `scratch` holds three squares.
inline void pinv_advance_tangent(
    ParallelRun team, int64_t m, const float* a, const float* tangent_a, PinvStep step, bool symmetric,
    const float* tangent_z, float* next, float* scratch) {
  const int64_t size = square_size(m), ld = padded_ld(m);
  float *x = scratch, *t2 = scratch + size, *t3 = scratch + 2 * size;  // X', T2', T3'
  sum_of_products(team, m, tangent_a, step.z, a, tangent_z, symmetric, x, [](int64_t, int64_t) {});
  sum_of_products(team, m, x, step.x, step.x, x, symmetric, t2, [&](int64_t first, int64_t rows) {
    for (int64_t i = first * ld; i < (first + rows) * ld; i += kLanes) store(t2 + i, load(t2 + i) - 7.0f * load(x + i));
  });
  sum_of_products(team, m, x, step.t2, step.x, t2, symmetric, t3, [&](int64_t first, int64_t rows) {
    scale_in_place(rows * ld, -1.0f, t3 + first * ld);
  });
  sum_of_products(team, m, tangent_z, step.t3, step.z, t3, false, next, [&](int64_t first, int64_t rows) {
    scale_in_place(rows * ld, 0.25f, next + first * ld);
  });
}

// <x, y> of squares.
inline float inner(int64_t m, const float* x, const float* y) {
  float total = 0;
  for (int64_t r = 0; r < m; ++r) {
    Vec sum{};
    for (int64_t i = r * padded_ld(m); i < r * padded_ld(m) + round_up(m, kLanes); i += kLanes)
      sum += load(x + i) * load(y + i);  // products leave the rest unwritten
    total += reduce_add(sum);
  }
  return total;
}

// Through `steps` kept steps of `all`: from grad_z (transposed) of the last Z, grad_a (transposed) gains A's gradient.
// Returns d c, the gradient of c. `scratch` holds five squares.
inline float pinv_chain_backward(
    ParallelRun team, int64_t m, const float* a, float c, int64_t steps, int64_t all, float* chain, const float* grad_z,
    float* grad_a, float* scratch) {
  const int64_t size = square_size(m), ld = padded_ld(m);
  float *tangent = scratch, *next = scratch + size;
  scaled_transpose(m, m, 1.0f / c, grad_z, ld, tangent, ld);
  const float from_z = inner(m, tangent, pinv_step(chain, m, steps).z);  // <G, Z> / c
  for (int64_t i = 0; i < steps; ++i) {
    const PinvStep step = pinv_step(chain, m, i);
    pinv_advance_tangent(team, m, a, grad_z, step, is_symmetric(m, i, all), tangent, next, scratch + 2 * size);
    float* const done = tangent;
    tangent = next, next = done;
  }
  const float from_a = inner(m, tangent, pinv_step(chain, m, 0).z);  // <A, dA> / c
  for (int64_t i = 0; i < size; i += kLanes) store(grad_a + i, load(grad_a + i) + load(tangent + i));
  return -0.5f * (from_z + from_a);
}

// Adds the gradient of a norm |A|_1 (a column's sum) or |A|_inf (a row's): factor * sign(A) along the line where it is.
inline void add_norm_gradient(
    int64_t m, const float* a, float factor, int64_t line, bool is_column, float* grad) {
  const int64_t ld = padded_ld(m);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t at = is_column ? i * ld + line : line * ld + i;
    grad[at] += factor * float((a[at] > 0.0f) - (a[at] < 0.0f));
  }
}

}  // namespace nystromgan::NYSTROMGAN_ISA
