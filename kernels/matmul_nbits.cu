// The kernels of one variant. Macros: from plan.py VARIANT_TYPE, VARIANT_TILING (a struct of the sources),
// VARIANT_BLOCK (the function that does a block of it) and VARIANT_SCALE_SUMS; from parameters.py PARAMETERS of a
// kernel, and MEMBERS of a Matmul that is made of them.
#include "warpgroups.cuh"

using Tile = VARIANT_TILING;

extern "C" KERNEL __launch_bounds__(Tile::THREADS, Tile::BLOCKS) matmul_nbits(PARAMETERS) {
  const Matmul matmul{MEMBERS};
  VARIANT_BLOCK<VARIANT_TYPE, Tile, VARIANT_SCALE_SUMS>(matmul, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
}

extern "C" KERNEL reduce_splits(PARAMETERS) {
  const i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  reduce_output<VARIANT_TYPE>(Matmul{MEMBERS}, (k + split - 1) / split, at);
}
