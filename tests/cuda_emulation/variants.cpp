// Some variants of the kernel, as matmul_nbits.cu has them, behind C functions: a whole grid, block by block. Macros:
// VARIANTS, a VARIANT(...) for each, and those of kernels/parameters.py.
#include <cstdio>
#include <stdexcept>

#include "block.h"
#include "device.cuh"
// after its twin of device.cuh
#include "matmul_nbits.cuh"

namespace {

char message[256];

// Null, or what went wrong.
template <typename T, typename Tile, bool SCALE_SUMS>
const char* run_grid(const Matmul& p, int grid_n, int grid_m, int grid_k, int shared_bytes) {
  try {
    for (int z = 0; z < grid_k; ++z)
      for (int y = 0; y < grid_m; ++y)
        for (int x = 0; x < grid_n; ++x)
          run_block(Tile::THREADS, shared_bytes,
                    [&](int thread) { matmul_block<T, Tile, SCALE_SUMS>(p, x, y, z, thread); });
    if (p.partial)
      for (i64 at = 0; at < static_cast<i64>(p.m) * p.n; ++at) reduce_output<T>(p, grid_k, at);
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}

}  // namespace

// The last arguments are those of Tiling.
#define VARIANT(FUNCTION, TYPE, SCALE_SUMS, ...)                                                                   \
  extern "C" const char* FUNCTION(PARAMETERS, int grid_n, int grid_m, int grid_k, int shared_bytes) {              \
    return run_grid<TYPE, Tiling<__VA_ARGS__>, SCALE_SUMS>(Matmul{MEMBERS}, grid_n, grid_m, grid_k, shared_bytes); \
  }
VARIANTS
