// Launches of the passes over landmarks, and the small things that bindings say often.
#pragma once

#include "attend_launch.h"
#include "landmarks.h"

namespace nystromgan {

// Tokens of one of the splits that share a head: 32 of them, of a power of two. Only the number of tokens enters, so that a
// row's bits do not depend on what else is in the batch.
int64_t split_tokens(int64_t count);

float* floats(const Tensor& x);
const uint8_t* bytes_of(const std::optional<Tensor>& mask);
std::optional<Tensor> contiguous(const std::optional<Tensor>& mask);
Index index_of(const Tensor& index);

// Blocks of a grid of at most three axes that the tokens lie in, `counts` along each.
Grid grid_of(const Tensor& tokens, const std::vector<int64_t>& sizes, const std::vector<int64_t>& counts);

// Means (B, H, M, D) float32 of tokens over an index; where it is empty, zeros or `fallback`'s rows.
Tensor index_means(const Tensor& tokens, const Index& index, int64_t landmarks, const std::optional<Tensor>& fallback);

// Which landmark each token is in the mean of, (B|1, H|1, tokens) int32, and how many share it, (B|1, H|1, M) float32.
struct Members {
  Tensor index, counts;
};
Members members_of(const Tensor& index, int64_t landmarks);
Members members_of(const Tensor& tokens, const Grid& grid, int64_t landmarks);

enum class Transposed { none, left, right };

void launch_matmul(const Tensor& on, Transposed which, const Matmul& problem);
void launch_convert(const Tensor& on, Dtype to, const Convert& problem);
void launch_core_softmax(const Tensor& on, const CoreSoftmax& problem);
void launch_core_gradient(const Tensor& on, const CoreGradient& problem);
void launch_merge(const Tensor& on, const Merge& problem);
void launch_reduce(const Tensor& on, const Reduce& problem);
void launch_context_gradient(const Tensor& on, const ContextGradient& problem);
void launch_assign(const Tensor& on, Dtype dtype, const Assign& problem);

}  // namespace nystromgan
