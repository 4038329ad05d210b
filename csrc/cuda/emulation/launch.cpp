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

size_t shared_limit(const Tensor&) { return 163 << 10; }

}  // namespace nystromgan

extern "C" __attribute__((visibility("default"))) const char* nystromgan_cpu_isa() { return "emulated CUDA"; }
