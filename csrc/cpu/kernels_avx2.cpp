// The kernels for x86 processors with AVX2 and FMA.
#include "side.h"

// Clang has no such pragma; its builds serve with the portable kernels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

// Headers stand above this line: an inline function compiled with these instructions could replace
// the same function of another translation unit. Templates are instantiated at the end of the
// file, so the options are never popped.
#pragma GCC target("avx2,fma")
#define LOFT_VECTOR_BYTES 32
#define LOFT_SQRT_F32 _mm256_sqrt_ps
#define LOFT_SQRT_F64 _mm256_sqrt_pd

namespace loft {
namespace avx2 {
#include "kernels.h"
}  // namespace avx2

const Kernels* kernels_avx2() {
  static const Kernels table{"avx2", avx2::gram, avx2::gradient_norm, avx2::basis, avx2::rows};
  return &table;
}

}  // namespace loft
#else
const loft::Kernels* loft::kernels_avx2() { return nullptr; }
#endif
