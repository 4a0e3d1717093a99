// A product with many tokens on GPUs of compute capability 9.0, whose tensor cores take one operand from shared memory
// and go on by themselves: a warpgroup unpacks the next weights into registers while they multiply the last.
#pragma once

#include "tiles.cuh"

// How a block's work is cut up: WARPGROUPS of four warps side by side over rows of B, a warp with 16 * ROW_TILES rows
// and all tokens.
template <int BITS_, int TOKENS_, int ROW_TILES_, int WARPGROUPS_, int STAGES_, int BLOCKS_>
struct WarpgroupTiling {
  static constexpr int BITS = BITS_;
  static constexpr int TOKENS = TOKENS_;          // rows of A
  static constexpr int ROW_TILES = ROW_TILES_;    // products of 64 rows of B that a warpgroup makes of the same tokens
  static constexpr int WARPGROUPS = WARPGROUPS_;
  static constexpr int STAGES = STAGES_;  // steps in shared memory: two that are read, the others on their way
  static constexpr int BLOCKS = BLOCKS_;  // on a multiprocessor
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr int WARP_ROWS = 16 * ROW_TILES;
  static constexpr int ROWS = WARP_ROWS * 4 * WARPGROUPS;
  static constexpr int THREADS = LANES * 4 * WARPGROUPS;

  // Shared memory: stages, each of weights, then activations; in the end, for each warp, the sums of eight tokens.
  static constexpr int WEIGHT_BYTES = ROWS * STEP * BITS / 8;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * STEP * 2;
  static constexpr int RING = STAGES * STAGE_BYTES;
  static_assert(STAGES > 2 && WEIGHT_BYTES % 1024 == 0 && STAGE_BYTES % 1024 == 0);
};

// Describes 16-bit floats in shared memory from `address` on to a product: rows of 128 bytes, 64 elements of K of a
// token; eight rows begin at a multiple of 1 KiB, and the 16 bytes i of row r are at i ^ r % 8, as the PTX manual's
// "Matrix Descriptor" has it for swizzling of 128 bytes. Columns further on begin as many bytes further on.
DEVICE u64 matrix_descriptor(u32 address) { return address >> 4 | u64{1024 >> 4} << 32 | u64{1} << 62; }

// Activations of a step as `matrix_descriptor` has them: of all tokens 64 columns, then the other 64.
template <int TOKENS>
struct Swizzled {
  DEVICE static int place(int token, int piece) {
    return piece / 8 * (TOKENS * 128) + token * 128 + (piece % 8 ^ token % 8) * 16;
  }
  // Where the products of 16 columns begin.
  DEVICE static int begin(int sixteenth) { return sixteenth / 4 * (TOKENS * 128) + sixteenth % 4 * 32; }
};

// The weights of 32 columns that a lane gives to two products of each tile.
template <typename Tile>
using Fragments = u32[Tile::ROW_TILES][2][4];

template <typename T, typename Tile>
DEVICE void unpack(const u8* weights, int quarter, PairOfLane<T, Tile::BITS> lane_pair,
                   const u32 (&grid)[2 * Tile::ROW_TILES], int first_row, Fragments<Tile>& to) {
  constexpr int BITS = Tile::BITS;
#pragma unroll
  for (int half = 0; half < 2 * Tile::ROW_TILES; ++half) {
    const int row = first_row + half * 8;
    u32 words[BITS];
    read_words<BITS>(weights, row, quarter ^ ByEights<BITS>::swap(row) / 4, words);
    const u32 zero = grid[half] & 0xFFFFu, scale = both_high(grid[half]);
    const u32 centered[4] = {lane_pair.template of<0>(words, zero), lane_pair.template of<1>(words, zero),
                             lane_pair.template of<2>(words, zero), lane_pair.template of<3>(words, zero)};
#pragma unroll
    for (int j = 0; j < 4; ++j) to[half / 2][j / 2][half % 2 + j % 2 * 2] = fma2<T>(centered[j], scale, both(0x8000u));
  }
}

// Starts the products of 32 columns of a step and closes their group.
template <typename T, typename Tile>
DEVICE void start_products(Sums<Tile>& sums, const Fragments<Tile>& weights, u32 activations, int quarter) {
  fence_products();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u64 b = matrix_descriptor(activations + Swizzled<Tile::TOKENS>::begin(quarter * 2 + half));
#pragma unroll
    for (int r = 0; r < Tile::ROW_TILES; ++r) start_product<T, Tile::TOKENS>(sums[r], weights[r][half], b);
  }
  commit_products();
}

template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void warpgroup_block(const Matmul& p, int block_row, int block_token, int block_split, int thread) {
  static_assert(!SCALE_SUMS, "scales multiply weights");
  constexpr int ROW_TILES = Tile::ROW_TILES, STAGES = Tile::STAGES, QUARTERS = STEP / CHUNK;
  const int lane = thread % LANES, first_row = thread / LANES * Tile::WARP_ROWS + lane / 4;
  const int row0 = block_row * Tile::ROWS, token0 = block_token * Tile::TOKENS;
  const int begin = block_split * p.split, end = min(p.k, begin + p.split);

  const auto start_step = [&](int stage, int k) {
    start_stage<Swizzled<Tile::TOKENS>, Tile>(p, stage, row0, token0, k, k < end, thread);
  };
  const Rows<Tile::BITS> rows(p, row0);
  const auto read_grid = [&](u32(&grid)[2 * ROW_TILES], int group) { rows.read_all(grid, first_row, group); };
  const PairOfLane<T, Tile::BITS> lane_pair(lane % 4);

#pragma unroll 1
  for (int s = 0; s < STAGES - 2; ++s) start_step(s, begin + s * STEP);
  Sums<Tile> sums = {};
  Fragments<Tile> weights[2];
  u32 grid[2 * ROW_TILES], next[2 * ROW_TILES];  // of a group, and of the one after it, as long before its use
  int group = begin >> p.log2_block, stage = 0;
  read_grid(grid, group);
  read_grid(next, group + 1);
#pragma unroll 1
  for (int k = begin; k < end; k += STEP) {
    const u8* from = shared_memory() + stage * Tile::STAGE_BYTES;
    wait_for_copies<STAGES - 3>();
    publish_to_products();
    __syncthreads();
    // Products of the step before may still be under way, those of the step before that are not: theirs is the stage.
    start_step(stage < 2 ? stage + STAGES - 2 : stage - 2, k + (STAGES - 2) * STEP);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      if (const int of_quarter = (k + quarter * CHUNK) >> p.log2_block; of_quarter != group) {
#pragma unroll
        for (int half = 0; half < 2 * ROW_TILES; ++half) grid[half] = next[half];
        group = of_quarter;
        read_grid(next, group + 1);
      }
      unpack<T, Tile>(from, quarter, lane_pair, grid, first_row, weights[quarter % 2]);
      start_products<T, Tile>(sums, weights[quarter % 2], shared_address(from + Tile::WEIGHT_BYTES), quarter);
      wait_for_products<1>();  // so that the other weights can be overwritten
    }
  }
  wait_for_products<0>();
  wait_for_copies<0>();
  __syncthreads();
  finish_sums<T, Tile>(p, sums, row0, token0, block_split, thread);
}
