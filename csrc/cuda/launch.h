// From tensors to kernels: what the bindings of csrc/cuda share.
//
// Kernels are loaded through the driver, which is found when the first one is launched: the library links with nothing
// of CUDA, so that it loads on every machine and one of it serves every torch >= 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/binding.h"
#include "tensor_map.h"

namespace nystromgan {

inline int64_t ceil_of(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

struct Kernel {
  const char* image;  // the .cu file that it is compiled from
  const char* name;
  void (*emulated)(const void*);
};

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  bool cooperative = false;  // all blocks at once, at most `resident_blocks`, so that they can wait for each other
  int cluster = 1;           // blocks that can read each other's shared memory, where there are clusters
};

// On the current stream of the tensor's device; raises what the driver says.
void launch(const Kernel& kernel, const Launch& launch, const void* parameters, const Tensor& on);

// How many blocks of a kernel the device of `on` holds at once.
int64_t resident_blocks(const Kernel& kernel, int threads, size_t shared_bytes, const Tensor& on);

// Whether the device of `on` runs a kernel in clusters of up to eight blocks with so many bytes of shared memory each, and
// the kernel was compiled for that: sm_90a's was.
bool has_clusters(const Kernel& kernel, size_t shared_bytes, const Tensor& on);

// How many threads a block of a kernel may have on the device of `on`.
int64_t most_threads(const Kernel& kernel, const Tensor& on);

int64_t multiprocessors(const Tensor& on);

// A tensor (B, H, rows, columns) of two bytes an element whose columns are side by side; strides in elements.
struct MapOf {
  const void* data;
  int64_t columns, rows, heads, batch;
  int64_t row_stride, head_stride, batch_stride;
  int64_t box_rows;
};
// Whether the copy engine can bring boxes of it, 64 columns wide; if so `map` is filled in.
bool make_tensor_map(TensorMap* map, const MapOf& x, Dtype dtype, const Tensor& on);

// Bytes of shared memory that one block may take on the device of `on`.
size_t shared_limit(const Tensor& on);

}  // namespace nystromgan

// A kernel of kernels/<image>.cu, as kernel_<name>; and where a file's bindings are registered.
#if NYSTROMGAN_EMULATION
#define DECLARE_KERNEL(image, name)  \
  extern "C" void name(const void*); \
  inline const ::nystromgan::Kernel kernel_##name{#image, #name, &name};
#define NYSTROMGAN_BINDINGS(m) STABLE_TORCH_LIBRARY_IMPL(nystromgan, CPU, m)
#else
#define DECLARE_KERNEL(image, name) inline const ::nystromgan::Kernel kernel_##name{#image, #name, nullptr};
#define NYSTROMGAN_BINDINGS(m) STABLE_TORCH_LIBRARY_IMPL(nystromgan, CUDA, m)
#endif
