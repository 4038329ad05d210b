// Nyström attention, backward, with every factor recomputed block by block:
//   queries  dW = F^T dO and dK~ through F, and dQ through F
//   core     back through W = Z (G V), the iterates, and A: d(G V), dQ~, dK~
//   keys     dK and dV through G, through what pools them and through the convolution, and dQ~ through G
//   pooling  dQ += dQ~ spread over its tokens
#include "convolution.h"
#include "isa.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

template <class T>
struct Backward {
  using E = Engine<T>;
  const NystromBackward& f;
  const NystromProblem& p = f.problem;
  int64_t m = p.landmarks, d = p.head_dim, e = p.value_dim, count = p.batch * p.heads;
  int64_t columns = round_up(m, kLanes), ldm = padded_ld(m), ldd = round_up(d, kLanes), lde = round_up(e, kLanes);
  int64_t padded_m = round_up(m, E::kRowPad), block = block_tokens<E>(m), padded_block = round_up(block, E::kRowPad);
  int64_t query_chunks = chunks_of(p.queries), key_chunks = chunks_of(p.keys);
  // Per chunk of queries dW [M, lde] and dK~ [M, ldd], per chunk of keys dQ~ [M, ldd].
  int64_t query_size = padded_m * (lde + ldd), key_size = padded_m * ldd;
  Scratch grad_context{count * m * e}, grad_mixed{count * m * e};  // d(G V) and dW [M, E]
  // Without gamma: what each (b, h) gives of its gradient, and each chunk of keys of the convolution's weight.
  Scratch grad_gamma{count}, grad_weight{count * key_chunks * p.taps};

  const bool* key_mask(int64_t i) const { return p.key_padding_mask ? p.key_padding_mask + i / p.heads * p.keys : nullptr; }

  void query_chunk(int64_t i, int64_t s, float* grad_w, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.queries);
    const int64_t first = s * chunk, last = min(first + chunk, p.queries);
    const bool* absent = masked_columns(p.key_landmark_mask, b, m);
    float* grad_landmarks = grad_w + padded_m * lde;
    memset(grad_w, 0, query_size * sizeof(float));

    typename E::Session session;
    float *scaled = w.take(m * d), *keys = w.take(E::right_split_size(d, m)), *values = w.take(E::right_split_size(e, m));
    float *means = w.take(E::right_split_size(m, d)), *left = w.take(E::left_size(block, max_dim()) + E::left_size(m, block));
    float *right = w.take(E::right_size(block, max_dim())), *factor = w.take(padded_block * ldm), *grad = w.take(padded_block * ldm);
    float *result = w.take(padded_block * ldd), *mixed = w.take(m * e);
    const float* key_means = p.key_means + i * m * d;
    for (int64_t c = 0; c < m * e; ++c) mixed[c] = p.gamma * p.mixed[i * m * e + c];
    scale_to_base_2(key_means, m * d, p.scale, scaled);
    const auto landmarks = E::right_split(as_const(scaled), d, m, 1, d, keys);  // [D, M]
    const auto transposed_w = E::right_split(as_const(mixed), e, m, 1, e, values);               // [E, M]
    const auto plain_means = E::right_split(key_means, m, d, d, 1, means);                       // [M, D]
    prefault_rows<T>(f.grad_query, b, h, first, last - first, d);
    for (int64_t n = first; n < last; n += block) {
      const int64_t rows = min(block, last - n);
      const T *query = row<T>(p.query, b, h, n), *grad_output = row<T>(f.grad_output, b, h, n);
      const Tokens &q = p.query, &g = f.grad_output;
      E::template multiply<false>(
          rows, m, d, E::left(query, rows, d, q.token, q.channel, left), landmarks, factor, ldm);
      const int64_t next = min(block, last - n - rows);
      PrefetchLines<T> next_query{{query + block * q.token, q.token, next, d}, rows};
      PrefetchLines<T> next_grad{{grad_output + block * g.token, g.token, next, e}, rows};
      softmax_rows<T, true>(factor, rows, m, ldm, absent, nullptr, [&] { next_query.step(); });
      E::template multiply<false>(
          rows, m, e, E::left(grad_output, rows, e, g.token, g.channel, left), transposed_w, grad, ldm);
      softmax_rows_backward(factor, grad, rows, next_grad);
      // [M, queries] x [queries, E or D]
      E::template multiply<true>(
          m, e, rows, E::left(as_const(factor), m, rows, 1, ldm, left),
          E::right(grad_output, rows, e, g.token, g.channel, right), grad_w, lde);
      E::template multiply<true>(
          m, d, rows, E::left(as_const(grad), m, rows, 1, ldm, left),
          E::right(query, rows, d, q.token, q.channel, right), grad_landmarks, ldd);
      // [queries, M] x [M, D]
      E::template multiply<false>(
          rows, d, m, E::left(as_const(grad), rows, m, ldm, 1, left), plain_means, result, ldd);
      scatter(result, ldd, rows, d, row<T>(f.grad_query, b, h, n), f.grad_query.token, f.grad_query.channel,
              exceeds_cache<T>(count * p.queries, d));
    }
  }

  int64_t max_dim() const { return d > e ? d : e; }

  // grad [rows, M] of the softmax becomes that of its logits' source: s P (dP - sum P dP).
  void softmax_rows_backward(const float* factor, float* grad, int64_t rows, PrefetchLines<T>& ahead) const {
    for (int64_t first = 0; first < rows; first += kLanes) {
      const int64_t count = min(kLanes, rows - first);
      const float* weight = factor + first * ldm;
      float *const to = grad + first * ldm, delta[kLanes];
      store(delta, reduce_rows(count, 0.0f, [&](int64_t r) {
        ahead.step();
        Vec sum{};
        for (int64_t c = 0; c < columns; c += kLanes) sum += load(weight + r * ldm + c) * load(to + r * ldm + c);
        return sum;
      }, add));
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) {
          const int64_t at = r * ldm + c;
          store(to + at, p.scale * load(weight + at) * (load(to + at) - delta[r]));
        }
    }
  }

  // dW and dK~ of all chunks up to s.
  void add_queries(int64_t i, int64_t s, const float* partial) const {
    float *grad_w = grad_mixed + i * m * e, *grad_landmarks = f.grad_key_means + i * m * d;
    if (s == 0) {
      memset(grad_w, 0, m * e * sizeof(float));
      memset(grad_landmarks, 0, m * d * sizeof(float));
    }
    for (int64_t r = 0; r < m; ++r) {
      add_scaled(grad_w + r * e, partial + r * lde, 1.0f, e);
      add_scaled(grad_landmarks + r * d, partial + padded_m * lde + r * ldd, 1.0f, d);
    }
  }

  // d gamma, and dW without gamma becomes dW.
  void apply_gamma(int64_t i) const {
    if (f.grad_gamma == nullptr) return;
    float* grad_w = grad_mixed + i * m * e;
    float sum = 0.0f;
    for (int64_t c = 0; c < m * e; ++c) {
      sum += grad_w[c] * p.mixed[i * m * e + c];
      grad_w[c] *= p.gamma;
    }
    grad_gamma[i] = sum;
  }

  // Through W = Z (G V): d(G V), and into grad_core [M, ld] the gradient of A but for its norms' part; returns d c.
  float core_backward(int64_t i, const CoreNorms& global, ParallelRun team, float* grad_core) const {
    const int64_t size = square_size(m), steps = p.pinv_iterations;
    Scratch core(size), grad_a(size), line(padded_ld(m)), mixed(m * e);
    Scratch own(p.iterates != nullptr ? 0 : PinvApply::memory_size(m, e, steps, true));
    float* const memory = p.iterates != nullptr ? p.iterates + i * iterates_size(m, e, steps) : own.get();
    make_core(p, i, team, core);
    const Norms norm = global.of(norms(m, core, line));
    memset(grad_a, 0, size * sizeof(float));
    PinvApply pinv(team, m, e, steps, core, initial_scale(norm.column, norm.row), true, memory);
    if (p.iterates == nullptr) pinv.forward(p.context + i * m * e, mixed);
    const float grad_c = pinv.backward(grad_mixed + i * m * e, grad_context + i * m * e, grad_a);
    scaled_transpose(m, m, 1.0f, grad_a, padded_ld(m), grad_core, padded_ld(m));
    return grad_c;
  }

  // Adds grad_c to A's gradient through the norms that are i's own.
  void add_norms(int64_t i, const CoreNorms& global, float grad_c, ParallelRun team, float* grad_core) const {
    Scratch core(square_size(m)), line(padded_ld(m));
    make_core(p, i, team, core);
    const Norms own = norms(m, core, line), norm = global.of(own);
    if (norm.column * norm.row == 0.0f) return;
    if (!global.global || i == global.column_matrix)
      add_norm_gradient(m, core, grad_c * norm.row, own.column_index, true, grad_core);
    if (!global.global || i == global.row_matrix)
      add_norm_gradient(m, core, grad_c * norm.column, own.row_index, false, grad_core);
  }

  // Through A = softmax(s Q~ K~^T): starts dQ~, adds to dK~.
  void landmarks_backward(int64_t i, ParallelRun team, float* grad_core) const {
    const int64_t ld = padded_ld(m);
    Scratch core(square_size(m)), padded(m * ldd), result(m * ldd);
    make_core(p, i, team, core);
    for (int64_t r = 0; r < m; ++r) {
      float *weight = core + r * ld, *grad = grad_core + r * ld;
      Vec sum{};
      for (int64_t c = 0; c < ld; c += kLanes) sum += load(weight + c) * load(grad + c);
      const Vec delta = splat(reduce_add(sum));
      for (int64_t c = 0; c < ld; c += kLanes) store(grad + c, p.scale * load(weight + c) * (load(grad + c) - delta));
    }
    pad_columns(m, d, p.key_means + i * m * d, padded);
    product<false>(team, m, ldd, m, {grad_core, ld, 1}, padded, ldd, result, ldd);
    for (int64_t r = 0; r < m; ++r) memcpy(f.grad_query_means + (i * m + r) * d, result + r * ldd, d * sizeof(float));
    pad_columns(m, d, p.query_means + i * m * d, padded);
    product<false>(team, m, ldd, m, {grad_core, 1, ld}, padded, ldd, result, ldd);
    for (int64_t r = 0; r < m; ++r) add_scaled(f.grad_key_means + (i * m + r) * d, result + r * ldd, 1.0f, d);
  }

  void core() const {
    const CoreNorms global(p);
    const int64_t size = square_size(m);
    Scratch grad_cores(count * size), grad_scale(count);
    for_each_matrix(p.run, p.threads, count, m, [&](int64_t i, ParallelRun team) {
      apply_gamma(i);
      grad_scale[i] = 0.0f;
      if (is_exact(p, i)) {
        memset(grad_context + i * m * e, 0, m * e * sizeof(float));
        memset(f.grad_query_means + i * m * d, 0, m * d * sizeof(float));
      } else {
        grad_scale[i] = core_backward(i, global, team, grad_cores + i * size);
      }
    });
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += grad_scale[i];
    for_each_matrix(p.run, p.threads, count, m, [&](int64_t i, ParallelRun team) {
      if (is_exact(p, i)) return;
      add_norms(i, global, global.global ? total : grad_scale[i], team, grad_cores + i * size);
      landmarks_backward(i, team, grad_cores + i * size);
    });
  }

  void key_chunk(int64_t i, int64_t s, const InverseCounts* inverse, float* grad_landmarks, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.keys);
    const int64_t first = s * chunk, last = min(first + chunk, p.keys);
    const bool* mask = key_mask(i);
    memset(grad_landmarks, 0, key_size * sizeof(float));

    typename E::Session session;
    float *scaled = w.take(m * d), *queries = w.take(E::right_split_size(d, m)), *contexts = w.take(E::right_split_size(e, m));
    float *rows_e = w.take(E::right_split_size(m, e)), *rows_d = w.take(E::right_split_size(m, d)), *lse = w.take(columns), *delta = w.take(columns);
    float *left = w.take(E::left_size(block, max_dim()) + E::left_size(m, block)), *right = w.take(E::right_size(block, d));
    float *factor = w.take(padded_block * ldm), *grad = w.take(padded_block * ldm), *grad_value = w.take(padded_block * lde);
    float *grad_key = w.take(padded_block * ldd), *valid = w.take(mask ? block * max_dim() : 0);
    float *window = w.take(p.taps > 0 ? (block + p.taps) * lde : 0), *values = w.take(p.taps > 0 ? block * lde : 0);
    const Band band(p.conv_weight + h * p.taps, p.taps, p.gamma, true, w);
    float* grad_taps = grad_weight + (i * key_chunks + s) * p.taps;
    memset(grad_taps, 0, p.taps * sizeof(float));
    const float *query_means = p.query_means + i * m * d, *grad_rows = grad_context + i * m * e;
    scale_to_base_2(query_means, m * d, p.scale, scaled);
    const auto landmarks = E::right_split(as_const(scaled), d, m, 1, d, queries);  // [D, M]
    const auto transposed = E::right_split(grad_rows, e, m, 1, e, contexts);                        // [E, M]
    const auto plain_grad = E::right_split(grad_rows, m, e, e, 1, rows_e);                          // [M, E]
    const auto plain_means = E::right_split(query_means, m, d, d, 1, rows_d);                       // [M, D]
    for (int64_t c = 0; c < columns; ++c) {
      lse[c] = c < m ? p.logsumexp[i * m + c] * kLog2E : kInfinity;
      delta[c] = 0.0f;
      for (int64_t k = 0; c < m && k < e; ++k)
        delta[c] += grad_rows[c * e + k] * p.context[(i * m + c) * e + k];
    }
    prefault_rows<T>(f.grad_key, b, h, first, last - first, d);
    prefault_rows<T>(f.grad_value, b, h, first, last - first, e);
    for (int64_t n = first; n < last; n += block) {
      const int64_t rows = min(block, last - n);
      const T *key = row<T>(p.key, b, h, n), *value = row<T>(p.value, b, h, n);
      const Tokens &k = p.key, &v = p.value;
      if (masks_all(mask, n, rows)) {
        memset(grad_key, 0, rows * ldd * sizeof(float));
        memset(grad_value, 0, rows * lde * sizeof(float));
      } else {
        E::template multiply<false>(rows, m, d, E::left(key, rows, d, k.token, k.channel, left), landmarks, factor, ldm);
        E::template multiply<false>(rows, m, e, E::left(value, rows, e, v.token, v.channel, left), transposed, grad, ldm);
        const bool masked = mask != nullptr && zero_masked(factor, grad, mask + n, rows);
        const int64_t next = min(block, last - n - rows);
        PrefetchLines<T> next_key{{key + block * k.token, k.token, next, d}, rows};
        PrefetchLines<T> next_value{{value + block * v.token, v.token, next, e}, rows};
        softmax_columns_backward(factor, grad, rows, lse, delta, next_key, next_value);
        // [keys, M] x [M, E or D]
        E::template multiply<false>(
            rows, e, m, E::left(as_const(factor), rows, m, ldm, 1, left), plain_grad, grad_value, lde);
        E::template multiply<false>(
            rows, d, m, E::left(as_const(grad), rows, m, ldm, 1, left), plain_means, grad_key, ldd);
        // [M, keys] x [keys, D]
        const auto weights = E::left(as_const(grad), m, rows, 1, ldm, left);
        if (masked) {
          const auto keys = E::right(valid_keys(key, mask + n, rows, valid), rows, d, d, 1, right);
          E::template multiply<true>(m, d, rows, weights, keys, grad_landmarks, ldd);
        } else {
          const auto keys = E::right(key, rows, d, k.token, k.channel, right);
          E::template multiply<true>(m, d, rows, weights, keys, grad_landmarks, ldd);
        }
        if (p.taps > 0) {
          const Rows near = rows_of<T>(
              f.grad_output, b, h, n - p.taps / 2, rows + p.taps - 1, p.queries, e, nullptr, window);
          band.add(rows, e, near.data, near.ld, grad_value, lde);
          for (int64_t r = 0; masked && r < rows; ++r)
            if (mask[n + r]) memset(grad_value + r * lde, 0, lde * sizeof(float));
          add_tap_products(rows, e, p.taps, rows_of<T>(v, b, h, n, rows, p.keys, e, mask, values), near, grad_taps);
        }
      }
      if (inverse != nullptr) spread(i, n, rows, f.grad_key_means + i * m * d, inverse->of(b, h), grad_key, ldd, d);
      if (is_exact(p, i)) spread(i, n, rows, grad_mixed + i * m * e, inverse->of(b, h), grad_value, lde, e);
      scatter(grad_key, ldd, rows, d, row<T>(f.grad_key, b, h, n), f.grad_key.token, f.grad_key.channel,
              exceeds_cache<T>(count * p.keys, d));
      scatter(grad_value, lde, rows, e, row<T>(f.grad_value, b, h, n), f.grad_value.token, f.grad_value.channel,
              exceeds_cache<T>(count * p.keys, e));
    }
  }

  // Logits of masked keys become -inf and their gradients zero; whether there are any.
  bool zero_masked(float* factor, float* grad, const bool* mask, int64_t rows) const {
    bool any = false;
    for (int64_t n = 0; n < rows; ++n) {
      if (!mask[n]) continue;
      any = true;
      for (int64_t c = 0; c < columns; ++c) factor[n * ldm + c] = -kInfinity, grad[n * ldm + c] = 0.0f;
    }
    return any;
  }

  const float* valid_keys(const T* key, const bool* mask, int64_t rows, float* dst) const {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t c = 0; c < d; ++c)
        dst[n * d + c] = mask[n] ? 0.0f : to_float(key[n * p.key.token + c * p.key.channel]);
    return dst;
  }

  // Base-2 logits [keys, M] become G^T, and dG^T becomes s G (dG - delta).
  void softmax_columns_backward(
      float* factor, float* grad, int64_t rows, const float* lse, const float* delta, PrefetchLines<T>& next_key,
      PrefetchLines<T>& next_value) const {
    for (int64_t n = 0; n < rows; ++n) {
      next_key.step();
      next_value.step();
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t at = n * ldm + c;
        const Vec weight = exp2<T>(load(factor + at) - load(lse + c));
        store(factor + at, weight);
        store(grad + at, p.scale * weight * (load(grad + at) - load(delta + c)));
      }
    }
  }

  // grad [rows, ld] of the keys [n, n + rows) += the gradient of their landmark's mean.
  void spread(
      int64_t i, int64_t n, int64_t rows, const float* grad_means, const float* inverse, float* grad, int64_t ld,
      int64_t dim) const {
    const int32_t* index = row(p.key_index, i / p.heads, i % p.heads) + n;
    for (int64_t r = 0; r < rows; ++r)
      if (index[r] >= 0) add_scaled(grad + r * ld, grad_means + index[r] * dim, inverse[index[r]], dim);
  }

  // dQ~ through A, and of all chunks up to s through G.
  void add_keys(int64_t i, const float* partial) const {
    for (int64_t r = 0; r < m; ++r) add_scaled(f.grad_query_means + (i * m + r) * d, partial + r * ldd, 1.0f, d);
  }

  // dQ += dQ~ / tokens of each landmark.
  void spread_queries(int64_t i, int64_t s, const InverseCounts& inverse) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.queries);
    const int64_t first = s * chunk, last = min(first + chunk, p.queries);
    const int32_t* index = row(p.query_index, b, h);
    const float *grad_means = f.grad_query_means + i * m * d, *count = inverse.of(b, h);
    for (int64_t n = first; n < last; ++n) {
      if (index[n] < 0) continue;
      const float *from = grad_means + index[n] * d, factor = count[index[n]];
      T* to = row<T>(f.grad_query, b, h, n);
      const int64_t step = f.grad_query.channel, whole = step == 1 ? d / kLanes * kLanes : 0;
      for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(to + c) + factor * load(from + c));
      if (step == 1 && whole < d)
        store_first(
            to + whole, load_first(to + whole, d - whole) + factor * load_first(from + whole, d - whole), d - whole);
      for (int64_t c = 0; step != 1 && c < d; ++c) to[c * step] = from_float<T>(to_float(to[c * step]) + factor * from[c]);
    }
  }

  // d weight and d gamma from the parts of every chunk and row, in their order.
  void combine_epilogue() const {
    float gamma = 0.0f;
    for (int64_t i = 0; f.grad_gamma != nullptr && i < count; ++i) gamma += grad_gamma[i];
    for (int64_t j = 0; j < p.heads * p.taps; ++j) {
      float sum = 0.0f;
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t s = 0; s < key_chunks; ++s)
          sum += grad_weight[((b * p.heads + j / p.taps) * key_chunks + s) * p.taps + j % p.taps];
      gamma += sum * p.conv_weight[j];
      f.grad_conv_weight[j] = p.gamma * sum;
    }
    if (f.grad_gamma != nullptr) *f.grad_gamma = gamma;
  }

  void keys(const InverseCounts* inverse) const {
    sum_over_chunks(
        p.run, count, key_chunks, key_size,
        [&](int64_t i, int64_t s, float* partial, Workspace& w) { key_chunk(i, s, inverse, partial, w); },
        [&](int64_t i, int64_t, const float* partial) { add_keys(i, partial); });
  }

  void run() const {
    sum_over_chunks(
        p.run, count, query_chunks, query_size,
        [&](int64_t i, int64_t s, float* partial, Workspace& w) { query_chunk(i, s, partial, w); },
        [&](int64_t i, int64_t s, const float* partial) { add_queries(i, s, partial); });
    core();
    if (p.key_index.data != nullptr) {
      const InverseCounts inverse(p.run, p.batch, p.heads, p.keys, m, p.key_index);
      keys(&inverse);
    } else {
      keys(nullptr);
    }
    combine_epilogue();
    if (p.query_index.data == nullptr) return;
    const InverseCounts inverse(p.run, p.batch, p.heads, p.queries, m, p.query_index);
    for_each_chunk(p.run, count, query_chunks, [&](int64_t i, int64_t s, Workspace&) { spread_queries(i, s, inverse); });
  }
};

}  // namespace

void nystrom_backward(const NystromBackward& f) {
  with_type(f.problem.dtype, [&](auto type) { Backward<decltype(type)>{f}.run(); });
}

}  // namespace nystromgan::NYSTROMGAN_ISA
