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

  // The landmark with the largest x . mean - |mean|^2 / 2 for each token that has one.
  void nearest(int64_t i, const T* x, const int32_t* from, int64_t count, int32_t* index, Workspace& w) const {
    const int64_t block = block_tokens<E>(m);
    const bool* absent = p.landmark_mask ? p.landmark_mask + i / p.heads * m : nullptr;
    const float* means = p.means + i * m * d;
    typename E::Session session;
    float *packed = w.take(E::right_split_size(d, m)), *left = w.take(E::left_size(block, d)), *offset = w.take(ldm);
    float *score = w.take(round_up(block, E::kRowPad) * ldm);
    for (int64_t c = 0; c < ldm; ++c) {
      float square = c < m && !(absent != nullptr && absent[c]) ? 0.0f : kInfinity;
      for (int64_t k = 0; c < m && k < d; ++k) square += means[c * d + k] * means[c * d + k];
      offset[c] = -0.5f * square;
    }
    const auto landmarks = E::right_split(means, d, m, 1, d, packed);  // [D, M]
    for (int64_t n = 0; n < count; n += block) {
      const int64_t rows = min(block, count - n);
      const auto tokens = E::left(x + n * p.x.token, rows, d, p.x.token, p.x.channel, left);
      E::template multiply<false>(rows, m, d, tokens, landmarks, score, ldm);  // [tokens, D] x [D, M]
      for (int64_t r = 0; r < rows; ++r)
        index[n + r] = from[n + r] < 0 ? -1 : largest(score + r * ldm, offset);
    }
  }

  // The first column with the largest score + offset.
  int32_t largest(const float* score, const float* offset) const {
    Vec best = load(score) + load(offset);
    IntVec at{}, place{};
    for (int j = 0; j < kLanes; ++j) place[j] = j;
    at = place;
    for (int64_t c = kLanes; c < ldm; c += kLanes) {
      place += kLanes;
      const Vec x = load(score + c) + load(offset + c);
      const IntVec above = x > best;
      best = above ? x : best;
      at = above ? place : at;
    }
    int32_t found = at[0];
    float top = best[0];
    for (int j = 1; j < kLanes; ++j)
      if (best[j] > top || (best[j] == top && at[j] < found)) top = best[j], found = at[j];
    return found;
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
