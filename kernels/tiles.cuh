// A product with more tokens: a block's weights and activations come together, step after step, in a ring of its own.
// Activations stay in the order of memory, so that they are copied as they are.
#pragma once

#include "stream.cuh"

// How a block's work is cut up: WARPS warps side by side over rows of B, each with 16 * ROW_TILES rows and all tokens.
template <int BITS_, int TOKENS_, int ROW_TILES_, int WARPS_, int STAGES_, int BLOCKS_>
struct TileTiling {
  static constexpr int BITS = BITS_;
  static constexpr int TOKENS = TOKENS_;        // rows of A; in tiles of 8
  static constexpr int ROW_TILES = ROW_TILES_;  // tiles of 16 rows of B in a warp
  static constexpr int WARPS = WARPS_;
  static constexpr int STAGES = STAGES_;  // steps in shared memory: one that is read, the others on their way
  static constexpr int BLOCKS = BLOCKS_;  // on a multiprocessor
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr int WARP_ROWS = 16 * ROW_TILES;
  static constexpr int ROWS = WARP_ROWS * WARPS;
  static constexpr int THREADS = LANES * WARPS;

  // Shared memory: stages, each of weights, then activations; in the end, for each warp, the sums of eight tokens.
  static constexpr int WEIGHT_BYTES = ROWS * STEP * BITS / 8;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * STEP * 2;
  static constexpr int RING = STAGES * STAGE_BYTES;
};

// Eight codes are BITS bytes: a lane takes eight of the 32 that the four lanes of a row have at a time. Reads codes
// 8 * index .. + 8 of a row that begins at `row` into the first words.
template <int BITS>
DEVICE void read_eight(const u8* row, int index, u32 (&words)[BITS]) {
  if constexpr (BITS == 8) {
    const ShortVector v = reinterpret_cast<const ShortVector*>(row)[index];
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (BITS == 4) {
    words[0] = reinterpret_cast<const u32*>(row)[index];
  } else if constexpr (BITS == 2) {
    words[0] = reinterpret_cast<const u16*>(row)[index];
  } else {  // 24 bits that begin at any byte
    const u32* aligned = reinterpret_cast<const u32*>(row);
    const u32 low = aligned[index * 3 / 4], high = aligned[(index * 3 + 2) / 4];
    words[0] = permute_bytes(low, high, 0x3210u + 0x1111u * (index * 3 % 4));
  }
}

// Where the pieces of a row of a step are in shared memory, so that the lanes of eight rows that read their eights
// have banks of their own: eights of a row are swapped in whole pieces.
template <int BITS>
struct ByEights {
  DEVICE static int swap(int row) {
    if constexpr (BITS == 8) return row % 4 * 4;
    if constexpr (BITS == 4) return row / 2 % 4 * 4;
    if constexpr (BITS == 2) return row / 4 % 2 * 8;
    return 0;
  }
  DEVICE static int place(int row, int piece) { return row * (16 * BITS) + ((piece * 16) ^ (swap(row) * BITS)); }
};

// Where the 16 bytes `piece` of a token of a step are: lanes of two tokens have banks of their own.
struct ByTokens {
  DEVICE static int place(int token, int piece) { return token * (STEP * 2) + (piece ^ (token % 2 * 4)) * 16; }
};

// Starts the copies of a step's activations, tokens token0 .. token0 + TOKENS and 128 columns from k on.
template <typename Order, typename Tile>
DEVICE void start_activations(const Matmul& p, u8* to, int token0, int k, bool wanted, int thread) {
  constexpr int PIECES = STEP * 2 / 16;
  constexpr int APART = Tile::THREADS / PIECES;  // tokens: a thread has the same piece of several
  static_assert(Tile::THREADS % PIECES == 0 && Tile::TOKENS % APART == 0, "each thread has as many copies");
  const int piece = thread % PIECES, column = k + piece * 8, first = thread / PIECES;
  const int tokens = wanted && column < p.k ? p.m - token0 : 0;
  const u16* from = p.a + static_cast<i64>(token0 + first) * p.k + column;
#pragma unroll
  for (int i = 0; i < Tile::TOKENS; i += APART, from += static_cast<i64>(APART) * p.k)
    copy_async<16>(to + Order::place(first + i, piece), from, first + i < tokens);
}

// Starts the copies of a step of 128 columns from k on into a stage, and closes their group.
template <typename Order, typename Tile>
DEVICE void start_stage(const Matmul& p, int stage, int row0, int token0, int k, bool wanted, int thread) {
  const int row_bytes = p.chunks * (4 * Tile::BITS);
  u8* to = shared_memory() + stage * Tile::STAGE_BYTES;
  const u8* weights = p.b + (wanted ? static_cast<i64>(row0) * row_bytes + k / 8 * Tile::BITS : 0);
  start_weights<ByEights<Tile::BITS>, Tile::BITS, Tile::ROWS, Tile::THREADS>(to, weights, row_bytes,
                                                                             wanted ? p.n - row0 : 0, thread);
  start_activations<Order, Tile>(p, to + Tile::WEIGHT_BYTES, token0, k, wanted, thread);
  commit_copies();
}

// Where the scales and zero points of some rows begin.
template <int BITS>
struct Rows {
  const u16* scales;
  const u8* zero_points;
  int last, blocks, zero_bytes;  // the last row there is; of a row

  DEVICE Rows(const Matmul& p, i64 row0)
      : scales(p.scales + row0 * p.blocks),
        zero_points(nullptr),
        last(static_cast<int>(p.n - 1 - row0)),
        blocks(p.blocks),
        zero_bytes((p.blocks * BITS + 7) / 8) {
    if (p.zero_points) zero_points = p.zero_points + row0 * zero_bytes;
  }

  // A word for a row and group: the scale in the upper, the zero point, an integer, in the lower half. Where there is
  // no such row or group, that of the last.
  DEVICE u32 read(int row, int group) const {
    row = min(row, last), group = min(group, blocks - 1);
    u32 zero = 1u << (BITS - 1);
    if (zero_points) zero = code_at<BITS>(zero_points + row * zero_bytes, zero_bytes, group);
    return static_cast<u32>(scales[row * blocks + group]) << 16 | zero;
  }

  // Those of every eighth row from `first` on.
  template <int COUNT>
  DEVICE void read_all(u32 (&words)[COUNT], int first, int group) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i] = read(first + i * 8, group);
  }
};

template <typename T, int BITS, bool SCALE_SUMS, int P>
DEVICE u32 consecutive_weights(const u32 (&words)[BITS], u32 grid) {
  const u32 centered = consecutive_pair<T, BITS, P>(words, grid & 0xFFFFu);
  if constexpr (SCALE_SUMS) return centered;
  return fma2<T>(centered, both_high(grid), both(0x8000u));  // + -0: a product
}

// What a lane has of 32 columns: eights of the rows g and g + 8 of each tile.
template <typename Tile>
struct Eights {
  u32 words[2 * Tile::ROW_TILES][Tile::BITS];
};

// The two products that the `quarter`th 32 columns of a step make.
template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void multiply_eights(Sums<Tile>& sums, const Eights<Tile>& eights, const u32 (&grid)[2 * Tile::ROW_TILES],
                            const u8* activations, int quarter, int lane) {
  u32 weights[Tile::ROW_TILES][2][4];
#pragma unroll
  for (int half = 0; half < 2 * Tile::ROW_TILES; ++half) {
    const u32(&words)[Tile::BITS] = eights.words[half];
    u32(&of_tile)[2][4] = weights[half / 2];
    of_tile[0][half % 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, 0>(words, grid[half]);
    of_tile[0][half % 2 + 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, 1>(words, grid[half]);
    of_tile[1][half % 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, 2>(words, grid[half]);
    of_tile[1][half % 2 + 2] = consecutive_weights<T, Tile::BITS, SCALE_SUMS, 3>(words, grid[half]);
  }
#pragma unroll
  for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile) {
    const int at = ByTokens::place(tile * 8 + lane / 4, quarter * 4 + lane % 4);
    const Vector x = *reinterpret_cast<const Vector*>(activations + at);
#pragma unroll
    for (int r = 0; r < Tile::ROW_TILES; ++r) {
      multiply_accumulate<T>(sums[r][tile], weights[r][0], x.x, x.y);
      multiply_accumulate<T>(sums[r][tile], weights[r][1], x.z, x.w);
    }
  }
}

// The outputs of a block whose warps have WARP_ROWS rows each, one after the other, when nothing reads its ring any
// more. A warp turns the sums of eight tokens after eight, [8, WARP_ROWS], so that lanes write rows next to each other.
template <typename T, typename Tile>
DEVICE void finish_sums(const Matmul& p, const Sums<Tile>& sums, int row0, int token0, int block_split, int thread) {
  constexpr int ROW_STRIDE = Tile::WARP_ROWS + 1;
  const int lane = thread % LANES, warp = thread / LANES, warp_row = warp * Tile::WARP_ROWS;
  float* turned = reinterpret_cast<float*>(shared_memory()) + warp * 8 * ROW_STRIDE;
#pragma unroll
  for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile) {
#pragma unroll
    for (int r = 0; r < Tile::ROW_TILES; ++r)
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

template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void tile_block(const Matmul& p, int block_row, int block_token, int block_split, int thread) {
  constexpr int ROW_TILES = Tile::ROW_TILES, STAGES = Tile::STAGES;
  const int lane = thread % LANES, warp = thread / LANES, warp_row = warp * Tile::WARP_ROWS;
  const int row0 = block_row * Tile::ROWS, token0 = block_token * Tile::TOKENS;
  const int begin = block_split * p.split, end = min(p.k, begin + p.split);

  const auto start_step = [&](int stage, int k) {
    start_stage<ByTokens, Tile>(p, stage, row0, token0, k, k < end, thread);
  };
  const Rows<Tile::BITS> rows(p, row0);
  const auto read_grid = [&](u32(&grid)[2 * ROW_TILES], int group) { rows.read_all(grid, warp_row + lane / 4, group); };

#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) start_step(s, begin + s * STEP);
  Sums<Tile> sums = {};
  u32 next[2 * ROW_TILES];
  int group = begin >> p.log2_block, stage = 0;
  read_grid(next, group);
#pragma unroll 1
  for (int k = begin; k < end; k += STEP) {
    const u8* from = shared_memory() + stage * Tile::STAGE_BYTES;
    const u8* x = from + Tile::WEIGHT_BYTES;
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    start_step(stage ? stage - 1 : STAGES - 1, k + (STAGES - 1) * STEP);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    Sums<Tile> part = {};
    u32 grid[2 * ROW_TILES];
#pragma unroll 1
    for (int quarter = 0; quarter < STEP / CHUNK; ++quarter) {
      Eights<Tile> eights;
#pragma unroll
      for (int half = 0; half < 2 * ROW_TILES; ++half) {
        const int row = warp_row + half * 8 + lane / 4, eight = quarter * 4 + lane % 4;
        read_eight<Tile::BITS>(from + row * (16 * Tile::BITS), eight ^ ByEights<Tile::BITS>::swap(row),
                               eights.words[half]);
        grid[half] = next[half];
      }
      // The grid of another group is read before the products that come before it.
      const int next_group = (k + (quarter + 1) * CHUNK) >> p.log2_block;
      if (next_group != group) read_grid(next, group = next_group);
      multiply_eights<T, Tile, SCALE_SUMS>(SCALE_SUMS ? part : sums, eights, grid, x, quarter, lane);
    }
    if constexpr (SCALE_SUMS) add_scaled<T, Tile>(sums, part, grid);
  }
  wait_for_copies<0>();
  __syncthreads();
  finish_sums<T, Tile>(p, sums, row0, token0, block_split, thread);
}
