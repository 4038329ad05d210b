#include "emulation.h"

#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace nystromgan::emulation {

Place place;
char* shared;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32, kOperandBytes = 64;
constexpr size_t kGuardBytes = 4096;  // behind a block's shared memory, which no kernel may write

struct Copy {
  char* target;
  const char* source;
  int bytes, zeros;
};

struct Warp {
  int arrived = 0, generation = 0;
  char operands[kLanes * kOperandBytes], results[kLanes * kOperandBytes];
};

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct PhaseBarrier {
  int expected = 0, arrived = 0, phase = 0;
  int64_t bytes_to_come = 0;
  std::vector<Copy> copies;
};

struct Block {
  std::vector<char> shared;
  std::map<uint64_t*, PhaseBarrier> phase_barriers;
  std::vector<Warp> warps;
  Barrier barrier;
};

struct Fibre {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  Place place{};
  Block* block = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
  bool done = false;
};

struct Launch {
  void (*kernel)(const void*);
  const void* parameters;
};

Launch launch;
Fibre* current;
Barrier grid;  // of all blocks that run together
Block* cluster_blocks;
void* scheduler_stack;
int idle_turns;  // yields since something last moved: all fibres waiting is a deadlock

extern "C" void nystromgan_switch(void** from, void* to);

// Saves the registers that a call must keep, and continues on another stack.
asm(R"(
.text
.globl nystromgan_switch
.hidden nystromgan_switch
.type nystromgan_switch, @function
nystromgan_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void yield() {
  Fibre* self = current;
  nystromgan_switch(&self->stack_pointer, scheduler_stack);
}

void start() {
  launch.kernel(launch.parameters);
  current->done = true;
  idle_turns = 0;
  yield();
}

void prepare(Fibre& fibre) {
  if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
  uintptr_t top = reinterpret_cast<uintptr_t>(fibre.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and the alignment of a call
  for (int i = 0; i < 6; ++i) stack[i] = nullptr;
  stack[6] = reinterpret_cast<void*>(&start);
  stack[7] = nullptr;
  fibre.stack_pointer = stack;
  fibre.done = false;
  fibre.groups.clear();
  fibre.open.clear();
}

void arrive(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    idle_turns = 0;
    return;
  }
  while (barrier.generation == generation) yield();
}

void schedule(std::vector<Fibre>& fibres, size_t count, bool reverse) {
  idle_turns = 0;
  for (size_t left = count; left > 0;) {
    left = 0;
    for (size_t i = 0; i < count; ++i) {
      Fibre& fibre = fibres[reverse ? count - 1 - i : i];
      if (fibre.done) continue;
      ++left;
      if (++idle_turns > static_cast<int>(4 * count)) {
        fprintf(stderr, "emulation: the threads of a kernel wait for each other at different places\n");
        abort();
      }
      current = &fibre;
      place = fibre.place;
      shared = fibre.block->shared.data();
      nystromgan_switch(&scheduler_stack, fibre.stack_pointer);
    }
  }
}

}  // namespace

void sync_block() { arrive(current->block->barrier); }

void sync_grid() { arrive(grid); }

const char* remote(const void* own, int rank) {
  return cluster_blocks[rank].shared.data() + (static_cast<const char*>(own) - shared);
}

void gather(const void* operand, size_t operand_bytes, void* result, size_t result_bytes,
            void (*compute)(const char*, char*)) {
  Warp& warp = current->block->warps[place.thread.x / kLanes];
  const int lane = place.thread.x % kLanes, generation = warp.generation;
  memcpy(warp.operands + lane * kOperandBytes, operand, operand_bytes);
  if (++warp.arrived == kLanes) {
    compute(warp.operands, warp.results);
    warp.arrived = 0;
    ++warp.generation;
    idle_turns = 0;
  } else {
    while (warp.generation == generation) yield();
  }
  memcpy(result, warp.results + lane * kOperandBytes, result_bytes);
}

void copy_later(void* target, const void* source, int bytes, int zeros) {
  current->open.push_back({static_cast<char*>(target), static_cast<const char*>(source), bytes, zeros});
}

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_copies(int pending) {
  auto& groups = current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      if (copy.bytes) memcpy(copy.target, copy.source, copy.bytes);
      memset(copy.target + copy.bytes, 0, copy.zeros);
    }
}

namespace {

PhaseBarrier& phase_barrier(uint64_t* barrier) {
  const auto found = current->block->phase_barriers.find(barrier);
  if (found == current->block->phase_barriers.end()) {
    fprintf(stderr, "emulation: a kernel uses a barrier that has not been started\n");
    abort();
  }
  return found->second;
}

void end_phase_if_complete(PhaseBarrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes_to_come != 0) return;
  barrier.arrived = 0;
  barrier.phase ^= 1;
  idle_turns = 0;
}

}  // namespace

void start_barrier(uint64_t* barrier, int arrivals) { current->block->phase_barriers[barrier] = {arrivals, 0, 0, 0, {}}; }

void arrive(uint64_t* barrier, int bytes_to_come) {
  PhaseBarrier& b = phase_barrier(barrier);
  ++b.arrived;
  b.bytes_to_come += bytes_to_come;
  idle_turns = 0;
  end_phase_if_complete(b);
}

void wait_for(uint64_t* barrier, int phase) {
  PhaseBarrier& b = phase_barrier(barrier);
  while (b.phase == phase) {
    for (const Copy& copy : b.copies) {
      if (copy.bytes) memcpy(copy.target, copy.source, copy.bytes);
      memset(copy.target + copy.bytes, 0, copy.zeros);
      b.bytes_to_come -= copy.bytes + copy.zeros;
    }
    b.copies.clear();
    end_phase_if_complete(b);
    if (b.phase == phase) yield();
  }
}

void land_later(uint64_t* barrier, void* target, const void* source, int bytes, int zeros) {
  phase_barrier(barrier).copies.push_back({static_cast<char*>(target), static_cast<const char*>(source), bytes, zeros});
}

void run(void (*kernel)(const void*), const void* parameters, unsigned blocks, unsigned threads, size_t shared_bytes,
         bool cooperative, unsigned cluster) {
  static std::mutex one_at_a_time;
  static std::vector<Fibre> fibres;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const char* order = getenv("NYSTROMGAN_EMULATION_ORDER");
  const bool reverse = order && strcmp(order, "reverse") == 0;
  launch = {kernel, parameters};
  const unsigned together = cooperative ? blocks : cluster;
  if (fibres.size() < size_t{together} * threads) fibres.resize(size_t{together} * threads);
  grid = {static_cast<int>(together * threads)};
  for (unsigned first = 0; first < blocks; first += together) {
    std::vector<Block> states(together);
    cluster_blocks = states.data();
    for (unsigned i = 0; i < together; ++i) {
      Block& block = states[i];
      block.shared.assign(shared_bytes + kGuardBytes, static_cast<char>(0xff));
      block.warps.resize(threads / kLanes);
      block.barrier.expected = threads;
      for (unsigned thread = 0; thread < threads; ++thread) {
        Fibre& fibre = fibres[i * threads + thread];
        fibre.place = {{thread}, {first + i}, {blocks}, {threads}, static_cast<int>(i % cluster)};
        fibre.block = &block;
        prepare(fibre);
      }
    }
    schedule(fibres, size_t{together} * threads, reverse);
    for (const Block& block : states)
      for (size_t i = shared_bytes; i < block.shared.size(); ++i)
        if (block.shared[i] != static_cast<char>(0xff)) {
          fprintf(stderr, "emulation: a kernel writes beyond its %zu bytes of shared memory\n", shared_bytes);
          abort();
        }
  }
}

}  // namespace nystromgan::emulation
