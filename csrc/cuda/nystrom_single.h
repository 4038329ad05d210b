// What the whole forward of nystrom_attention takes as one cooperative launch, whose blocks meet between four phases:
//     1  sums of queries and keys over their landmarks, by splits of the tokens
//     2  Z of each head by one block, and G V by splits of the keys by the others
//     3  the splits of G V put together, W = Z (G V)
//     4  O = F W
// Letters as in docs/notation.md; DP and EP are D and E filled up to a multiple of 16.
#pragma once

#include "attend.h"
#include "landmarks.h"

namespace nystromgan {

constexpr int kSingleThreads = 128, kSingleLandmarks = 64;  // 16 landmarks a warp
constexpr int kPoolSplits = 4;      // of a head's tokens, or twice as many: all blocks of phase 2 add them up again
constexpr int kPoolChannels = 64;   // of one unit of phase 1
constexpr int kPoolStages = 3;      // buffers of tokens
constexpr int kPoolExchangeBytes = 4 * 4 * (64 * kPoolChannels / 2 + 32 * 8);  // half of four warps' sums, and their counts
constexpr int kContextSplits = 16;  // of a head's keys, at most
constexpr int kMixColumns = 8;      // of W, of one unit of phase 3
constexpr int64_t kSingleTokens = 8192;

// Tokens of one buffer of phase 1.
template <class T>
constexpr int kPoolTokens = 256 / sizeof(T);

// Tokens that are summed over their landmarks; or, where `sums` is null, landmarks that were given.
struct Pooled {
  Operand tokens;
  Index index;
  float *sums, *counts;  // (B H, splits, M, DP), (B H, splits, M)
  float* means;          // (B H, M, D): given, or to be made; null for none
  const uint8_t* only;   // (B): the rows of the batch that are pooled; null for all
  int num_tokens, dim, splits;
};

struct NystromSingle {
  AttendForward keys, queries;  // G V, whose sums have EP channels, and O
  Pooled query, key, value;     // values only of the exact rows, where O = F pool(V)
  const uint8_t* query_absent;  // (B, M)
  float* inverse;               // Z (B H, 64, 64), zeros around
  float *context, *mixed;       // (B H, M, E)
  float* logsumexp;             // (B H, M)
  void *narrow_key, *narrow_mixed;  // in the tokens' dtype: K~ (B H, M, DP) and W (B H, M, EP)
  int64_t rows;                     // B H
  int heads, landmarks, dim, value_dim, iterations;
  int row_groups, group_tiles;  // of the queries of a head: units of phase 4, and 64 of queries in each
};

}  // namespace nystromgan
