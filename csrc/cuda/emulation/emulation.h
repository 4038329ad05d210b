// CUDA's model of threads on a CPU: every thread of a block is a fibre, and a warp's instructions gather all 32 lanes.
//
// The kernels compile against this with an ordinary C++ compiler and run with their own index arithmetic, so that a
// machine without a GPU can compare them with the definition. Copies that should be asynchronous land when they are
// waited for, shared memory starts as NaN and ends where it should, and fibres run in either order: a barrier that is
// missing shows.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace nystromgan::emulation {

struct Dim {
  unsigned x;
};

struct Place {
  Dim thread, block, block_count, threads;
  int rank;  // of the block in its cluster
};

extern Place place;  // of the fibre that runs
extern char* shared;

void sync_block();
void sync_grid();

// Where `own`, in this block's shared memory, is in another's of its cluster.
const char* remote(const void* own, int rank);

// Waits for all lanes of the warp, lets `compute` make 32 results from 32 operands, and gives this lane's back.
void gather(const void* operand, size_t operand_bytes, void* result, size_t result_bytes,
            void (*compute)(const char* operands, char* results));

void copy_later(void* target, const void* source, int bytes, int zeros);
void commit_copies();
void wait_copies(int pending);

// A barrier in shared memory, of so many arrivals a phase, and of the bytes that they expect.
void start_barrier(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier, int bytes_to_come);
void wait_for(uint64_t* barrier, int phase);
// A copy that lands when its barrier is waited for.
void land_later(uint64_t* barrier, void* target, const void* source, int bytes, int zeros);

// Runs `kernel` for every block, one after the other, a cluster at once, or all at once where it is cooperative.
void run(void (*kernel)(const void*), const void* parameters, unsigned blocks, unsigned threads, size_t shared_bytes,
         bool cooperative, unsigned cluster);

}  // namespace nystromgan::emulation
