// Which instruction set the kernels use, and the memory that their threads work in.
#include <cstdlib>
#include <cstring>
#include <new>

#include "side.h"

namespace loft {
namespace {

struct Blocks {
  void* memory[kPurposes] = {};
  int64_t bytes[kPurposes] = {};
  ~Blocks() {
    for (void* block : memory) std::free(block);
  }
};
thread_local Blocks blocks;

const Kernels* fastest() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && !std::strcmp(wanted, "default")) return kernels_portable();
#if defined(__x86_64__)
  const bool lowered = wanted && !std::strcmp(wanted, "avx2");
  if (!lowered && kernels_avx512() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return kernels_avx512();
  if (kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kernels_avx2();
#endif
  return kernels_portable();
}

}  // namespace

void* thread_scratch(int purpose, int64_t bytes) {
  constexpr int64_t kLine = 64;
  if (blocks.bytes[purpose] < bytes) {
    const int64_t whole = (bytes + kLine - 1) / kLine * kLine;
    std::free(blocks.memory[purpose]);
    blocks.bytes[purpose] = 0;
    blocks.memory[purpose] = std::aligned_alloc(kLine, whole);
    if (!blocks.memory[purpose]) throw std::bad_alloc();
    blocks.bytes[purpose] = whole;
  }
  return blocks.memory[purpose];
}

const Kernels& kernels() {
  static const Kernels* chosen = fastest();
  return *chosen;
}

}  // namespace loft
