// Lloyd steps: every token to its nearest landmark, every landmark to the mean of its tokens, in one pass a step.
#include "isa.h"
#include "nystrom.h"

namespace nystromgan::NYSTROMGAN_ISA {
namespace {

template <class T>
struct Lloyd {
  using E = Engine<T>;
  const ClusterProblem& p;
  int64_t m = p.landmarks, d = p.dim, ldm = round_up(m, kLanes), chunks = chunks_of(p.tokens);
  int64_t partial_size = m * d + m;  // sums of the landmarks' tokens, their counts
  Scratch partial{p.batch * p.heads * chunks * partial_size};

  bool frozen(int64_t i) const { return p.frozen_rows != nullptr && p.frozen_rows[i / p.heads]; }

  // Assigns a chunk of tokens by the means, or with `start` as the start says, and sums them by landmark.
  void assign(int64_t i, int64_t s, bool start, Workspace& w) const {
    const int64_t b = i / p.heads, h = i % p.heads, chunk = chunk_tokens(p.tokens);
    const int64_t first = s * chunk, count = min(chunk, p.tokens - first);
    const T* x = row<T>(p.x, b, h, first);
    const int32_t* from = row(p.start, b, h) + first;
    int32_t* index = p.index + i * p.tokens + first;
    if (start || frozen(i)) memcpy(index, from, count * sizeof(int32_t));
    else nearest(i, x, from, count, index, w);
    float *sums = partial + (i * chunks + s) * partial_size, *counts = sums + m * d;
    memset(sums, 0, partial_size * sizeof(float));
    add_to_landmarks(x, p.x.token, p.x.channel, index, count, d, sums);
    for (int64_t n = 0; n < count; ++n)
      if (index[n] >= 0) counts[index[n]] += 1.0f;
  }

  // The landmark with the largest x . mean - |mean|^2 / 2 for each token that has one. Where an engine rounds the means, and
  // that could decide between the two best, fp32 decides: for random tokens about one in fifteen.
  void nearest(int64_t i, const T* x, const int32_t* from, int64_t count, int32_t* index, Workspace& w) const {
    const int64_t block = block_tokens<E>(m);
    const bool* absent = p.landmark_mask ? p.landmark_mask + i / p.heads * m : nullptr;
    const float* means = p.means + i * m * d;
    typename E::Session session;
    float *packed = w.take(E::right_size(d, m)), *left = w.take(E::left_size(block, d)), *offset = w.take(ldm);
    float *score = w.take(round_up(block, E::kRowPad) * ldm);
    const Doubts doubts(w, E::kRounds ? block : 0, means, *this);
    for (int64_t c = 0; c < ldm; ++c) {
      float square = c < m && !(absent != nullptr && absent[c]) ? 0.0f : kInfinity;
      for (int64_t k = 0; c < m && k < d; ++k) square += means[c * d + k] * means[c * d + k];
      offset[c] = -0.5f * square;
    }
    const auto landmarks = E::right(means, d, m, 1, d, packed);  // [D, M]
    for (int64_t n = 0; n < count; n += block) {
      const int64_t rows = min(block, count - n);
      const T* tokens = x + n * p.x.token;
      // [tokens, D] x [D, M]
      E::template multiply<false>(
          rows, m, d, E::left(tokens, rows, d, p.x.token, p.x.channel, left), landmarks, score, ldm);
      int64_t doubtful = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const Winner winner = find_largest<E::kRounds>(score + r * ldm, offset);
        index[n + r] = from[n + r] < 0 ? -1 : winner.place;
        if constexpr (E::kRounds)
          if (!(winner.lead > doubts.least_lead(tokens + r * p.x.token))) doubts.row[doubtful++] = r;
      }
      if (doubtful == 0) continue;
      doubts.decide(tokens, doubtful, offset, score, [&](int64_t r, int32_t place) {
        index[n + r] = from[n + r] < 0 ? -1 : place;
      });
    }
  }

  // The tokens of a block whose nearest landmark depends on how an engine rounds the means.
  struct Doubts {
    const Lloyd& of;
    float *means, *tokens;  // [D, M] and of those tokens [rows, D], in fp32
    float rounding;         // twice the most that |mean| changes where its numbers are rounded to T
    int64_t* row;

    Doubts(Workspace& w, int64_t block, const float* exact, const Lloyd& of)
        : of(of), means(w.take(block > 0 ? of.d * of.ldm : 0)), tokens(w.take(block * round_up(of.d, kLanes))),
          rounding(0), row(reinterpret_cast<int64_t*>(w.take(2 * block))) {
      if constexpr (!E::kRounds) return;
      else measure(exact);
    }

    void measure(const float* exact) {
      scaled_transpose(of.m, of.d, 1.0f, exact, of.d, means, of.ldm);
      for (int64_t c = 0; c < of.m; ++c) {
        Vec squares{};
        for (int64_t k = 0; k < of.d; k += kLanes) {
          const int64_t rest = of.d - k;
          const Vec x = rest >= kLanes ? load(exact + c * of.d + k) : load_first(exact + c * of.d + k, rest);
          const Vec change = x - widen(T{}, narrow(T{}, x));
          squares += change * change;
        }
        const float square = reduce_add(squares);
        if (larger(square, rounding)) rounding = square;
      }
      rounding = 2.0f * __builtin_sqrtf(rounding);
    }

    // Rounding moves x . mean by at most |x| times what it moves the mean.
    float least_lead(const T* token) const {
      const int64_t d = of.d, step = of.p.x.channel;
      float square = 0.0f;
      if (step == 1) {
        Vec sum{};
        int64_t k = 0;
        for (; k + kLanes <= d; k += kLanes) sum += load(token + k) * load(token + k);
        if (k < d) sum += load_first(token + k, d - k) * load_first(token + k, d - k);
        square = reduce_add(sum);
      } else {
        for (int64_t k = 0; k < d; ++k) square += to_float(token[k * step]) * to_float(token[k * step]);
      }
      return rounding * __builtin_sqrtf(square);
    }

    template <class Decide>
    void decide(const T* block, int64_t count, const float* offset, float* score, Decide decided) const {
      const int64_t ld = round_up(of.d, kLanes);
      for (int64_t i = 0; i < count; ++i)
        gather(block + row[i] * of.p.x.token, 1, of.d, of.p.x.token, of.p.x.channel, tokens + i * ld, ld);
      multiply_float<false>(count, of.ldm, of.d, {tokens, ld, 1}, means, of.ldm, score, of.ldm);
      for (int64_t i = 0; i < count; ++i) decided(row[i], of.template find_largest<false>(score + i * of.ldm, offset).place);
    }
  };

  struct Winner {
    int32_t place;
    float lead;  // over the next largest; NaN where there is a NaN
  };

  // The first column with the largest score + offset.
  template <bool with_lead>
  Winner find_largest(const float* score, const float* offset) const {
    Vec best = load(score) + load(offset), second = splat(-kInfinity);
    IntVec at{}, place{};
    for (int j = 0; j < kLanes; ++j) place[j] = j;
    at = place;
    for (int64_t c = kLanes; c < ldm; c += kLanes) {
      place += kLanes;
      const Vec x = load(score + c) + load(offset + c);
      const IntVec above = x > best;
      if constexpr (with_lead) second = above ? max(second, best) : max(second, x);
      best = above ? x : best;
      at = above ? place : at;
    }
    const float top = reduce_max(best);
    const int32_t found = reduce_min(best == top ? at : IntVec{} + static_cast<int32_t>(ldm));
    if (found == ldm) return {0, __builtin_nanf("")};
    if constexpr (with_lead) second = max(second, at == found ? splat(-kInfinity) : best);
    return {found, top - reduce_max(second)};
  }

  // Means of the chunks' sums in their order; an empty landmark keeps its place, or is zero at the start.
  void update(int64_t i, bool start) const {
    float* means = p.means + i * m * d;
    if (start) memset(means, 0, m * d * sizeof(float));
    for (int64_t c = 0; c < m; ++c) {
      float count = 0.0f;
      for (int64_t s = 0; s < chunks; ++s) count += partial[(i * chunks + s) * partial_size + m * d + c];
      if (count == 0.0f) continue;
      memset(means + c * d, 0, d * sizeof(float));
      for (int64_t s = 0; s < chunks; ++s)
        add_scaled(means + c * d, partial + (i * chunks + s) * partial_size + c * d, 1.0f / count, d);
    }
  }

  void run() const {
    const int64_t count = p.batch * p.heads;
    for (int64_t step = 0; step <= p.iterations; ++step) {
      for_each_chunk(p.run, count, chunks, [&](int64_t i, int64_t s, Workspace& w) { assign(i, s, step == 0, w); });
      parallel(p.run, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) update(i, step == 0);
      });
    }
  }
};

}  // namespace

void cluster_landmarks(const ClusterProblem& p) {
  with_type(p.dtype, [&](auto type) { Lloyd<decltype(type)>{p}.run(); });
}

}  // namespace nystromgan::NYSTROMGAN_ISA
