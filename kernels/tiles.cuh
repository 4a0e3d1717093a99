// A product with more tokens: a block's weights and activations come together, step after step, in a ring of its own.
// Activations stay in the order of memory, so that they are copied as they are.
#pragma once

#include "stream.cuh"

// How a block's work is cut up: WARPS warps side by side over rows of B, each with 16 * ROW_TILES rows and all tokens.
template <int BITS_, int TOKENS_, int ROW_TILES_, int WARPS_, int STAGES_>
struct TileTiling {
  static constexpr int BITS = BITS_;
  static constexpr int TOKENS = TOKENS_;        // rows of A; in tiles of 8
  static constexpr int ROW_TILES = ROW_TILES_;  // tiles of 16 rows of B in a warp
  static constexpr int WARPS = WARPS_;
  static constexpr int STAGES = STAGES_;  // steps in shared memory: one that is read, the others on their way
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr int WARP_ROWS = 16 * ROW_TILES;
  static constexpr int ROWS = WARP_ROWS * WARPS;
  static constexpr int THREADS = LANES * WARPS;

  // Shared memory: stages, each of weights, then activations; in the end, for each warp, the sums of eight tokens.
  static constexpr int WEIGHT_BYTES = ROWS * STEP * BITS / 8;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * STEP * 2;
  static constexpr int RING = STAGES * STAGE_BYTES;
};

// Where the 16 bytes `piece` of a token of a step are: lanes of two tokens that read the same piece of their chunks
// have banks of their own.
DEVICE int place_of_activations(int token, int piece) {
  return token * (STEP * 2) + ((piece % 4 * 4 + piece / 4) ^ (token % 2 * 4)) * 16;
}

// Starts the copies of a step's activations, tokens token0 .. token0 + TOKENS and 128 columns from k on.
template <typename Tile>
DEVICE void start_activations(const Matmul& p, u8* to, int token0, int k, bool wanted, int thread) {
  constexpr int PIECES = STEP * 2 / 16;
#pragma unroll
  for (int i = 0; i < Tile::TOKENS * PIECES; i += Tile::THREADS) {
    const int at = i + thread, token = at / PIECES, piece = at % PIECES, column = k + piece * 8;
    const bool inside = wanted && token0 + token < p.m && column < p.k;
    const u16* from = p.a + (inside ? static_cast<i64>(token0 + token) * p.k + column : 0);
    if (Tile::TOKENS * PIECES % Tile::THREADS == 0 || at < Tile::TOKENS * PIECES)
      copy_async<16>(to + place_of_activations(token, piece), from, inside);
  }
}

// A word for a row and group: the scale in the upper, the zero point, an integer, in the lower half.
template <int BITS>
DEVICE u32 grid_of_row(const Matmul& p, i64 row, int group) {
  if (row >= p.n || group >= p.blocks) return 0;
  const int zero_bytes = (p.blocks * BITS + 7) / 8;
  u32 zero = 1u << (BITS - 1);
  if (p.zero_points) zero = code_at<BITS>(p.zero_points + row * zero_bytes, zero_bytes, group);
  return static_cast<u32>(p.scales[row * p.blocks + group]) << 16 | zero;
}

template <typename T, int BITS, bool SCALE_SUMS, int P>
DEVICE u32 consecutive_weights(const u32 (&words)[BITS], u32 grid) {
  const u32 centered = consecutive_pair<T, BITS, P>(words, grid & 0xFFFFu);
  if constexpr (SCALE_SUMS) return centered;
  return fma2<T>(centered, both_high(grid), both(0x8000u));  // + -0: a product
}

// The two products that codes 8J .. 8J + 8 of each chunk make.
template <typename T, typename Tile, bool SCALE_SUMS, int J>
DEVICE void multiply_eighths(Sums<Tile>& sums, const Chunks<Tile>& chunks, const u8* activations, int lane) {
  u32 weights[Tile::ROW_TILES][2][4];
#pragma unroll
  for (int half = 0; half < 2 * Tile::ROW_TILES; ++half) {
    const u32(&words)[Tile::BITS] = chunks.words[half];
    u32(&of_tile)[2][4] = weights[half / 2];
    of_tile[0][half % 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, J * 4>(words, chunks.grid[half]);
    of_tile[0][half % 2 + 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, J * 4 + 1>(words, chunks.grid[half]);
    of_tile[1][half % 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, J * 4 + 2>(words, chunks.grid[half]);
    of_tile[1][half % 2 + 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, J * 4 + 3>(words, chunks.grid[half]);
  }
#pragma unroll
  for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile) {
    const int at = place_of_activations(tile * 8 + lane / 4, lane % 4 * 4 + J);
    const Vector x = *reinterpret_cast<const Vector*>(activations + at);
#pragma unroll
    for (int r = 0; r < Tile::ROW_TILES; ++r) {
      multiply_accumulate<T>(sums[r][tile], weights[r][0], x.x, x.y);
      multiply_accumulate<T>(sums[r][tile], weights[r][1], x.z, x.w);
    }
  }
}

template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void multiply_tile_step(Sums<Tile>& sums, const Chunks<Tile>& chunks, const u8* activations, int lane) {
  multiply_eighths<T, Tile, SCALE_SUMS, 0>(sums, chunks, activations, lane);
  multiply_eighths<T, Tile, SCALE_SUMS, 1>(sums, chunks, activations, lane);
  multiply_eighths<T, Tile, SCALE_SUMS, 2>(sums, chunks, activations, lane);
  multiply_eighths<T, Tile, SCALE_SUMS, 3>(sums, chunks, activations, lane);
}

template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void tile_block(const Matmul& p, int block_row, int block_token, int block_split, int thread) {
  constexpr int ROW_TILES = Tile::ROW_TILES, STAGES = Tile::STAGES;
  const int lane = thread % LANES, warp = thread / LANES, warp_row = warp * Tile::WARP_ROWS;
  const int row0 = block_row * Tile::ROWS, token0 = block_token * Tile::TOKENS;
  const int begin = block_split * p.split, end = min(p.k, begin + p.split);

  const auto start_step = [&](int stage, int k) {
    u8* to = shared_memory() + stage * Tile::STAGE_BYTES;
    start_weights<Tile::BITS, Tile::ROWS, Tile::THREADS>(p, to, row0, k, k < end, thread);
    start_activations<Tile>(p, to + Tile::WEIGHT_BYTES, token0, k, k < end, thread);
    commit_copies();
  };
  const auto read_grid = [&](u32(&grid)[2 * ROW_TILES], int k) {
    const int group = (SCALE_SUMS ? k : k + lane % 4 * CHUNK) >> p.log2_block;
#pragma unroll
    for (int half = 0; half < 2 * ROW_TILES; ++half)
      grid[half] = grid_of_row<Tile::BITS>(p, static_cast<i64>(row0) + warp_row + half * 8 + lane / 4, group);
  };

#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) start_step(s, begin + s * STEP);
  Sums<Tile> sums = {};
  u32 next[2 * ROW_TILES];
  read_grid(next, begin);
  int stage = 0;
#pragma unroll 1
  for (int k = begin; k < end; k += STEP) {
    const u8* from = shared_memory() + stage * Tile::STAGE_BYTES;
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    start_step(stage ? stage - 1 : STAGES - 1, k + (STAGES - 1) * STEP);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    Chunks<Tile> chunks;
#pragma unroll
    for (int half = 0; half < 2 * ROW_TILES; ++half) {
      read_words<Tile::BITS, Tile::ROWS>(from, warp_row + half * 8 + lane / 4, lane % 4, chunks.words[half]);
      chunks.grid[half] = next[half];
    }
    read_grid(next, k + STEP);  // a step ahead of its use
    const u8* x = from + Tile::WEIGHT_BYTES;
    if constexpr (SCALE_SUMS) {
      Sums<Tile> part = {};
      multiply_tile_step<T, Tile, SCALE_SUMS>(part, chunks, x, lane);
      add_scaled<T, Tile>(sums, part, chunks);
    } else {
      multiply_tile_step<T, Tile, SCALE_SUMS>(sums, chunks, x, lane);
    }
  }

  // A warp turns the sums of eight tokens after eight, [8, WARP_ROWS], so that lanes write rows next to each other.
  constexpr int ROW_STRIDE = Tile::WARP_ROWS + 1;
  float* turned = reinterpret_cast<float*>(shared_memory()) + warp * 8 * ROW_STRIDE;
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        turned[(lane % 4 * 2 + i % 2) * ROW_STRIDE + r * 16 + lane / 4 + i / 2 * 8] = sums[r][tile][i];
    __syncwarp();
    for (int i = lane; i < 8 * Tile::WARP_ROWS; i += LANES) {
      const int token = token0 + tile * 8 + i / Tile::WARP_ROWS, local = i % Tile::WARP_ROWS;
      const i64 row = static_cast<i64>(row0) + warp_row + local;
      if (token < p.m && row < p.n)
        finish_output<T>(p, token, row, block_split, turned[i / Tile::WARP_ROWS * ROW_STRIDE + local]);
    }
    __syncwarp();
  }
}
