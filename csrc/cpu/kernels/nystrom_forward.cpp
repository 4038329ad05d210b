// Nyström attention, forward: pool; G V over the keys; A, Z and W = Z (G V) for each (b, h); over the queries F W and what
// follows it.
#include "convolution.h"
#include "isa.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

template <class T>
struct Forward {
  using E = Engine<T>;
  const NystromForward& f;
  const NystromProblem& p = f.problem;
  int64_t m = p.landmarks, d = p.head_dim, e = p.value_dim;
  int64_t columns = round_up(m, kLanes), ldm = padded_ld(m), lde = round_up(e, kLanes);
  // Of each split: G V, its rows' maxima and sums and, where the keys are pooled, their sums by landmark [M, D].
  int64_t sums_size = round_up(m, E::kRowPad) * lde, key_sums = sums_size + 2 * columns;
  int64_t split_size = key_sums + (f.pool_key ? m * d : 0);
  // The maxima and sums of all splits so far, [M] of each (b, h).
  Scratch all_tops{p.batch * p.heads * m}, all_totals{p.batch * p.heads * m};

  // One split's online softmax over its keys: sums [M, lde] of 2^(x - top) v, tops [M], totals [M].
  void attend_keys(int64_t i, int64_t s, float* sums, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.keys);
    const int64_t first = s * chunk, last = min(first + chunk, p.keys);
    const int64_t block = block_tokens<E>(m);
    const bool* mask = p.key_padding_mask ? p.key_padding_mask + b * p.keys : nullptr;
    float *tops = sums + sums_size, *totals = tops + columns;
    for (int64_t c = 0; c < columns; ++c) tops[c] = -kInfinity, totals[c] = 0.0f;
    memset(sums, 0, sums_size * sizeof(float));
    if (f.pool_key) memset(sums + key_sums, 0, m * d * sizeof(float));

    typename E::Session session;
    float *scaled = w.take(m * d), *landmarks = w.take(E::right_split_size(d, m)), *left = w.take(E::left_size(block, d) + E::left_size(m, block));
    float *right = w.take(E::right_size(block, e)), *logits = w.take(round_up(block, E::kRowPad) * ldm), *valid = w.take(block * e);
    scale_to_base_2(p.query_means + i * m * d, m * d, p.scale, scaled);
    const auto queries = E::right_split(as_const(scaled), d, m, 1, d, landmarks);  // [D, M]
    for (int64_t n = first; n < last; n += block) {
      const int64_t count = min(block, last - n);
      const T *key = row<T>(p.key, b, h, n), *value = row<T>(p.value, b, h, n);
      const int64_t next = min(block, last - n - count);
      if (masks_all(mask, n, count)) continue;
      // [keys, D] x [D, M]
      const auto keys = E::left(key, count, d, p.key.token, p.key.channel, left);
      multiply_ahead<E, T, false>(
          count, m, d, keys, queries, logits, ldm, {key + block * p.key.token, p.key.token, next, d});
      if (f.pool_key) {  // here the keys are in cache: a pass of its own costs a twentieth of the forward
        const int32_t* index = row(p.key_index, b, h) + n;
        if constexpr (E::kRounds) add_to_landmarks(key, p.key.token, p.key.channel, index, count, d, sums + key_sums);
        else add_to_landmarks(keys.data, keys.row_stride, keys.k_stride, index, count, d, sums + key_sums);
      }
      const bool masked = mask != nullptr && mask_rows(logits, mask + n, count);
      add_block(
          logits, count, sums, tops, totals, {key + block * p.key.token, p.key.token, next, d},
          {value + block * p.value.token, p.value.token, next, e});
      const auto weights = E::left(as_const(logits), m, count, 1, ldm, left);  // [M, keys]
      // [M, keys] x [keys, E]
      if (masked) {
        const auto values = E::right(valid_values(value, mask + n, count, valid), count, e, e, 1, right);
        E::template multiply<true>(m, e, count, weights, values, sums, lde);
      } else {
        const auto values = E::right(value, count, e, p.value.token, p.value.channel, right);
        multiply_ahead<E, T, true>(
            m, e, count, weights, values, sums, lde, {value + block * p.value.token, p.value.token, next, e});
      }
    }
  }

  // Rows of masked keys become -inf; whether there are any.
  bool mask_rows(float* logits, const bool* mask, int64_t count) const {
    bool any = false;
    for (int64_t n = 0; n < count; ++n) {
      if (!mask[n]) continue;
      any = true;
      for (int64_t c = 0; c < columns; ++c) logits[n * ldm + c] = -kInfinity;
    }
    return any;
  }

  // The block's values in fp32 [count, E], zero where masked, since 0 x NaN would be NaN.
  const float* valid_values(const T* value, const bool* mask, int64_t count, float* dst) const {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t c = 0; c < e; ++c)
        dst[n * e + c] = mask[n] ? 0.0f : to_float(value[n * p.value.token + c * p.value.channel]);
    return dst;
  }

  // Logits [keys, M] become weights against the running maxima of their columns; the sums so far are rescaled.
  void add_block(
      float* logits, int64_t count, float* sums, float* tops, float* totals, Prefetch<T> next_key,
      Prefetch<T> next_value) const {
    constexpr int64_t kPair = 2 * kLanes;
    const int64_t pairs = (columns + kPair - 1) / kPair, half = pairs / 2;
    PrefetchLines<T> keys{next_key, (pairs - half) * count}, values{next_value, half * count};
    for (int64_t i = 0; i < pairs; ++i) {
      PrefetchLines<T>& ahead = i < half ? values : keys;
      if ((i + 1) * kPair <= columns) add_columns<2>(logits, i * kPair, count, sums, tops, totals, ahead);
      else add_columns<1>(logits, i * kPair, count, sums, tops, totals, ahead);
    }
  }

  // `add_block` of some vectors of columns from c on: two at a time take a cache line, and 0.9 of the time, on AVX2.
  template <int vectors>
  NYSTROMGAN_INLINE void add_columns(
      float* logits, int64_t c, int64_t count, float* sums, float* tops, float* totals, PrefetchLines<T>& ahead) const {
    Vec before[vectors], top[vectors], shift[vectors], sum[vectors] = {};
    for (int v = 0; v < vectors; ++v) before[v] = top[v] = load(tops + c + v * kLanes);
    for (int64_t n = 0; n < count; ++n)
      for (int v = 0; v < vectors; ++v) top[v] = max(top[v], load(logits + n * ldm + c + v * kLanes));
    for (int v = 0; v < vectors; ++v) shift[v] = top[v] == -kInfinity ? Vec{} : top[v];
    for (int64_t n = 0; n < count; ++n) {
      if constexpr (E::kRowPad > 1) ahead.step();
      for (int v = 0; v < vectors; ++v) {
        float* at = logits + n * ldm + c + v * kLanes;
        const Vec weight = exp2<T>(load(at) - shift[v]);
        store(at, weight);
        sum[v] += weight;
      }
    }
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = c + v * kLanes;
      const Vec factor = exp2(before[v] - shift[v]);
      store(tops + first, top[v]);
      store(totals + first, load(totals + first) * factor + sum[v]);
      for (int64_t j = 0; j < min(kLanes, m - first); ++j) {
        if (factor[j] == 1.0f) continue;
        float* to = sums + (first + j) * lde;
        for (int64_t k = 0; k < lde; k += kLanes) store(to + k, factor[j] * load(to + k));
      }
    }
  }

  // context [M, E], the maxima and sums, and key_means times their counts, of all splits up to s.
  void add_split(int64_t i, int64_t s, const float* split) const {
    float *context = p.context + i * m * e, *means = p.key_means + i * m * d;
    if (s == 0) {
      memset(context, 0, m * e * sizeof(float));
      if (f.pool_key) memset(means, 0, m * d * sizeof(float));
    }
    for (int64_t r = 0; r < m; ++r) {
      float &top = all_tops[i * m + r], &total = all_totals[i * m + r];
      if (s == 0) top = -kInfinity, total = 0.0f;
      const float own = split[sums_size + r], before = top;
      if (larger(own, top)) top = own;
      const float shift = top == -kInfinity ? 0.0f : top;
      const float kept = exp2(splat(before - shift))[0], factor = exp2(splat(own - shift))[0];
      total = kept * total + factor * split[sums_size + columns + r];
      if (kept != 1.0f)
        for (int64_t c = 0; c < e; ++c) context[r * e + c] *= kept;
      add_scaled(context + r * e, split + r * lde, factor, e);
    }
    if (f.pool_key) add_scaled(means, split + key_sums, 1.0f, m * d);
  }

  // context [M, E] = G V and logsumexp [M].
  void finish_context(int64_t i) const {
    float *context = p.context + i * m * e, *logsumexp = p.logsumexp + i * m;
    const bool* absent = p.query_landmark_mask ? p.query_landmark_mask + i / p.heads * m : nullptr;
    for (int64_t r = 0; r < m; ++r) {
      const float top = all_tops[i * m + r], total = all_totals[i * m + r];
      const bool empty = total == 0.0f || (absent != nullptr && absent[r]);
      for (int64_t c = 0; c < e; ++c) context[r * e + c] = empty ? 0.0f : context[r * e + c] / total;
      // +inf makes every weight of an empty row zero in the backward
      logsumexp[r] = empty ? kInfinity : ((top == -kInfinity ? 0.0f : top) + __builtin_log2f(total)) / kLog2E;
    }
  }

  // mixed [M, E] = Z context
  void mix(int64_t i, const CoreNorms& global, ParallelRun team) const {
    const int64_t steps = p.pinv_iterations, kept = iterates_size(m, e, steps);
    const bool keep = p.iterates != nullptr;
    if (keep) memset(p.iterates + i * kept, 0, kept * sizeof(float));  // results of an op have no rubbish
    if (is_exact(p, i)) return;                                        // pooled values already
    Scratch core(square_size(m)), line(padded_ld(m)), own(keep ? 0 : PinvApply::memory_size(m, e, steps, false));
    float* const memory = keep ? p.iterates + i * kept : own.get();
    make_core(p, i, team, core);
    const Norms norm = global.of(norms(m, core, line));
    PinvApply(team, m, e, steps, core, initial_scale(norm.column, norm.row), keep, memory)
        .forward(p.context + i * m * e, p.mixed + i * m * e);
  }

  // The chunk of queries: O = gamma (F W + convolution) + residual.
  void attend_landmarks(int64_t i, int64_t s, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.queries);
    const int64_t first = s * chunk, last = min(first + chunk, p.queries);
    const int64_t block = block_tokens<E>(m);
    const bool* mask = masked_columns(p.key_landmark_mask, b, m);
    typename E::Session session;
    float *scaled = w.take(m * d), *landmarks = w.take(E::right_split_size(d, m)), *mixed = w.take(E::right_split_size(m, e));
    float *left = w.take(E::left_size(block, d) + E::left_size(block, m)), *logits = w.take(round_up(block, E::kRowPad) * columns);
    float *result = w.take(round_up(block, E::kRowPad) * lde), *inverse = w.take(block);
    const bool adds = p.taps > 0 || f.residual.data != nullptr;  // whether anything is added to F W
    float* added = w.take(adds ? (block + p.taps) * lde : 0);
    const Band band(p.conv_weight + h * p.taps, p.taps, p.gamma, false, w);
    scale_to_base_2(p.key_means + i * m * d, m * d, p.scale, scaled);
    const auto keys = E::right_split(as_const(scaled), d, m, 1, d, landmarks);                     // [D, M]
    const auto values = E::right_split(static_cast<const float*>(p.mixed + i * m * e), m, e, e, 1, mixed);  // [M, E]
    // fp32 rows of whole vectors are written where they belong, unless that would read them first
    const bool past_cache = exceeds_cache<T>(p.batch * p.heads * p.queries, e);
    const bool in_place = !past_cache && sizeof(T) == sizeof(float) && f.output.channel == 1 && lde == e;
    prefault_rows<T>(f.output, b, h, first, last - first, e);
    for (int64_t n = first; n < last; n += block) {
      const int64_t count = min(block, last - n);
      const auto queries = E::left(row<T>(p.query, b, h, n), count, d, p.query.token, p.query.channel, left);
      // [queries, D] x [D, M]
      const Prefetch<T> next{row<T>(p.query, b, h, n + count), p.query.token, min(block, last - n - count), d};
      multiply_ahead<E, T, false>(count, m, d, queries, keys, logits, columns, next);
      PrefetchLines<T> ahead{next, count};
      softmax_rows<T, false>(logits, count, m, columns, mask, inverse, [&] {
        if constexpr (E::kRowPad > 1) ahead.step();
      });
      const auto weights = E::left(as_const(logits), count, m, columns, 1, left);
      // [queries, M] x [M, E]
      T* output = row<T>(f.output, b, h, n);
      float* to = in_place ? reinterpret_cast<float*>(output) : result;
      const int64_t ld = in_place ? f.output.token : lde;
      E::template multiply<false>(count, e, m, weights, values, to, ld);
      for (int64_t r = 0; r < count; ++r) inverse[r] *= p.gamma;
      if (!in_place && !adds) {
        scatter_scaled(result, lde, count, e, inverse, output, f.output.token, f.output.channel, past_cache);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) scale_in_place(lde, inverse[r], to + r * ld);
      if (p.taps > 0) add_convolution(b, h, n, count, band, added, to, ld);
      if (f.residual.data != nullptr) add_residual(b, h, n, count, added, to, ld);
      if (!in_place) scatter(result, lde, count, e, output, f.output.token, f.output.channel, past_cache);
    }
  }

  void add_convolution(
      int64_t b, int64_t h, int64_t n, int64_t count, const Band& band, float* scratch, float* to, int64_t ld) const {
    const bool* mask = p.key_padding_mask ? p.key_padding_mask + b * p.keys : nullptr;
    const Rows window = rows_of<T>(p.value, b, h, n - p.taps / 2, count + p.taps - 1, p.keys, e, mask, scratch);
    band.add(count, e, window.data, window.ld, to, ld);
  }

  void add_residual(int64_t b, int64_t h, int64_t n, int64_t count, float* scratch, float* to, int64_t ld) const {
    const Rows residual = rows_of<T>(f.residual, b, h, n, count, p.queries, e, nullptr, scratch);
    for (int64_t r = 0; r < count; ++r) add_scaled(to + r * ld, residual.data + r * residual.ld, 1.0f, lde);
  }

  void run() const {
    const int64_t count = p.batch * p.heads, chunks = chunks_of(p.queries);
    sum_over_chunks(
        p.run, count, chunks_of(p.keys), split_size,
        [&](int64_t i, int64_t s, float* split, Workspace& w) { attend_keys(i, s, split, w); },
        [&](int64_t i, int64_t s, const float* split) { add_split(i, s, split); });
    parallel(p.run, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish_context(i);
    });
    if (f.pool_key) {
      const InverseCounts inverse(p.run, p.batch, p.heads, p.keys, m, p.key_index);
      parallel(p.run, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          scale_rows(m, d, inverse.of(i / p.heads, i % p.heads), p.key_means + i * m * d);
      });
    }
    const CoreNorms global(p);
    for_each_matrix(p.run, p.threads, count, m, [&](int64_t i, ParallelRun team) { mix(i, global, team); });
    for_each_chunk(p.run, count, chunks, [&](int64_t i, int64_t s, Workspace& w) { attend_landmarks(i, s, w); });
  }
};

template <class T>
void forward(const NystromForward& f) {
  const NystromProblem& p = f.problem;
  auto pool = [&](int64_t tokens, int64_t dim, const Tokens& x, LandmarkIndex index, const bool* only, float* means) {
    pool_tokens<T>(p.run, p.batch, p.heads, tokens, p.landmarks, dim, x, index, only, means);
  };
  if (f.pool_query) pool(p.queries, p.head_dim, p.query, p.query_index, nullptr, p.query_means);
  if (p.exact_rows != nullptr) pool(p.keys, p.value_dim, p.value, p.key_index, p.exact_rows, p.mixed);
  Forward<T>{f}.run();
}

}  // namespace

void nystrom_forward(const NystromForward& f) {
  with_type(f.problem.dtype, [&](auto type) { forward<decltype(type)>(f); });
}

}  // namespace nystromgan::NYSTROMGAN_ISA
