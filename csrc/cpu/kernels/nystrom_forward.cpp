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
  int64_t ldm = round_up(m, kLanes), lde = round_up(e, kLanes);
  int64_t splits = chunks_of(p.keys);
  // Of each split: G V, its rows' maxima and sums and, where the keys are pooled, their sums by landmark [M, D].
  int64_t sums_size = round_up(m, E::kRowPad) * lde, key_sums = sums_size + 2 * ldm;
  int64_t split_size = key_sums + (f.pool_key ? m * d : 0);
  // They lie in the output where it has room, as nothing is written there before they are combined: of 3 MB beside the
  // 34 MB that 16384 fp32 tokens give, that leaves none.
  int64_t partial_size = p.batch * p.heads * splits * split_size;
  Scratch own{in_output() ? 0 : partial_size};
  float* partial = in_output() ? static_cast<float*>(f.output.data) : own.get();

  bool in_output() const {
    const Tokens& o = f.output;
    const bool rows = o.channel == 1 && o.token == e, columns = o.token == 1 && o.channel == p.queries;
    const bool dense = (rows || columns) && o.head == p.queries * e && o.batch == p.heads * o.head;
    return dense && p.batch * o.batch * int64_t{sizeof(T)} >= partial_size * int64_t{sizeof(float)} &&
           reinterpret_cast<uintptr_t>(o.data) % alignof(float) == 0;
  }

  float* split(int64_t i, int64_t s) const { return partial + (i * splits + s) * split_size; }

  // One split's online softmax over its keys: sums [M, lde] of 2^(x - top) v, tops [M], totals [M].
  void attend_keys(int64_t i, int64_t s, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.keys);
    const int64_t first = s * chunk, last = min(first + chunk, p.keys);
    const int64_t block = block_tokens<E>(m);
    const bool* mask = p.key_padding_mask ? p.key_padding_mask + b * p.keys : nullptr;
    float *sums = split(i, s), *tops = sums + sums_size, *totals = tops + ldm;
    for (int64_t c = 0; c < ldm; ++c) tops[c] = -kInfinity, totals[c] = 0.0f;
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
      // [keys, D] x [D, M]
      multiply_ahead<E, T, false>(
          count, m, d, E::left(key, count, d, p.key.token, p.key.channel, left), queries, logits, ldm,
          {key + block * p.key.token, p.key.token, next, d});
      if (f.pool_key)  // here the keys are in cache: a pass of its own costs a twentieth of the forward
        add_to_landmarks(key, p.key.token, p.key.channel, row(p.key_index, b, h) + n, count, d, sums + key_sums);
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
      for (int64_t c = 0; c < ldm; ++c) logits[n * ldm + c] = -kInfinity;
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
    const int64_t strips = ldm / kLanes, half = strips / 2;
    PrefetchLines<T> keys{next_key, (strips - half) * count}, values{next_value, half * count};
    for (int64_t c = 0; c < ldm; c += kLanes) {
      const Vec before = load(tops + c);
      Vec top = before;
      for (int64_t n = 0; n < count; ++n) top = max(top, load(logits + n * ldm + c));
      const Vec shift = top == -kInfinity ? Vec{} : top;
      Vec sum{};
      PrefetchLines<T>& ahead = c < half * kLanes ? values : keys;
      for (int64_t n = 0; n < count; ++n) {
        if constexpr (E::kRowPad > 1) ahead.step();
        const Vec weight = exp2(load(logits + n * ldm + c) - shift);
        store(logits + n * ldm + c, weight);
        sum += weight;
      }
      const Vec factor = exp2(before - shift);
      store(tops + c, top);
      store(totals + c, load(totals + c) * factor + sum);
      for (int64_t j = 0; j < min(kLanes, m - c); ++j) {
        if (factor[j] == 1.0f) continue;
        float* to = sums + (c + j) * lde;
        for (int64_t k = 0; k < lde; k += kLanes) store(to + k, factor[j] * load(to + k));
      }
    }
  }

  // key_means [M, D] from the splits' sums, in their order.
  void combine_keys(int64_t i, const InverseCounts& inverse) const {
    const float* count = inverse.of(i / p.heads, i % p.heads);
    float* means = p.key_means + i * m * d;
    memset(means, 0, m * d * sizeof(float));
    for (int64_t s = 0; s < splits; ++s) add_scaled(means, split(i, s) + key_sums, 1.0f, m * d);
    for (int64_t c = 0; c < m; ++c)
      for (int64_t k = 0; k < d; ++k) means[c * d + k] *= count[c];
  }

  // context [M, E] = G V and logsumexp [M] from the splits, in their order.
  void combine(int64_t i) const {
    float *context = p.context + i * m * e, *logsumexp = p.logsumexp + i * m;
    const bool* absent = p.query_landmark_mask ? p.query_landmark_mask + i / p.heads * m : nullptr;
    for (int64_t r = 0; r < m; ++r) {
      float top = -kInfinity, total = 0.0f;
      for (int64_t s = 0; s < splits; ++s) {
        const float own = split(i, s)[sums_size + r];
        if (larger(own, top)) top = own;
      }
      const float shift = top == -kInfinity ? 0.0f : top;
      memset(context + r * e, 0, e * sizeof(float));
      for (int64_t s = 0; s < splits; ++s) {
        const float* of = split(i, s);
        const float factor = exp2(splat(of[sums_size + r] - shift))[0];
        total += factor * of[sums_size + ldm + r];
        add_scaled(context + r * e, of + r * lde, factor, e);
      }
      const bool empty = total == 0.0f || (absent != nullptr && absent[r]);
      for (int64_t c = 0; c < e; ++c) context[r * e + c] = empty ? 0.0f : context[r * e + c] / total;
      // +inf makes every weight of an empty row zero in the backward
      logsumexp[r] = empty ? kInfinity : (shift + __builtin_log2f(total)) / kLog2E;
    }
  }

  // mixed [M, E] = Z context
  void mix(int64_t i, const CoreNorms& global, ParallelRun team) const {
    if (is_exact(p, i)) return;  // pooled values already
    const int64_t size = square_size(m);
    Scratch core(size), chain(8 * size), scratch(pinv_apply_scratch(m, e));
    make_core(p, i, core);
    const Norms norm = global.of(norms(m, core, scratch));
    pinv_apply(
        team, m, core, initial_scale(norm.column, norm.row), p.pinv_iterations, p.context + i * m * e, e,
        p.mixed + i * m * e, chain, scratch);
  }

  // The chunk of queries: O = gamma (F W + convolution) + residual.
  void attend_landmarks(int64_t i, int64_t s, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.queries);
    const int64_t first = s * chunk, last = min(first + chunk, p.queries);
    const int64_t block = block_tokens<E>(m);
    const bool* mask = p.key_landmark_mask ? p.key_landmark_mask + b * m : nullptr;
    typename E::Session session;
    float *scaled = w.take(m * d), *landmarks = w.take(E::right_split_size(d, m)), *mixed = w.take(E::right_split_size(m, e));
    float *left = w.take(E::left_size(block, d) + E::left_size(block, m)), *logits = w.take(round_up(block, E::kRowPad) * ldm);
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
      multiply_ahead<E, T, false>(count, m, d, queries, keys, logits, ldm, next);
      PrefetchLines<T> ahead{next, count};
      softmax_rows<false>(logits, count, m, ldm, mask, inverse, [&] {
        if constexpr (E::kRowPad > 1) ahead.step();
      });
      const auto weights = E::left(as_const(logits), count, m, ldm, 1, left);
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
    for_each_chunk(p.run, count, splits, [&](int64_t i, int64_t s, Workspace& w) { attend_keys(i, s, w); });
    parallel(p.run, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) combine(i);
    });
    if (f.pool_key) {
      const InverseCounts inverse(p.run, p.batch, p.heads, p.keys, m, p.key_index);
      parallel(p.run, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) combine_keys(i, inverse);
      });
    }
    const CoreNorms global(p);
    for_each_matrix(p.run, count, m, [&](int64_t i, ParallelRun team) { mix(i, global, team); });
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
