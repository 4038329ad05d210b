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

// Means (B, H, M, D) float32 of tokens over an index; where it is empty, zeros or `fallback`'s rows.
Tensor index_means(const Tensor& tokens, const Tensor& index, int64_t landmarks, const std::optional<Tensor>& fallback);

// Tokens of every landmark, (B|1, H|1, M) float32.
Tensor index_counts(const Tensor& index, int64_t landmarks);

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
