// Which landmark each token under a padding mask belongs to, on any instruction set.
#include <algorithm>
#include <functional>
#include <numeric>
#include <tuple>

#include "binding.h"

namespace nystromgan {
namespace {

using Sizes = std::vector<int64_t>;

// One row's tokens: its mask, which is true where a token is to be ignored, and what is told of it.
struct Row {
  const bool* mask;  // [tokens]
  int32_t* index;    // [tokens]
  bool* absent;      // [M]
  int64_t tokens, landmarks;
};

// Segments of the valid tokens by rank, the first of them longer; of no more tokens than landmarks, one each. Whether it is so.
bool index_segments(const Row& row) {
  const int64_t valid = std::count(row.mask, row.mask + row.tokens, false);
  const int64_t count = std::clamp<int64_t>(valid, 1, row.landmarks), length = valid / count, longer = valid % count;
  int32_t segment = 0;
  int64_t left = length + (longer > 0);
  for (int64_t n = 0; n < row.tokens; ++n) {
    row.index[n] = row.mask[n] ? -1 : segment;
    if (row.mask[n] || --left > 0) continue;
    ++segment;
    left = length + (segment < longer);
  }
  for (int64_t j = 0; j < row.landmarks; ++j) row.absent[j] = j >= valid;
  return valid <= row.landmarks;
}

// Blocks of a grid, each over its valid tokens; one without any is absent.
void index_blocks(const Row& row, const int32_t* block) {
  std::fill(row.absent, row.absent + row.landmarks, true);
  for (int64_t n = 0; n < row.tokens; ++n) {
    row.index[n] = row.mask[n] ? -1 : block[n];
    if (!row.mask[n]) row.absent[block[n]] = false;
  }
}

// index (B, 1, S) int32, absent (B, M) and exact_rows (B,), which only a sequence, a grid of one axis, can have.
std::tuple<Tensor, Tensor, Tensor> masked_landmarks(const Tensor& padding_mask, const Sizes& grid, const Sizes& counts) {
  STD_TORCH_CHECK(padding_mask.dim() == 2 && padding_mask.scalar_type() == ScalarType::Bool,
                  "padding_mask must be a boolean matrix, got ", padding_mask.dim(), " axes of ",
                  torch::headeronly::toString(padding_mask.scalar_type()));
  const int64_t batch = padding_mask.size(0), tokens = padding_mask.size(1);
  const int64_t positions = std::accumulate(grid.begin(), grid.end(), int64_t{1}, std::multiplies<>());
  STD_TORCH_CHECK(grid.size() == counts.size() && positions == tokens, "a grid of as many axes as counts must have ", tokens,
                  " positions, got ", positions);
  const int64_t landmarks = std::accumulate(counts.begin(), counts.end(), int64_t{1}, std::multiplies<>());
  const Tensor mask = torch::stable::contiguous(padding_mask);
  const Tensor index = empty(mask, {batch, 1, tokens}, ScalarType::Int);
  const Tensor absent = empty(mask, {batch, landmarks}, ScalarType::Bool);
  const Tensor exact = empty(mask, {batch}, ScalarType::Bool);
  std::vector<int32_t> blocks(grid.size() > 1 ? tokens : 0);
  if (!blocks.empty()) index_grid(grid, counts, blocks.data());
  const bool* masks = static_cast<const bool*>(mask.const_data_ptr());
  int32_t* indices = static_cast<int32_t*>(index.mutable_data_ptr());
  bool *absences = static_cast<bool*>(absent.mutable_data_ptr()), *exactness = static_cast<bool*>(exact.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [=, &blocks](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row row{masks + b * tokens, indices + b * tokens, absences + b * landmarks, tokens, landmarks};
      exactness[b] = blocks.empty() && index_segments(row);
      if (!blocks.empty()) index_blocks(row, blocks.data());
    }
  });
  return {index, absent, exact};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) { m.impl("masked_landmarks_native", TORCH_BOX(&masked_landmarks)); }

}  // namespace nystromgan
