// A ring of buffers that some warps fill and others empty, and the words for it: barriers in shared memory, boxes of tensors
// that the copy engine of sm_90 brings (TMA), registers that go from one kind of warp to the other; or emulated.
#pragma once

#include "group.h"
#include "tensor_map.h"

namespace nystromgan {

#if NYSTROMGAN_EMULATION

inline void start_barrier(uint64_t* barrier, int arrivals) { emulation::start_barrier(barrier, arrivals); }
inline void barriers_started() {}
inline void arrive(uint64_t* barrier) { emulation::arrive(barrier, 0); }
inline void arrive_expecting(uint64_t* barrier, int bytes) { emulation::arrive(barrier, bytes); }
inline void wait_for(uint64_t* barrier, int phase) { emulation::wait_for(barrier, phase); }
inline void give_registers() {}
inline void take_registers() {}

// Lands when its barrier is waited for; swizzled as groups of warps read it.
inline void copy_box(void* target, const TensorMap* map, int column, int row, int64_t head, int64_t batch, uint64_t* barrier) {
  EmulatedMap x;
  memcpy(&x, map, sizeof x);
  const uint16_t* source = x.data + head * x.head_stride + batch * x.batch_stride;
  for (int i = 0; i < x.box_rows; ++i)
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int left = row + i < x.rows ? x.columns - column - 8 * chunk : 0, bytes = 2 * (left < 0 ? 0 : left < 8 ? left : 8);
      char* to = static_cast<char*>(target) + 128 * i + 16 * (chunk ^ i % 8);
      emulation::land_later(barrier, to, bytes ? source + (row + i) * x.row_stride + column + 8 * chunk : nullptr, bytes,
                            16 - bytes);
    }
}

#elif HAS_GROUPS

DEVICE void start_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// For the copy engine too; the other threads see them once the block has met.
DEVICE void barriers_started() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended.
DEVICE void wait_for(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// Of three groups of warps the one that copies needs few registers, and the two others get what it leaves: a thread of 384
// has 168 of them. With 56 some copies by threads spill.
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 72;"); }
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 216;"); }

DEVICE void copy_box(void* target, const TensorMap* map, int column, int row, int64_t head, int64_t batch,
                     uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
      ::"r"(shared_address(target)), "l"(map), "r"(column), "r"(row), "r"(static_cast<int>(head)),
      "r"(static_cast<int>(batch)), "r"(shared_address(barrier))
      : "memory");
}

#endif

#if HAS_GROUPS

// Shared memory of a block whose first `consumers` groups of warps compute and whose other threads copy: what it keeps, and
// stages of what comes by.
template <class T>
struct Ring {
  T* data;
  int own_elements, stage_elements, consumers, stages;
  bool boxes;          // whether the copy engine brings everything, at the word of one thread
  uint64_t* barriers;  // own tiles are there; each stage is filled; each is empty

  DEVICE Ring(int own, int stage, int num_consumers, int num_stages, bool by_boxes)
      : data(reinterpret_cast<T*>(swizzled_memory())),
        own_elements(own),
        stage_elements(stage),
        consumers(num_consumers),
        stages(num_stages),
        boxes(by_boxes),
        barriers(reinterpret_cast<uint64_t*>(data + own + num_stages * stage)) {
    if (thread_index() == 0) {
      const int arrivals = boxes ? 1 : copiers();
      start_barrier(own_there(), arrivals);
      for (int i = 0; i < stages; ++i) start_barrier(filled(i), arrivals), start_barrier(emptied(i), 4 * consumers);
      barriers_started();
    }
    sync_block();
  }

  DEVICE int copiers() const { return num_threads() - consumers * kGroupThreads; }
  DEVICE int copier() const { return thread_index() - consumers * kGroupThreads; }  // negative for those that compute
  DEVICE int consumer() const { return thread_index() / kGroupThreads; }
  DEVICE uint64_t* own_there() const { return barriers; }
  DEVICE uint64_t* filled(int step) const { return barriers + 1 + step % stages; }
  DEVICE uint64_t* emptied(int step) const { return barriers + 1 + stages + step % stages; }
  DEVICE T* stage(int step) const { return data + own_elements + step % stages * stage_elements; }

  // By the threads that copy: bring_own(barrier), then bring(step, barrier) for all steps. Of copies by threads one more is
  // under way while the one before is told.
  template <class BringOwn, class Bring>
  DEVICE void fill(int steps, BringOwn bring_own, Bring bring) const {
    if (boxes && copier() != 0) return;
    for (int step = -1; step < steps; ++step) {
      uint64_t* barrier = step < 0 ? own_there() : filled(step);
      if (step >= stages) wait_for(emptied(step), (step / stages - 1) % 2);
      if (boxes) arrive_expecting(barrier, static_cast<int>(sizeof(T)) * (step < 0 ? own_elements : stage_elements));
      if (step < 0)
        bring_own(barrier);
      else
        bring(step, barrier);
      if (boxes) continue;
      commit_copies();
      if (step >= 0) tell<1>(step - 1);
    }
    if (!boxes) tell<0>(steps - 1);
  }
  template <int PENDING>
  DEVICE void tell(int step) const {
    wait_copies<PENDING>();
    fence_for_groups();
    arrive(step < 0 ? own_there() : filled(step));
  }

  // By those that compute.
  DEVICE void wait_for_own() const { wait_for(own_there(), 0); }
  DEVICE void wait_for_step(int step) const { wait_for(filled(step), step / stages % 2); }
  DEVICE void release(int step) const {
    if (lane_index() == 0) arrive(emptied(step));
  }
};

#endif

}  // namespace nystromgan
