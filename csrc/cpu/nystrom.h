// What the passes of Nyström attention share: pooling, the two softmaxes, the core matrix.
#pragma once

#include <sys/mman.h>

#include "engine.h"
#include "nystrom_attention.h"
#include "pinv_apply.h"

namespace nystromgan::NYSTROMGAN_ISA {

// Tokens a task takes: by their number alone, so that the order of every sum, and with it every bit, is the same whatever
// the batch and the number of threads. At most 16 tasks a head, whose partial sums stay small beside the tokens.
inline int64_t chunk_tokens(int64_t tokens) { return round_up(max(int64_t{1}, (tokens + 15) / 16), 1024); }

// Runs body(i, s, workspace) for every chunk s < chunks of every (b, h) i < count.
template <class Body>
inline void for_each_chunk(ParallelRun run, int64_t count, int64_t chunks, Body body) {
  parallel(run, count * chunks, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    for (int64_t t = begin; t < end; ++t) {
      workspace.reset();
      body(t / chunks, t % chunks, workspace);
    }
  });
}

inline int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens(tokens) - 1) / chunk_tokens(tokens); }

// Runs body(i, s, partial, workspace) for every chunk, of which `partial` holds `size` floats, and add(i, s, partial) for the
// chunks of each (b, h) in their order. Where one thread has all of them, it adds each at once; the others' wait in memory
// until all are there. So no sum depends on the number of threads, and few partial sums are in memory, where all of them
// took a tenth of what a training step in bfloat16 does.
template <class Body, class Add>
inline void sum_over_chunks(ParallelRun run, int64_t count, int64_t chunks, int64_t size, Body body, Add add) {
  Scratch waiting(count * chunks * size);  // memory that is not touched is none
  Scratch added(count);  // whether all of its chunks were added at once
  memset(added, 0, count * sizeof(float));
  parallel(run, count * chunks, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / chunks, s = t % chunks;
      const bool whole = begin <= i * chunks && (i + 1) * chunks <= end;
      workspace.reset();
      float* own = workspace.take(size);
      float* partial = whole ? own : waiting + t * size;
      body(i, s, partial, workspace);
      if (!whole) continue;
      add(i, s, partial);
      added[i] = 1.0f;
    }
  });
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= added[i] != 0.0f;
  if (all) return;
  parallel(run, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t s = 0; added[i] == 0.0f && s < chunks; ++s) add(i, s, waiting + (i * chunks + s) * size);
  });
}

// Whether a tensor of so many rows is written past the cache; from here on its next reader finds little of it there.
template <class T>
inline bool exceeds_cache(int64_t rows, int64_t dim) { return rows * dim * int64_t{sizeof(T)} >= int64_t{1} << 24; }

NYSTROMGAN_INLINE const float* as_const(const float* x) { return x; }

template <class T>
NYSTROMGAN_INLINE T* row(const Tokens& x, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + n * x.token;
}

inline const int32_t* row(const LandmarkIndex& index, int64_t b, int64_t h) {
  return index.data + b * index.batch + h * index.head;
}

// Tokens in a block, whose [tokens, M] floats stay within 128 KiB. Of fp32, 60 rows of 64 leave room in L1 for what is
// asked for ahead: 48 and 96 take 1.01 times as long on Zen 3. AMX tiles want multiples of 32.
template <class E>
inline int64_t block_tokens(int64_t landmarks) {
  constexpr bool kTiles = E::kRowPad > 1;
  constexpr int64_t kMost = kTiles ? 96 : 60, kLeast = kTiles ? 32 : 12;
  return max(kLeast, min(32768 / round_up(landmarks, kLanes) / kLeast * kLeast, kMost));
}

// Rows that are used soon.
template <class T>
struct Prefetch {
  const T* x;
  int64_t token, rows, dim;
};

// Asks for them ahead of their use, a few lines at every step: without it a core waits for memory between its products, a
// third of the keys' pass at N = 16384.
template <class T>
struct PrefetchLines {
  Prefetch<T> next;
  int64_t steps;  // until all are asked for
  int64_t lines = steps > 0 ? (next.rows * ((next.dim * int64_t{sizeof(T)} + 63) / 64) + steps - 1) / steps : 0;
  const T* at = next.x;
  int64_t r = 0, c = 0;

  NYSTROMGAN_INLINE void step() {
    for (int64_t i = 0; i < lines && r < next.rows; ++i) {
      __builtin_prefetch(at + c, 0, 2);
      c += 64 / sizeof(T);
      if (c >= next.dim) c = 0, ++r, at += next.token;
    }
  }
};

// E::multiply with a prefetch spread over its tiles: all that six rows of 64 allow at once, 24 lines, fills the line buffers
// and stalls the product, which made the forward 3 to 5% slower on Zen 3. Wide products have it at once, long before its
// use. Products on AMX's tiles are too short to hide one, and what the processor foresees by itself is as fast.
template <class E, class T, bool accumulate>
inline void multiply_ahead(
    int64_t rows, int64_t cols, int64_t k, typename E::Left a, typename E::Right b, float* c, int64_t ldc,
    Prefetch<T> next) {
  if constexpr (E::kRowPad == 1) {
    constexpr int64_t kTile = 6, kPanel = kPanelVectors * kLanes;
    if (cols <= 64) {
      PrefetchLines<T> ahead{next, (rows + kTile - 1) / kTile * ((cols + kPanel - 1) / kPanel)};
      return multiply_float<accumulate>(rows, cols, k, a, b.data, b.ld, c, ldc, [&] { ahead.step(); });
    }
    PrefetchLines<T>{next, 1}.step();
  }
  E::template multiply<accumulate>(rows, cols, k, a, b, c, ldc);
}

// Lets the system provide the pages of a task's fresh rows at once: one by one, their faults take a sixth of the forward.
template <class T>
inline void prefault_rows(const Tokens& x, int64_t b, int64_t h, int64_t n, int64_t rows, int64_t dim) {
#if defined(MADV_POPULATE_WRITE)
  constexpr int64_t kPage = 4096;
  if (x.channel != 1 || x.token != dim) return;
  const int64_t address = reinterpret_cast<int64_t>(row<T>(x, b, h, n));
  const int64_t begin = round_up(address, kPage), end = (address + rows * dim * int64_t{sizeof(T)}) / kPage * kPage;
  unsigned char present = 0;  // whether the first page is: memory that is used again has all of them
  if (end <= begin || (mincore(reinterpret_cast<void*>(begin), kPage, &present) == 0 && present & 1)) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#else
  (void)x, (void)b, (void)h, (void)n, (void)rows, (void)dim;
#endif
}

// y += factor * x over n floats.
NYSTROMGAN_INLINE void add_scaled(float* y, const float* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + factor * load(x + i));
  for (; i < n; ++i) y[i] += factor * x[i];
}

// to [dim] += the sum of rows of x, in registers over all of them.
template <int vectors, class T>
NYSTROMGAN_INLINE void add_rows(const T* x, int64_t token, int64_t rows, float* to) {
  Vec sum[vectors];
  for (int v = 0; v < vectors; ++v) sum[v] = load(to + v * kLanes);
  for (int64_t n = 0; n < rows; ++n)
    for (int v = 0; v < vectors; ++v) sum[v] += load(x + n * token + v * kLanes);
  for (int v = 0; v < vectors; ++v) store(to + v * kLanes, sum[v]);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same of bfloat16, whose even and odd columns one step each widens: a forward takes 0.99 of the time.
template <int vectors>
  requires(vectors % 2 == 0)
NYSTROMGAN_INLINE void add_rows(const BFloat16* x, int64_t token, int64_t rows, float* to) {
  constexpr int64_t kPair = 2 * kLanes;
  Vec even[vectors / 2] = {}, odd[vectors / 2] = {};
  for (int64_t n = 0; n < rows; ++n)
    for (int v = 0; v < vectors / 2; ++v) {
      BitsVec bits;
      memcpy(&bits, x + n * token + v * kPair, sizeof bits);
      even[v] += (Vec)(bits << 16);
      odd[v] += (Vec)(bits & 0xffff0000);
    }
  for (int v = 0; v < vectors / 2; ++v) {
    Vec first, second;
    interleave(even[v], odd[v], first, second);
    store(to + v * kPair, load(to + v * kPair) + first);
    store(to + v * kPair + kLanes, load(to + v * kPair + kLanes) + second);
  }
}
#endif

template <class T>
inline void add_rows(const T* x, int64_t token, int64_t channel, int64_t rows, int64_t dim, float* to) {
  int64_t d = 0;
  if (channel == 1) {
    for (; d + 8 * kLanes <= dim; d += 8 * kLanes) add_rows<8>(x + d, token, rows, to + d);
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_rows<4>(x + d, token, rows, to + d);
    for (; d + kLanes <= dim; d += kLanes) add_rows<1>(x + d, token, rows, to + d);
    for (int64_t n = 0; d < dim && n < rows; ++n)
      store_first(to + d, load_first(to + d, dim - d) + load_first(x + n * token + d, dim - d), dim - d);
  } else {
    for (int64_t n = 0; n < rows; ++n)
      for (d = 0; d < dim; ++d) to[d] += to_float(x[n * token + d * channel]);
  }
}

// sums [M, dim] += the tokens [first, first + count) of x, each to its landmark.
template <class T>
inline void add_to_landmarks(
    const T* x, int64_t token, int64_t channel, const int32_t* index, int64_t count, int64_t dim, float* sums) {
  for (int64_t n = 0, end; n < count; n = end) {
    for (end = n + 1; end < count && index[end] == index[n];) ++end;
    if (index[n] >= 0) add_rows(x + n * token, token, channel, end - n, dim, sums + index[n] * dim);
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
        for (int64_t n = 0, end; n < tokens; n = end) {
          for (end = n + 1; end < tokens && of[end] == of[n];) ++end;
          if (of[n] >= 0) count[of[n]] += static_cast<float>(end - n);
        }
        for (int64_t m = 0; m < landmarks; ++m) count[m] = count[m] > 0.0f ? 1.0f / count[m] : 0.0f;
      }
    });
  }
  const float* of(int64_t b, int64_t h) const { return values + b * batch_stride + h * head_stride; }

 private:
  Scratch values;
  int64_t batch_stride, head_stride;
};

// Each row of x [rows, dim] times its factor.
inline void scale_rows(int64_t rows, int64_t dim, const float* factor, float* x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < dim; ++c) x[r * dim + c] *= factor[r];
}

// means [B, H, M, dim] of x's tokens over the index; `only` limits the work to the rows b where it is true.
template <class T>
inline void pool_tokens(
    ParallelRun run, int64_t batch, int64_t heads, int64_t tokens, int64_t landmarks, int64_t dim, const Tokens& x,
    LandmarkIndex index, const bool* only, float* means) {
  const InverseCounts inverse(run, batch, heads, tokens, landmarks, index);
  const int64_t chunk = chunk_tokens(tokens), count = batch * heads, size = landmarks * dim;
  const auto is_left_out = [&](int64_t i) { return only != nullptr && !only[i / heads]; };
  sum_over_chunks(
      run, count, chunks_of(tokens), size,
      [&](int64_t i, int64_t s, float* partial, Workspace&) {
        if (is_left_out(i)) return;
        const int64_t b = i / heads, h = i % heads, first = s * chunk;
        memset(partial, 0, size * sizeof(float));
        add_to_landmarks<T>(
            row<T>(x, b, h, first), x.token, x.channel, row(index, b, h) + first, min(chunk, tokens - first), dim, partial);
      },
      [&](int64_t i, int64_t s, const float* partial) {
        if (is_left_out(i)) return;
        if (s == 0) memset(means + i * size, 0, size * sizeof(float));
        add_scaled(means + i * size, partial, 1.0f, size);
      });
  parallel(run, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!is_left_out(i)) scale_rows(landmarks, dim, inverse.of(i / heads, i % heads), means + i * size);
  });
}

// dst [M, dim] = scale log2(e) * means, so that the products of tokens with it are logits to base 2.
inline void scale_to_base_2(const float* means, int64_t size, float scale, float* dst) {
  for (int64_t i = 0; i < size; ++i) dst[i] = means[i] * (scale * kLog2E);
}

// The mask [M] of a batch row's landmarks, null where it masks none: asking it for every landmark of every token took an eighth
// of a forward.
inline const bool* masked_columns(const bool* mask, int64_t b, int64_t m) {
  return mask != nullptr && memchr(mask + b * m, true, m) != nullptr ? mask + b * m : nullptr;
}

// Whether a mask leaves none of `count` tokens from `first` on, as in most blocks of padding: they need no products.
inline bool masks_all(const bool* mask, int64_t first, int64_t count) {
  return mask != nullptr && memchr(mask + first, false, count) == nullptr;
}

// -inf for the columns of a row from m on, and for those masked.
inline void exclude_columns(float* x, int64_t m, int64_t padded, const bool* mask) {
  for (int64_t i = m; i < padded; ++i) x[i] = -kInfinity;
  if (mask == nullptr) return;
  for (int64_t i = 0; i < m; ++i)
    if (mask[i]) x[i] = -kInfinity;
}

// A vector of each of up to kLanes rows, of which one number a row is wanted. One by one, each row waits for its own
// reductions: softmaxes of rows of 64 take 1.5 times as long.
template <class OfRow, class Combine>
NYSTROMGAN_INLINE Vec reduce_rows(int64_t rows, float absent, OfRow of_row, Combine combine) {
  Vec x[kLanes];
  for (int64_t r = 0; r < rows; ++r) x[r] = of_row(r);
  for (int64_t r = rows; r < kLanes; ++r) x[r] = splat(absent);
  return reduce_each(x, combine);
}

NYSTROMGAN_INLINE Vec add(Vec x, Vec y) { return x + y; }

// Turns rows of base-2 logits [rows, ld] into 2^(x - max) as exact as T is, times 1 / sum with normalise, else leaving that
// factor in inverse_sum. The first m columns count, less those masked; the others become zero, as does a row with none that
// counts. each_row() is called before each row.
template <class T, bool normalise, class EachRow>
inline void softmax_rows(
    float* logits, int64_t rows, int64_t m, int64_t ld, const bool* mask, float* inverse_sum, EachRow each_row) {
  const int64_t padded = round_up(m, kLanes);
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = min(kLanes, rows - first);
    float *const x = logits + first * ld, shift[kLanes], inverse[kLanes];
    const Vec top = reduce_rows(count, -kInfinity, [&](int64_t r) {
      each_row();
      exclude_columns(x + r * ld, m, padded, mask);
      Vec best = splat(-kInfinity);
      for (int64_t i = 0; i < padded; i += kLanes) best = max(best, load(x + r * ld + i));
      return best;
    }, [](Vec y, Vec z) { return max(y, z); });
    store(shift, top == -kInfinity ? Vec{} : top);
    const Vec total = reduce_rows(count, 0.0f, [&](int64_t r) {
      const Vec offset = splat(shift[r]);
      Vec sum{};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec y = exp2<T>(load(x + r * ld + i) - offset);
        store(x + r * ld + i, y);
        sum += y;
      }
      return sum;
    }, add);
    store(inverse, total == 0.0f ? Vec{} : 1.0f / total);
    for (int64_t r = 0; r < count; ++r) {
      if constexpr (normalise)
        for (int64_t i = 0; i < padded; i += kLanes) store(x + r * ld + i, inverse[r] * load(x + r * ld + i));
      else inverse_sum[first + r] = inverse[r];
    }
  }
}

// The core A = softmax(s Q~ K~^T) as a square; rows of absent query landmarks are zero.
inline void make_core(const NystromProblem& p, int64_t i, ParallelRun team, float* core) {
  const int64_t m = p.landmarks, d = p.head_dim, ld = padded_ld(m), b = i / p.heads;
  Scratch keys(m * d), packed(d * ld);
  scale_to_base_2(p.key_means + i * m * d, m * d, p.scale, keys);
  scaled_transpose(m, d, 1.0f, keys, d, packed, ld);  // [D, M]
  const bool* absent = masked_columns(p.key_landmark_mask, b, m);
  shared(team, (m + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = min(end * kLanes, m);
    float* const rows = core + first * ld;
    multiply_float<false>(last - first, ld, d, {p.query_means + (i * m + first) * d, d, 1}, packed, ld, rows, ld);
    // the inverse multiplies A's errors by its condition, and A is small beside the tokens
    softmax_rows<double, true>(rows, last - first, m, ld, absent, nullptr, [] {});
    for (int64_t r = first; r < last; ++r) {
      const bool is_absent = p.query_landmark_mask != nullptr && p.query_landmark_mask[b * m + r];
      for (int64_t c = is_absent ? 0 : round_up(m, kLanes); c < ld; ++c) core[r * ld + c] = 0.0f;
    }
  });
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
      Scratch core(square_size(p.landmarks)), line(padded_ld(p.landmarks));
      for (int64_t i = begin; i < end; ++i) {
        make_core(p, i, nullptr, core);
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
