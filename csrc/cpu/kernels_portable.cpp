// The kernels with 16-byte vectors, which every 64-bit processor has.
#include "side.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LOFT_SQRT_F32 _mm_sqrt_ps
#define LOFT_SQRT_F64 _mm_sqrt_pd
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LOFT_SQRT_F32(x) (Vec<float>)vsqrtq_f32((float32x4_t)(x))
#define LOFT_SQRT_F64(x) (Vec<double>)vsqrtq_f64((float64x2_t)(x))
#endif
#define LOFT_VECTOR_BYTES 16

namespace loft {
namespace portable {
#include "kernels.h"
}  // namespace portable

const Kernels* kernels_portable() {
  static const Kernels table{"portable", portable::gram, portable::gradient_norm, portable::basis,
                             portable::rows};
  return &table;
}

}  // namespace loft
