// Some variants of the kernel, as matmul_nbits.cu has them, behind C functions: a whole grid, block by block. Macros:
// VARIANTS, a VARIANT(...) for each, DEQUANTIZERS, a DEQUANTIZER(...) for each, and those of kernels/parameters.py.
#include <cstdio>
#include <stdexcept>

#include "block.h"
#include "device.cuh"
// after its twin of device.cuh
#include "dequantize.cuh"
#include "warpgroups.cuh"

namespace {

char message[256];

// Null, or what went wrong.
template <typename T, typename Tile, typename Block>
const char* run_grid(const Matmul& p, int grid_n, int grid_m, int grid_k, int shared_bytes, const Block& do_block) {
  try {
    for (int z = 0; z < grid_k; ++z)
      for (int y = 0; y < grid_m; ++y)
        for (int x = 0; x < grid_n; ++x)
          run_block(Tile::THREADS, shared_bytes, [&](int thread) { do_block(p, x, y, z, thread); });
    if (p.partial)
      for (i64 at = 0; at < static_cast<i64>(p.m) * p.n; ++at) reduce_output<T>(p, grid_k, at);
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}

}  // namespace

// The last arguments are the tiling's.
#define VARIANT(FUNCTION, TYPE, BLOCK, SCALE_SUMS, ...)                                                          \
  extern "C" const char* FUNCTION(PARAMETERS, int grid_n, int grid_m, int grid_k, int shared_bytes) {            \
    using Tile = __VA_ARGS__;                                                                                    \
    return run_grid<TYPE, Tile>(Matmul{MEMBERS}, grid_n, grid_m, grid_k, shared_bytes, BLOCK<TYPE, Tile, SCALE_SUMS>); \
  }
VARIANTS

// The dequantizing kernel, as dequantize_nbits.cu has it: all threads of a grid, which need nothing of each other.
#define DEQUANTIZER(FUNCTION, TYPE, BITS)                                                                  \
  extern "C" void FUNCTION(PARAMETERS, int grid_x, int grid_y, int threads) {                              \
    const Matmul matmul{MEMBERS};                                                                          \
    for (int row = 0; row < grid_y; ++row)                                                                 \
      for (int i = 0; i < grid_x * threads; ++i)                                                           \
        dequantize_thread<TYPE, BITS>(matmul, i, static_cast<i64>(row) * ROWS_OF_THREAD);                  \
  }
DEQUANTIZERS
