// The kernels for x86 processors with AVX-512 (F, DQ, VL, BW).
#include "side.h"

// Clang has no such pragma; its builds serve with the portable kernels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

// Headers stand above this line: an inline function compiled with these instructions could replace
// the same function of another translation unit. Templates are instantiated at the end of the
// file, so the options are never popped.
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define LOFT_VECTOR_BYTES 64
#define LOFT_SQRT_F32 _mm512_sqrt_ps
#define LOFT_SQRT_F64 _mm512_sqrt_pd

namespace loft {
namespace avx512 {
#include "kernels.h"
}  // namespace avx512

const Kernels* kernels_avx512() {
  static const Kernels table{"avx512", avx512::gram, avx512::gradient_norm, avx512::basis,
                             avx512::rows};
  return &table;
}

}  // namespace loft
#else
const loft::Kernels* loft::kernels_avx512() { return nullptr; }
#endif
