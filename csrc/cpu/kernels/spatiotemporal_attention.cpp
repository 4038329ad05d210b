// Exact attention over channel-first or token-major maps, forward and backward; nothing N x S is stored.
//
// Everything is computed transposed, [keys, queries] and [channels, queries], so that lanes are queries: the softmax runs
// down the columns without a shuffle, and channel-first maps need no transpose. Blocks and splits depend on the shape of
// one sample only: the bits do not depend on the batch or on the number of threads.
#include "spatiotemporal_attention.h"

#include <math.h>

#include "engine.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

constexpr int64_t kQueries = 128;  // queries of a block
constexpr int64_t kKeys = 128;     // keys of a block
constexpr int kColumns = 4;        // vectors of queries that the softmax takes at once, to hide latencies

// One head of a map: [channels, tokens].
template <class T>
struct Head {
  T* data;
  int64_t channel_stride, token_stride;

  Head(const Maps& maps, int64_t b, int64_t h)
      : data(static_cast<T*>(maps.data) + b * maps.batch_stride + h * maps.head_stride),
        channel_stride(maps.channel_stride),
        token_stride(maps.token_stride) {}
  T* token(int64_t t) const { return data + t * token_stride; }
};

template <class T>
struct Operands {
  using E = ReuseEngine<T>;
  using Left = typename E::Left;
  using Right = typename E::Right;

  // [tokens, channels] and [channels, tokens] as left operands
  static Left tokens_by_channels(Head<T> head, int64_t token, int64_t tokens, int64_t channels, float* scratch) {
    return E::left(head.token(token), tokens, channels, head.token_stride, head.channel_stride, scratch);
  }
  static Left channels_by_tokens(Head<T> head, int64_t token, int64_t tokens, int64_t channels, float* scratch) {
    return E::left(head.token(token), channels, tokens, head.channel_stride, head.token_stride, scratch);
  }
};

// Running softmax of the columns of blocks of logits [keys, kQueries], in units of log2.
struct Softmax {
  // What weights are relative to: at most kSlack below the largest logit so far. Letting it lag saves nearly all of the
  // rescaling, and 2^kSlack is nothing to fp32.
  static constexpr float kSlack = 8.0f;
  float reference[kQueries], sum[kQueries], decay[kQueries];
  bool decays;  // whether some reference rose in the last step, so that what was summed before shrinks by `decay`

  void reset() {
    for (int64_t q = 0; q < kQueries; ++q) reference[q] = kLowest, sum[q] = 0;
  }

  // Puts the weights 2^(factor logit - reference) of `columns` vectors of queries from column q on.
  template <int columns, class Weights>
  NYSTROMGAN_INLINE void step(const float* logits, int64_t keys, int64_t q, float factor, Weights& weights) {
    const float* column = logits + q;
    Vec base[columns], top[columns], total[columns];
    for (int c = 0; c < columns; ++c) top[c] = base[c] = load(reference + q + c * kLanes);
    for (int64_t k = 0; k < keys; ++k)
      for (int c = 0; c < columns; ++c) top[c] = max(top[c], load(column + k * kQueries + c * kLanes) * factor);
    for (int c = 0; c < columns; ++c) {
      top[c] = top[c] > base[c] + kSlack ? top[c] : base[c];
      const Vec shrink = exp2(base[c] - top[c]);
      total[c] = load(sum + q + c * kLanes) * shrink;
      store(decay + q + c * kLanes, shrink);
      store(reference + q + c * kLanes, top[c]);
    }
    const auto weight = [&](int64_t k, int c) { return exp2(load(column + k * kQueries + c * kLanes) * factor - top[c]); };
    int64_t k = 0;
    for (; k + 1 < keys; k += 2)
      for (int c = 0; c < columns; ++c) {
        const Vec even = weight(k, c), odd = weight(k + 1, c);
        total[c] += even + odd;
        weights.put(k, q + c * kLanes, even, odd);
      }
    if (k < keys)
      for (int c = 0; c < columns; ++c) {
        const Vec even = weight(k, c);
        total[c] += even;
        weights.put(k, q + c * kLanes, even, Vec{});
      }
    for (int c = 0; c < columns; ++c) store(sum + q + c * kLanes, total[c]);
  }

  template <class Weights>
  void step(const float* logits, int64_t keys, int64_t queries, float factor, Weights& weights) {
    int64_t q = 0;
    for (; q + kColumns * kLanes <= queries; q += kColumns * kLanes) step<kColumns>(logits, keys, q, factor, weights);
    for (; q < queries; q += kLanes) step<1>(logits, keys, q, factor, weights);
    decays = false;
    for (int64_t i = 0; i < queries; ++i) decays |= decay[i] != 1.0f;
  }
};

// x[row, q] *= factor[q]
void scale_columns(float* x, int64_t rows, int64_t queries, const float* factor) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < queries; q += kLanes)
      store(x + r * kQueries + q, load(x + r * kQueries + q) * load(factor + q));
}

template <class T>
struct ForwardScratch {
  using E = ReuseEngine<T>;
  Scratch logits, sums, query, key, value, weights, residual;

  explicit ForwardScratch(const AttentionForward& call)
      : logits(round_up(kKeys, E::kRowPad) * kQueries),
        sums(round_up(call.value_channels, E::kRowPad) * kQueries),
        query(E::right_size(call.channels, kQueries)),
        key(E::left_size(kKeys, call.channels)),
        value(E::left_size(call.value_channels, kKeys)),
        weights(E::right_size(kKeys, kQueries)),
        residual(call.value_channels * kQueries) {}
};

// Writes a block of sums [value_channels, kQueries]: normalised, then gamma and residual.
template <class T>
void finish_block(
    const AttentionForward& call, int64_t b, int64_t h, int64_t first, int64_t queries, Softmax& softmax,
    ForwardScratch<T>& scratch) {
  const int64_t channels = call.value_channels;
  const bool any_key = call.key_counts[b] > 0;
  for (int64_t q = 0; q < queries; ++q) softmax.decay[q] = any_key ? 1.0f / softmax.sum[q] : 0.0f;
  scale_columns(scratch.sums, channels, queries, softmax.decay);
  if (call.logsumexp != nullptr) {
    float* logsumexp = call.logsumexp + (b * call.heads + h) * call.queries + first;
    for (int64_t q = 0; q < queries; ++q)
      logsumexp[q] = any_key ? softmax.reference[q] * kLn2 + logf(softmax.sum[q]) : -kInfinity;
  }
  if (call.attended.data != nullptr) {
    const Head<T> attended(call.attended, b, h);
    scatter(scratch.sums, kQueries, channels, queries, attended.token(first), attended.channel_stride, attended.token_stride);
  }
  if (call.residual.data != nullptr) {
    const Head<T> residual(call.residual, b, h);
    gather(residual.token(first), channels, queries, residual.channel_stride, residual.token_stride, scratch.residual,
           kQueries);
  }
  for (int64_t e = 0; e < channels; ++e)
    for (int64_t q = 0; q < queries; q += kLanes) {
      float* at = scratch.sums + e * kQueries + q;
      const Vec scaled = load(at) * call.gamma;
      store(at, call.residual.data == nullptr ? scaled : scaled + load(scratch.residual + e * kQueries + q));
    }
  const Head<T> output(call.output, b, h);
  scatter(scratch.sums, kQueries, channels, queries, output.token(first), output.channel_stride, output.token_stride);
}

template <class T>
void forward_block(const AttentionForward& call, int64_t b, int64_t h, int64_t first, ForwardScratch<T>& scratch) {
  using E = ReuseEngine<T>;
  const Head<T> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h);
  const int64_t queries = min(kQueries, call.queries - first);
  const int64_t channels = call.channels, value_channels = call.value_channels;
  const float factor = call.scale * kLog2E;
  const auto q = E::right(
      query.token(first), channels, queries, query.channel_stride, query.token_stride, scratch.query);  // [C, queries]
  Softmax softmax;
  softmax.reset();
  if (call.key_counts[b] == 0) memset(scratch.sums, 0, value_channels * kQueries * sizeof(float));
  for (int64_t s = 0; s < call.key_counts[b]; s += kKeys) {
    const int64_t keys = min(kKeys, call.key_counts[b] - s);
    const auto k = Operands<T>::tokens_by_channels(key, s, keys, channels, scratch.key);  // [keys, C]
    E::template multiply<false>(keys, queries, channels, k, q, scratch.logits, kQueries);
    typename E::template Computed<false, true> weights(
        scratch.logits, kQueries, keys, queries, nullptr, scratch.weights);  // [keys, queries]
    softmax.step(scratch.logits, keys, queries, factor, weights);
    const auto v = Operands<T>::channels_by_tokens(value, s, keys, value_channels, scratch.value);  // [E, keys]
    if (s == 0) {
      E::template multiply<false>(value_channels, queries, keys, v, weights.right(), scratch.sums, kQueries);
      continue;
    }
    if (softmax.decays) scale_columns(scratch.sums, value_channels, queries, softmax.decay);
    E::template multiply<true>(value_channels, queries, keys, v, weights.right(), scratch.sums, kQueries);
  }
  finish_block(call, b, h, first, queries, softmax, scratch);
}

template <class T>
void forward(const AttentionForward& call) {
  const int64_t blocks = (call.queries + kQueries - 1) / kQueries;
  parallel(call.run, call.batch * call.heads * blocks, [&](int64_t begin, int64_t end) {
    ForwardScratch<T> scratch(call);
    typename ReuseEngine<T>::Session session;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks;
      forward_block(call, head / call.heads, head % call.heads, task % blocks * kQueries, scratch);
    }
  });
}

// The backward pass. A task takes a fixed range of keys, a split, of one head and goes over all queries, so that each
// weight is computed once; a split's part of grad_query goes to a buffer, and the parts are added in order at the end.
// Buffers are held for a few heads at a time.
constexpr int64_t kTasksAtOnce = 64;

int64_t keys_of_split(const AttentionBackward& call) {
  return call.channels + call.value_channels <= 256 ? 4 * kKeys : 2 * kKeys;  // grad_key and grad_value stay in cache
}

template <class T>
struct BackwardScratch {
  using E = ReuseEngine<T>;
  int64_t split;
  Scratch key_rows, key_columns, value_rows;                        // the split's operands, by block of keys
  Scratch grad_key, grad_value;                                     // [split, C] and [split, E]
  Scratch query, grad, query_rows, grad_rows;                       // the block of queries' operands
  Scratch weights, grad_weights, weights_left, logits_left, logits_right;

  explicit BackwardScratch(const AttentionBackward& call)
      : split(keys_of_split(call)),
        key_rows(split / kKeys * E::left_size(kKeys, call.channels)),
        key_columns(split / kKeys * E::left_size(call.channels, kKeys)),
        value_rows(split / kKeys * E::left_size(kKeys, call.value_channels)),
        grad_key(split * round_up(call.channels, kLanes)),
        grad_value(split * round_up(call.value_channels, kLanes)),
        query(E::right_size(call.channels, kQueries)),
        grad(E::right_size(call.value_channels, kQueries)),
        query_rows(E::right_size(kQueries, call.channels)),
        grad_rows(E::right_size(kQueries, call.value_channels)),
        weights(kKeys * kQueries),
        grad_weights(kKeys * kQueries),
        weights_left(E::left_size(kKeys, kQueries)),
        logits_left(E::left_size(kKeys, kQueries)),
        logits_right(E::right_size(kKeys, kQueries)) {}
};

// Puts the weights P = 2^(factor logits - logsumexp) and the gradients of the scaled logits, P (gamma grads - delta).
template <class Weights, class Grads>
NYSTROMGAN_INLINE void differentiate_softmax(
    const float* logits, const float* weight_grads, int64_t keys, int64_t queries, float factor, float gamma,
    const float* logsumexp2, const float* delta, Weights& weights, Grads& grads) {
  for (int64_t q = 0; q < queries; q += kLanes) {
    const Vec shift = load(logsumexp2 + q), offset = load(delta + q);
    const auto weight = [&](int64_t k) { return exp2(load(logits + k * kQueries + q) * factor - shift); };
    const auto grad = [&](int64_t k) { return load(weight_grads + k * kQueries + q) * gamma - offset; };
    int64_t k = 0;
    for (; k + 1 < keys; k += 2) {
      const Vec even = weight(k), odd = weight(k + 1);
      grads.put(k, q, even * grad(k), odd * grad(k + 1));
      weights.put(k, q, even, odd);
    }
    if (k < keys) {
      const Vec even = weight(k);
      grads.put(k, q, even * grad(k), Vec{});
      weights.put(k, q, even, Vec{});
    }
  }
}

// In half precision delta comes from rounded outputs, and a query's gradients of logits no longer add up to zero: rho = their
// sum, which delta lacks, is taken from grad_query with m = the keys' weighted mean, grad_query -= rho m. Many channels
// average that error out: beside eager's, grad_query's is 0.35 with 8, 0.45 with 2 and up to 1.6 with one.
constexpr int64_t kFewChannels = 2;

template <class T>
bool is_balanced(const AttentionBackward& call) {
  return sizeof(T) == 2 && call.channels <= kFewChannels;
}

// Rows of [kQueries] of a block's part of grad_query: of a balanced one those of m and of rho follow.
template <class T>
int64_t rows_of_part(const AttentionBackward& call) {
  const int64_t rows = round_up(call.channels, ReuseEngine<T>::kRowPad);
  return is_balanced<T>(call) ? rows + call.channels + 1 : rows;
}

// Adds a block of keys [C, kKeys] to m and rho, [C + 1, kQueries].
inline void add_to_balance(
    const float* logits, const float* weight_grads, const float* key, int64_t channels, int64_t keys, int64_t queries,
    float factor, float gamma, const float* logsumexp2, const float* delta, float* balance) {
  for (int64_t q = 0; q < queries; q += kLanes) {
    const Vec shift = load(logsumexp2 + q), offset = load(delta + q);
    for (int64_t k = 0; k < keys; ++k) {
      const Vec weight = exp2(load(logits + k * kQueries + q) * factor - shift);
      const Vec grad = load(weight_grads + k * kQueries + q) * gamma - offset;
      for (int64_t c = 0; c < channels; ++c) {
        float* const m = balance + c * kQueries + q;
        store(m, load(m) + weight * key[c * kKeys + k]);
      }
      float* const rho = balance + channels * kQueries + q;
      store(rho, load(rho) + weight * grad);
    }
  }
}

// delta[n] = sum over e of grad_output[e, n] attended[e, n], for a block of queries; returns its sum over n.
template <class T>
float dot_block(const AttentionBackward& call, int64_t b, int64_t h, int64_t first, float* delta) {
  const Head<T> grad(call.grad_output, b, h), attended(call.attended, b, h);
  const int64_t queries = min(kQueries, call.queries - first);
  constexpr int64_t kChannels = 16;
  alignas(64) float x[kChannels * kQueries], y[kChannels * kQueries], sum[kQueries] = {};
  for (int64_t e = 0; e < call.value_channels; e += kChannels) {
    const int64_t channels = min(kChannels, call.value_channels - e);
    const auto block = [&](Head<T> head, float* to) {
      gather(head.token(first) + e * head.channel_stride, channels, queries, head.channel_stride, head.token_stride, to,
             kQueries);
    };
    block(grad, x);
    block(attended, y);
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t q = 0; q < queries; q += kLanes)
        store(sum + q, load(sum + q) + load(x + i * kQueries + q) * load(y + i * kQueries + q));
  }
  float total = 0;
  for (int64_t q = 0; q < queries; ++q) total += delta[q] = sum[q];
  return total;
}

// delta [B, H, N] and grad_gamma.
template <class T>
void dot_all(const AttentionBackward& call, float* delta) {
  const int64_t blocks = (call.queries + kQueries - 1) / kQueries, tasks = call.batch * call.heads * blocks;
  Scratch totals(tasks);
  parallel(call.run, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, first = task % blocks * kQueries;
      totals[task] = dot_block<T>(call, head / call.heads, head % call.heads, first, delta + head * call.queries + first);
    }
  });
  double total = 0;
  for (int64_t task = 0; task < tasks; ++task) total += totals[task];
  *call.grad_gamma = static_cast<float>(total);
}

// One split of keys of one head against all queries; part: [blocks of queries][C, kQueries], this split's grad_query.
template <class T>
void backward_split(
    const AttentionBackward& call, int64_t b, int64_t h, int64_t first_key, const float* all_deltas, float* part,
    BackwardScratch<T>& scratch) {
  using E = ReuseEngine<T>;
  using Left = typename E::Left;
  constexpr int64_t kBlocks = 4;
  const Head<T> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h), grad(call.grad_output, b, h);
  const int64_t C = call.channels, D = call.value_channels;
  const int64_t ld_key = round_up(C, kLanes), ld_value = round_up(D, kLanes);
  const int64_t split = min(scratch.split, call.key_counts[b] - first_key);
  const float factor = call.scale * kLog2E;

  Left key_rows[kBlocks], key_columns[kBlocks], value_rows[kBlocks];
  for (int64_t j = 0; j * kKeys < split; ++j) {
    const int64_t s = first_key + j * kKeys, keys = min(kKeys, split - j * kKeys);
    key_rows[j] = Operands<T>::tokens_by_channels(key, s, keys, C, scratch.key_rows + j * E::left_size(kKeys, C));
    key_columns[j] = Operands<T>::channels_by_tokens(key, s, keys, C, scratch.key_columns + j * E::left_size(C, kKeys));
    value_rows[j] = Operands<T>::tokens_by_channels(value, s, keys, D, scratch.value_rows + j * E::left_size(kKeys, D));
  }
  memset(scratch.grad_key, 0, scratch.split * ld_key * sizeof(float));
  memset(scratch.grad_value, 0, scratch.split * ld_value * sizeof(float));

  for (int64_t first = 0; first < call.queries; first += kQueries, part += rows_of_part<T>(call) * kQueries) {
    const int64_t queries = min(kQueries, call.queries - first);
    alignas(64) float logsumexp2[kQueries] = {}, delta[kQueries] = {};
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t at = (b * call.heads + h) * call.queries + first + q;
      logsumexp2[q] = call.logsumexp[at] * kLog2E;
      delta[q] = all_deltas[at] * call.gamma;
    }
    const auto q = E::right(query.token(first), C, queries, query.channel_stride, query.token_stride, scratch.query);
    const auto g = E::right(grad.token(first), D, queries, grad.channel_stride, grad.token_stride, scratch.grad);
    const auto q_rows = E::right(query.token(first), queries, C, query.token_stride, query.channel_stride, scratch.query_rows);
    const auto g_rows = E::right(grad.token(first), queries, D, grad.token_stride, grad.channel_stride, scratch.grad_rows);
    memset(part, 0, C * kQueries * sizeof(float));
    float* const balance = part + round_up(C, E::kRowPad) * kQueries;
    if (is_balanced<T>(call)) memset(balance, 0, (C + 1) * kQueries * sizeof(float));
    for (int64_t j = 0; j * kKeys < split; ++j) {
      const int64_t keys = min(kKeys, split - j * kKeys);
      E::template multiply<false>(keys, queries, C, key_rows[j], q, scratch.weights, kQueries);
      E::template multiply<false>(keys, queries, D, value_rows[j], g, scratch.grad_weights, kQueries);
      if (is_balanced<T>(call)) {
        alignas(64) float columns[kFewChannels * kKeys];
        gather(key.token(first_key + j * kKeys), C, keys, key.channel_stride, key.token_stride, columns, kKeys);
        add_to_balance(scratch.weights, scratch.grad_weights, columns, C, keys, queries, factor, call.gamma, logsumexp2,
                       delta, balance);
      }
      typename E::template Computed<true, false> p(
          scratch.weights, kQueries, keys, queries, scratch.weights_left, nullptr);
      typename E::template Computed<true, true> ds(
          scratch.grad_weights, kQueries, keys, queries, scratch.logits_left, scratch.logits_right);
      differentiate_softmax(
          scratch.weights, scratch.grad_weights, keys, queries, factor, call.gamma, logsumexp2, delta, p, ds);
      E::template multiply<true>(
          keys, D, queries, p.left(), g_rows, scratch.grad_value + j * kKeys * ld_value, ld_value);
      E::template multiply<true>(keys, C, queries, ds.left(), q_rows, scratch.grad_key + j * kKeys * ld_key, ld_key);
      E::template multiply<true>(C, queries, keys, key_columns[j], ds.right(), part, kQueries);
    }
  }

  const auto write = [&](const Maps& maps, float* rows, int64_t channels, int64_t ld, float factor) {
    for (int64_t i = 0; i < split * ld; i += kLanes) store(rows + i, load(rows + i) * factor);
    const Head<T> out(maps, b, h);
    scatter(rows, ld, split, channels, out.token(first_key), out.token_stride, out.channel_stride);
  };
  write(call.grad_key, scratch.grad_key, C, ld_key, call.scale);
  write(call.grad_value, scratch.grad_value, D, ld_value, call.gamma);
}

// Adds the parts of grad_query of one block of queries, [splits] apart by `stride`, in order.
template <class T>
void sum_parts(
    const AttentionBackward& call, int64_t b, int64_t h, int64_t first, float* parts, int64_t splits, int64_t stride) {
  const int64_t queries = min(kQueries, call.queries - first);
  const auto sum_of = [&](int64_t i) {
    Vec sum = load(parts + i);
    for (int64_t j = 1; j < splits; ++j) sum += load(parts + j * stride + i);
    return sum;
  };
  const int64_t means = round_up(call.channels, ReuseEngine<T>::kRowPad) * kQueries, rho = means + call.channels * kQueries;
  for (int64_t i = 0; i < call.channels * kQueries; i += kLanes) {
    Vec sum = sum_of(i);
    if (is_balanced<T>(call)) sum -= sum_of(rho + i % kQueries) * sum_of(means + i);
    store(parts + i, sum * call.scale);
  }
  const Head<T> out(call.grad_query, b, h);
  scatter(parts, kQueries, call.channels, queries, out.token(first), out.channel_stride, out.token_stride);
}

template <class T>
void backward(const AttentionBackward& call) {
  const int64_t heads = call.batch * call.heads, blocks = (call.queries + kQueries - 1) / kQueries;
  Scratch delta(heads * call.queries);
  dot_all<T>(call, delta);

  const int64_t split = keys_of_split(call), splits = (call.keys + split - 1) / split;
  const int64_t block_size = rows_of_part<T>(call) * kQueries, part_size = blocks * block_size;
  const int64_t heads_at_once = min(heads, max(1, kTasksAtOnce / splits));
  Scratch parts(heads_at_once * splits * part_size);
  for (int64_t first_head = 0; first_head < heads; first_head += heads_at_once) {
    const int64_t some = min(heads_at_once, heads - first_head);
    parallel(call.run, some * splits, [&](int64_t begin, int64_t end) {
      BackwardScratch<T> scratch(call);
      typename ReuseEngine<T>::Session session;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = first_head + task / splits, b = head / call.heads, first_key = task % splits * split;
        float* part = parts + task * part_size;
        if (first_key < call.key_counts[b])
          backward_split(call, b, head % call.heads, first_key, delta, part, scratch);
        else
          memset(part, 0, part_size * sizeof(float));
      }
    });
    parallel(call.run, some * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = first_head + task / blocks, block = task % blocks;
        sum_parts<T>(call, head / call.heads, head % call.heads, block * kQueries,
                     parts + task / blocks * splits * part_size + block * block_size, splits, part_size);
      }
    });
  }
}

}  // namespace

void spatiotemporal_attention_forward(const AttentionForward& call) {
  with_type(call.dtype, [&](auto type) { forward<decltype(type)>(call); });
}

void spatiotemporal_attention_backward(const AttentionBackward& call) {
  with_type(call.dtype, [&](auto type) { backward<decltype(type)>(call); });
}

}  // namespace nystromgan::NYSTROMGAN_ISA
