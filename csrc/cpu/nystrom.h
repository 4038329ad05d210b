// What the passes of Nyström attention share: pooling, the two softmaxes, the core matrix.
#pragma once

#include "engine.h"
#include "nystrom_attention.h"
#include "pinv.h"

namespace nystromgan::NYSTROMGAN_ISA {

// Tokens a task takes. Fixed, so that the order of every sum, and with it every bit, is the same whatever the batch and
// the number of threads.
constexpr int64_t kChunk = 1024;

inline int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

template <class T>
NYSTROMGAN_INLINE T* row(const Tokens& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + n * x.token;
}

inline const int32_t* row(const LandmarkIndex& index, int64_t b, int64_t h) {
  return index.data + b * index.batch + h * index.head;
}

// Tokens in a block, so that a block of [tokens, M] floats stays within 64 KiB of L2.
inline int64_t block_tokens(int64_t landmarks) {
  const int64_t fit = 16384 / round_up(landmarks, kLanes) / 32 * 32;
  return fit < 32 ? 32 : min(fit, int64_t{128});
}

// y += factor * x over n floats.
NYSTROMGAN_INLINE void add_scaled(float* y, const float* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + factor * load(x + i));
  for (; i < n; ++i) y[i] += factor * x[i];
}

// sums [M, dim] += the tokens [first, first + count) of x, each to its landmark.
template <class T>
inline void add_to_landmarks(
    const T* x, int64_t token, int64_t channel, const int32_t* index, int64_t count, int64_t dim, float* sums) {
  for (int64_t n = 0; n < count; ++n) {
    if (index[n] < 0) continue;
    const T* from = x + n * token;
    float* to = sums + index[n] * dim;
    int64_t d = 0;
    if (channel == 1)
      for (; d + kLanes <= dim; d += kLanes) store(to + d, load(to + d) + load(from + d));
    for (; d < dim; ++d) to[d] += to_float(from[d * channel]);
  }
}

// 1 / tokens of each landmark, for every (b, h); 0 for an empty one.
struct InverseCounts {
  InverseCounts(ParallelRun run, int64_t batch, int64_t heads, int64_t tokens, int64_t landmarks, LandmarkIndex index)
      : values((index.batch ? batch : 1) * (index.head ? heads : 1) * landmarks),
        batch_stride(index.batch ? (index.head ? heads : 1) * landmarks : 0),
        head_stride(index.head ? landmarks : 0) {
    const int64_t rows = index.head ? heads : 1;
    parallel(run, (index.batch ? batch : 1) * rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t* of = row(index, i / rows, i % rows);
        float* count = values + i * landmarks;
        memset(count, 0, landmarks * sizeof(float));
        for (int64_t n = 0; n < tokens; ++n)
          if (of[n] >= 0) count[of[n]] += 1.0f;
        for (int64_t m = 0; m < landmarks; ++m) count[m] = count[m] > 0.0f ? 1.0f / count[m] : 0.0f;
      }
    });
  }
  const float* of(int64_t b, int64_t h) const { return values + b * batch_stride + h * head_stride; }

 private:
  Scratch values;
  int64_t batch_stride, head_stride;
};

// means [B, H, M, dim] of x's tokens over the index; `only` limits the work to the rows b where it is true.
template <class T>
inline void pool_tokens(
    ParallelRun run, int64_t batch, int64_t heads, int64_t tokens, int64_t landmarks, int64_t dim, const Tokens& x,
    LandmarkIndex index, const bool* only, float* means) {
  const InverseCounts inverse(run, batch, heads, tokens, landmarks, index);
  const int64_t chunks = (tokens + 4 * kChunk - 1) / (4 * kChunk), size = landmarks * dim;
  Scratch partial(batch * heads * chunks * size);
  parallel(run, batch * heads * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks / heads, h = i / chunks % heads, first = i % chunks * 4 * kChunk;
      if (only != nullptr && !only[b]) continue;
      memset(partial + i * size, 0, size * sizeof(float));
      add_to_landmarks<T>(
          row<T>(x, b, h, first), x.token, x.channel, row(index, b, h) + first, min(4 * kChunk, tokens - first), dim,
          partial + i * size);
    }
  });
  parallel(run, batch * heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (only != nullptr && !only[i / heads]) continue;
      const float* count = inverse.of(i / heads, i % heads);
      float* to = means + i * size;
      memset(to, 0, size * sizeof(float));
      for (int64_t c = 0; c < chunks; ++c) add_scaled(to, partial + (i * chunks + c) * size, 1.0f, size);
      for (int64_t m = 0; m < landmarks; ++m)
        for (int64_t d = 0; d < dim; ++d) to[m * dim + d] *= count[m];
    }
  });
}

// dst [M, dim] = scale log2(e) * means, so that the products of tokens with it are logits to base 2.
inline void scale_to_base_2(const float* means, int64_t size, float scale, float* dst) {
  for (int64_t i = 0; i < size; ++i) dst[i] = means[i] * (scale * kLog2E);
}

// Turns rows of base-2 logits [rows, ld] into 2^(x - max), times 1 / sum with normalise, else leaving that factor in
// inverse_sum. The first m columns count, less those masked; the others become zero, as does a row with none that counts.
template <bool normalise>
inline void softmax_rows(float* logits, int64_t rows, int64_t m, int64_t ld, const bool* mask, float* inverse_sum) {
  const int64_t padded = round_up(m, kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    float* x = logits + r * ld;
    for (int64_t i = m; i < padded; ++i) x[i] = -kInfinity;
    if (mask != nullptr)
      for (int64_t i = 0; i < m; ++i)
        if (mask[i]) x[i] = -kInfinity;
    Vec best = splat(-kInfinity);
    for (int64_t i = 0; i < padded; i += kLanes) best = max(best, load(x + i));
    const float top = reduce_max(best);
    const Vec shift = splat(top == -kInfinity ? 0.0f : top);
    Vec sum{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec y = exp2(load(x + i) - shift);
      store(x + i, y);
      sum += y;
    }
    const float total = reduce_add(sum);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if constexpr (normalise) {
      for (int64_t i = 0; i < padded; i += kLanes) store(x + i, inverse * load(x + i));
    } else {
      inverse_sum[r] = inverse;
    }
  }
}

// The core A = softmax(s Q~ K~^T) as a square; rows of absent query landmarks are zero.
inline void make_core(const NystromProblem& p, int64_t i, float* core) {
  const int64_t m = p.landmarks, d = p.head_dim, ld = square_ld(m), b = i / p.heads;
  Scratch keys(m * d), packed(d * ld);
  scale_to_base_2(p.key_means + i * m * d, m * d, p.scale, keys);
  scaled_transpose(m, d, 1.0f, keys, d, packed, ld);  // [D, M]
  multiply_float<false>(m, ld, d, {p.query_means + i * m * d, d, 1}, packed, ld, core, ld);
  softmax_rows<true>(core, m, m, ld, p.key_landmark_mask ? p.key_landmark_mask + b * m : nullptr, nullptr);
  for (int64_t r = 0; r < m; ++r)
    if (p.query_landmark_mask != nullptr && p.query_landmark_mask[b * m + r]) memset(core + r * ld, 0, ld * 4);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = round_up(m, kLanes); c < ld; ++c) core[r * ld + c] = 0.0f;
}

// Whether row b's landmarks are its own tokens, so that O = F pool(V).
inline bool is_exact(const NystromProblem& p, int64_t i) { return p.exact_rows != nullptr && p.exact_rows[i / p.heads]; }

// |A|_1 and |A|_inf of every (b, h), or with global_init the largest of all, each with the matrix that attains it.
struct CoreNorms {
  CoreNorms(const NystromProblem& p) : global(p.global_init) {
    if (!global) return;
    const int64_t count = p.batch * p.heads;
    Scratch columns(count), rows(count);
    parallel(p.run, count, [&](int64_t begin, int64_t end) {
      Scratch core(square_size(p.landmarks)), line(square_ld(p.landmarks));
      for (int64_t i = begin; i < end; ++i) {
        make_core(p, i, core);
        const Norms own = norms(p.landmarks, core, line);
        columns[i] = own.column, rows[i] = own.row;
      }
    });
    best.column = columns[0], best.row = rows[0];
    for (int64_t i = 1; i < count; ++i) {
      if (larger(columns[i], best.column)) best.column = columns[i], column_matrix = i;
      if (larger(rows[i], best.row)) best.row = rows[i], row_matrix = i;
    }
  }
  // The norms that scale a matrix whose own are `own`.
  Norms of(const Norms& own) const { return global ? best : own; }

  bool global;
  Norms best;
  int64_t column_matrix = 0, row_matrix = 0;
};

}  // namespace nystromgan::NYSTROMGAN_ISA
