// launch.h on the emulation, as large as a GPU of sm_80 in shared memory, but for clusters.
#include "emulation.h"
#include "../launch.h"

namespace nystromgan {

void launch(const Kernel& kernel, const Launch& launch, const void* parameters, const Tensor&) {
  emulation::run(kernel.emulated, parameters, launch.blocks, launch.threads, launch.shared_bytes, launch.cooperative,
                 launch.cluster);
}

int64_t resident_blocks(const Kernel&, int, size_t, const Tensor&) { return 3; }

bool has_clusters(const Kernel&, size_t, const Tensor&) { return true; }

int64_t most_threads(const Kernel&, const Tensor&) { return 384; }

int64_t multiprocessors(const Tensor&) { return 3; }

bool make_tensor_map(TensorMap* map, const MapOf& x, Dtype, const Tensor&) {
  const EmulatedMap emulated{static_cast<const uint16_t*>(x.data), x.row_stride, x.head_stride, x.batch_stride,
                             static_cast<int>(x.columns), static_cast<int>(x.rows), static_cast<int>(x.box_rows)};
  static_assert(sizeof emulated <= sizeof map->opaque);
  memcpy(map->opaque, &emulated, sizeof emulated);
  return true;
}

size_t shared_limit(const Tensor&) { return 163 << 10; }

}  // namespace nystromgan

extern "C" __attribute__((visibility("default"))) const char* nystromgan_cpu_isa() { return "emulated CUDA"; }
