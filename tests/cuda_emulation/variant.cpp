// One variant of the kernel, as matmul_nbits.cu has it, behind a C function: a whole grid, block by block.
#include <cstdio>
#include <stdexcept>

#include "block.h"
#include "device.cuh"
// after its twin of device.cuh
#include "matmul_nbits.cuh"

namespace {

using Tile = Tiling<VARIANT_TILING>;
char message[256];

}  // namespace

// Null, or what went wrong.
extern "C" const char* VARIANT_FUNCTION(const Matmul* p, int grid_n, int grid_m, int grid_k, int shared_bytes) {
  try {
    for (int z = 0; z < grid_k; ++z)
      for (int y = 0; y < grid_m; ++y)
        for (int x = 0; x < grid_n; ++x)
          run_block(Tile::THREADS, shared_bytes,
                    [&](int thread) { matmul_block<VARIANT_TYPE, Tile, VARIANT_SCALE_SUMS>(*p, x, y, z, thread); });
    if (p->partial)
      for (i64 at = 0; at < static_cast<i64>(p->m) * p->n; ++at) reduce_output<VARIANT_TYPE>(*p, grid_k, at);
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}
