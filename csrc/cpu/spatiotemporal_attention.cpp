// Binds spatiotemporal_attention: allocates, and takes masked keys out before any kernel sees them.
#include "spatiotemporal_attention.h"

#include <cstring>
#include <tuple>

#include "binding.h"

namespace nystromgan {

NYSTROMGAN_KERNEL(spatiotemporal_attention_forward, AttentionForward)
NYSTROMGAN_KERNEL(spatiotemporal_attention_backward, AttentionBackward)

namespace {

Maps maps(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// An empty (B, H, channels, tokens), contiguous as it reads or, token-major, as (B, H, tokens, channels).
Tensor empty_maps(const Tensor& like, int64_t channels, int64_t tokens, bool token_major) {
  if (!token_major) return empty_recycled(like, {like.size(0), like.size(1), channels, tokens});
  return torch::stable::transpose(empty_recycled(like, {like.size(0), like.size(1), tokens, channels}), 2, 3);
}

// Keys that follow each other unmasked: `count` of them from `first`, at `packed` when the masked ones are taken out.
struct Run {
  int64_t first, count, packed;
};

struct ValidKeys {
  std::vector<std::vector<Run>> runs;  // by sample; empty without a mask
  std::vector<int64_t> counts;         // by sample
};

ValidKeys valid_keys(const std::optional<Tensor>& mask, int64_t batch, int64_t keys) {
  if (!mask) return {{}, std::vector<int64_t>(batch, keys)};
  ValidKeys valid{std::vector<std::vector<Run>>(batch), std::vector<int64_t>(batch, 0)};
  for (int64_t b = 0; b < batch; ++b) {
    const bool* ignored = mask->const_data_ptr<bool>() + b * mask->stride(0);
    for (int64_t s = 0; s < keys; ++s) {
      if (ignored[s * mask->stride(1)]) continue;
      if (s == 0 || ignored[(s - 1) * mask->stride(1)]) valid.runs[b].push_back({s, 0, valid.counts[b]});
      ++valid.runs[b].back().count;
      ++valid.counts[b];
    }
  }
  return valid;
}

template <class T>
void copy_run(const T* src, int64_t src_channel, int64_t src_token, T* dst, int64_t dst_channel, int64_t dst_token,
              int64_t channels, int64_t tokens) {
  if (src_token == 1 && dst_token == 1) {
    for (int64_t c = 0; c < channels; ++c) std::memcpy(dst + c * dst_channel, src + c * src_channel, tokens * sizeof(T));
  } else {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < channels; ++c) dst[t * dst_token + c * dst_channel] = src[t * src_token + c * src_channel];
  }
}

// Copies the valid keys of `src` to the front of `dst` (pack), or back to their places.
template <class T>
void copy_keys(const ValidKeys& valid, const Tensor& src, const Tensor& dst, bool pack) {
  const Maps from = maps(src), to = maps(dst);
  const int64_t heads = src.size(1), channels = src.size(2);
  torch::stable::parallel_for(0, src.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      const T* in = static_cast<const T*>(from.data) + b * from.batch_stride + h * from.head_stride;
      T* out = static_cast<T*>(to.data) + b * to.batch_stride + h * to.head_stride;
      for (const Run& run : valid.runs[b])
        copy_run(in + (pack ? run.first : run.packed) * from.token_stride, from.channel_stride, from.token_stride,
                 out + (pack ? run.packed : run.first) * to.token_stride, to.channel_stride, to.token_stride, channels,
                 run.count);
    }
  });
}

void copy_keys(const ValidKeys& valid, const Tensor& src, const Tensor& dst, bool pack) {
  if (src.element_size() == 4) copy_keys<uint32_t>(valid, src, dst, pack);
  else copy_keys<uint16_t>(valid, src, dst, pack);
}

// `tensor` with its masked keys taken out; itself without a mask.
Tensor without_masked(const ValidKeys& valid, const Tensor& tensor) {
  if (valid.runs.empty()) return tensor;
  const bool token_major = tensor.stride(2) == 1;
  Tensor packed = empty_maps(tensor, tensor.size(2), tensor.size(3), token_major);
  copy_keys(valid, tensor, packed, true);
  return packed;
}

// The gradient of a tensor from that of its unmasked keys: zero for the masked ones.
Tensor with_masked(const ValidKeys& valid, const Tensor& packed, bool token_major) {
  if (valid.runs.empty()) return packed;
  Tensor grad = empty_maps(packed, packed.size(2), packed.size(3), token_major);
  torch::stable::zero_(grad);
  copy_keys(valid, packed, grad, false);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_padding_mask,
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& residual, double scale, bool token_major, bool save) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(3), keys = key.size(3);
  const ValidKeys valid = valid_keys(key_padding_mask, batch, keys);
  const Tensor valid_key = without_masked(valid, key), valid_value = without_masked(valid, value);
  Tensor output = empty_maps(query, value.size(2), queries, token_major);
  const bool save_attended = save && gamma;
  Tensor attended = save_attended ? empty_maps(query, value.size(2), queries, token_major)
                                  : empty(query, {0}, query.scalar_type());
  Tensor logsumexp = save ? empty(query, {batch, heads, queries}, ScalarType::Float) : empty(query, {0}, ScalarType::Float);

  AttentionForward call{};
  call.run = run_parallel;
  call.dtype = dtype(query, "query");
  call.batch = batch, call.heads = heads, call.queries = queries, call.keys = keys;
  call.channels = query.size(2), call.value_channels = value.size(2);
  call.key_counts = valid.counts.data();
  call.query = maps(query), call.key = maps(valid_key), call.value = maps(valid_value);
  if (residual) call.residual = maps(*residual);
  call.gamma = gamma ? read_scalar(*gamma) : 1.0f;
  call.scale = static_cast<float>(scale);
  call.output = maps(output);
  if (save_attended) call.attended = maps(attended);
  if (save) call.logsumexp = logsumexp.mutable_data_ptr<float>();
  spatiotemporal_attention_forward(call);
  return {output, attended, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& gamma, const Tensor& attended,
    const Tensor& logsumexp, double scale, bool token_major) {
  const ValidKeys valid = valid_keys(key_padding_mask, query.size(0), key.size(3));
  const Tensor valid_key = without_masked(valid, key), valid_value = without_masked(valid, value);
  Tensor grad_query = empty_maps(query, query.size(2), query.size(3), token_major);
  Tensor grad_key = empty_maps(query, key.size(2), key.size(3), token_major);
  Tensor grad_value = empty_maps(query, value.size(2), key.size(3), token_major);
  Tensor grad_gamma = empty(query, {}, ScalarType::Float);

  AttentionBackward call{};
  call.run = run_parallel;
  call.dtype = dtype(query, "query");
  call.batch = query.size(0), call.heads = query.size(1), call.queries = query.size(3), call.keys = key.size(3);
  call.channels = query.size(2), call.value_channels = value.size(2);
  call.key_counts = valid.counts.data();
  call.grad_output = maps(grad_output), call.attended = maps(attended);
  call.query = maps(query), call.key = maps(valid_key), call.value = maps(valid_value);
  call.logsumexp = logsumexp.const_data_ptr<float>();
  call.gamma = gamma ? read_scalar(*gamma) : 1.0f;
  call.scale = static_cast<float>(scale);
  call.grad_query = maps(grad_query), call.grad_key = maps(grad_key), call.grad_value = maps(grad_value);
  call.grad_gamma = grad_gamma.mutable_data_ptr<float>();
  spatiotemporal_attention_backward(call);
  if (!gamma) torch::stable::zero_(grad_gamma);
  return {grad_query, with_masked(valid, grad_key, token_major), with_masked(valid, grad_value, token_major), grad_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m) {
  m.impl("spatiotemporal_attention_native", TORCH_BOX(&forward));
  m.impl("spatiotemporal_attention_backward_native", TORCH_BOX(&backward));
}

}  // namespace nystromgan
