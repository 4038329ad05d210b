// What every kernel takes from its binding, free of torch and of any instruction set.
#pragma once

#include <stdint.h>

namespace nystromgan {

enum class Dtype { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Runs body(begin, end, arg) over parts of [0, tasks) on the caller's thread pool, and returns when all are done.
using ParallelRun = void (*)(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* arg), void* arg);

// Calls body(begin, end) so.
template <class Body>
inline __attribute__((always_inline)) void parallel(ParallelRun run, int64_t tasks, Body body) {
  run(tasks, [](int64_t begin, int64_t end, void* arg) { (*static_cast<Body*>(arg))(begin, end); }, &body);
}

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
inline __attribute__((always_inline)) void with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float32: return body(float{});
    case Dtype::bfloat16: return body(BFloat16{});
    case Dtype::float16: return body(Half{});
  }
}

}  // namespace nystromgan
