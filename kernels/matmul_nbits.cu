// The kernels of one variant. Macros: VARIANT_TYPE, VARIANT_TILING (arguments of Tiling), VARIANT_SCALE_SUMS.
#include "matmul_nbits.cuh"

using Tile = Tiling<VARIANT_TILING>;

#define PARAMETERS                                                                                             \
  const u16 *a, const u8 *b, const u16 *scales, const u8 *zero_points, const u16 *bias, u16 *y, float *partial, \
      int m, int n, int k, int blocks, int log2_block, int chunks, int slice, int split
#define ARGUMENTS a, b, scales, zero_points, bias, y, partial, m, n, k, blocks, log2_block, chunks, slice, split

extern "C" KERNEL __launch_bounds__(Tile::THREADS, 1) matmul_nbits(PARAMETERS) {
  matmul_block<VARIANT_TYPE, Tile, VARIANT_SCALE_SUMS>(Matmul{ARGUMENTS}, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
}

extern "C" KERNEL reduce_splits(PARAMETERS) {
  const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  reduce_output<VARIANT_TYPE>(Matmul{ARGUMENTS}, (k + split - 1) / split, at);
}
