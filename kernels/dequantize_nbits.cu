// The kernel of one kind of weights. Macros: from plan.py VARIANT_TYPE and VARIANT_BITS; from parameters.py PARAMETERS
// of a kernel, and MEMBERS of a Matmul that is made of them.
#include "dequantize.cuh"

extern "C" KERNEL dequantize_nbits(PARAMETERS) {
  const i64 row = static_cast<i64>(blockIdx.y) * ROWS_OF_THREAD;
  dequantize_thread<VARIANT_TYPE, VARIANT_BITS>(Matmul{MEMBERS}, blockIdx.x * blockDim.x + threadIdx.x, row);
}
