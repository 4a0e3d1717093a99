// A product with few tokens as a stream of weights: blocks that stay, each walking through tiles of rows of B one after
// another. Every warp has its own ring of copies, which runs on over the ends of tiles, so that memory is never idle.
#pragma once

#include "matmul_nbits.cuh"

// How a block's work is cut up: its warps share 16 * ROW_TILES rows of B and take turns over K.
template <int BITS_, int TOKENS_, int ROW_TILES_, int WARPS_, int STAGES_, int BLOCKS_>
struct StreamTiling {
  static constexpr int BITS = BITS_;
  static constexpr int TOKENS = TOKENS_;        // rows of A; in tiles of 8
  static constexpr int ROW_TILES = ROW_TILES_;  // tiles of 16 rows of B
  static constexpr int WARPS = WARPS_;          // over K
  static constexpr int STAGES = STAGES_;        // steps of a warp that are on their way
  static constexpr int BLOCKS = BLOCKS_;  // on a multiprocessor
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr int ROWS = 16 * ROW_TILES;
  static constexpr int THREADS = LANES * WARPS;
  static constexpr int ROUND = STEP * WARPS;
  static constexpr int STEP_BYTES = ROWS * STEP * BITS / 8;
  static constexpr int PIECES = STEP_BYTES / 16;  // BITS of each row

  // Shared memory: RING, then SUMS of two tiles, then a grid for each tile under way, then activations.
  static constexpr int RING = STAGES * STEP_BYTES * WARPS;
  static constexpr int SUMS = 2 * WARPS * TOKENS * (ROWS + 1) * 4;
};

// Where the 16 bytes `piece` of a row of a step are in shared memory: in the order of memory, in which lanes that read
// chunks have banks of their own. (Of 8 bits they would not: bytes go by tiles.cuh, also with one token.)
template <int BITS>
struct ByChunks {
  static_assert(BITS != 8);
  DEVICE static int place(int row, int piece) { return (row * BITS + piece) * 16; }
};

// Starts the copies of a step by the threads of a group: 128 columns of ROWS rows from `from` on, of which `rows` are
// there. `row_bytes`: of a row of B.
template <typename Order, int BITS, int ROWS, int THREADS>
DEVICE void start_weights(u8* stage, const u8* from, int row_bytes, int rows, int thread) {
  constexpr int PIECES = ROWS * BITS;
  if constexpr (THREADS % BITS == 0) {
    // A thread has the same piece of rows THREADS / BITS apart.
    const int piece = thread % BITS;
    from += thread / BITS * row_bytes + piece * 16;
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS, from += THREADS / BITS * row_bytes) {
      const int row = thread / BITS + i / BITS;
      if (PIECES % THREADS == 0 || i + thread < PIECES)
        copy_async<16>(stage + Order::place(row, piece), from, row < rows);
    }
  } else {
#pragma unroll
    for (int i = 0; i < PIECES; i += THREADS) {
      const int at = i + thread, row = at / BITS, piece = at % BITS;
      if (PIECES % THREADS == 0 || at < PIECES)
        copy_async<16>(stage + Order::place(row, piece), from + row * row_bytes + piece * 16, row < rows);
    }
  }
}

// The words of chunk `t` of a row of a step.
template <int BITS>
DEVICE void read_words(const u8* stage, int row, int t, u32 (&words)[BITS]) {
  if constexpr (BITS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 4) {
      const Vector v = *reinterpret_cast<const Vector*>(stage + (row * 4 + t) * (4 * BITS) + i * 4);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else if constexpr (BITS == 2) {
    const ShortVector v = *reinterpret_cast<const ShortVector*>(stage + (row * 4 + t) * 8);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int w = 0; w < BITS; ++w) words[w] = *reinterpret_cast<const u32*>(stage + ((row * 4 + t) * BITS + w) * 4);
  }
}

DEVICE int whole_vectors(int bytes) { return (bytes + 15) / 16 * 16; }

// Starts the copies of `bytes` consecutive bytes, of which `there` exist, by the threads of a block.
DEVICE void start_bytes(u8* to, const u8* from, int bytes, i64 there, int thread, int threads) {
  for (int i = thread * 16; i < bytes; i += threads * 16) {
    const int some = static_cast<int>(max(i64{0}, min(i64{16}, there - i)));
    copy_some_async(to + i, some ? from + i : from, some);
  }
}

// Scales and zero points of a tile of rows as they are stored: of all its groups, as rows follow each other.
template <typename Tile>
struct Grid {
  int scale_bytes, zero_row, zero_bytes;  // of a tile, of a row's zero points, and of a tile's

  DEVICE explicit Grid(const Matmul& p)
      : scale_bytes(whole_vectors(Tile::ROWS * p.blocks * 2)),
        zero_row((p.blocks * Tile::BITS + 7) / 8),
        zero_bytes(p.zero_points ? whole_vectors(Tile::ROWS * zero_row) : 0) {}

  DEVICE int bytes() const { return scale_bytes + zero_bytes; }

  DEVICE void start(const Matmul& p, u8* to, int row0, int thread) const {
    const i64 row = row0, rows = max(i64{0}, p.n - row);
    const u8* scales = reinterpret_cast<const u8*>(p.scales + (rows ? row * p.blocks : 0));
    start_bytes(to, scales, scale_bytes, rows * p.blocks * 2, thread, Tile::THREADS);
    if (p.zero_points)
      start_bytes(to + scale_bytes, p.zero_points + (rows ? row * zero_row : 0), zero_bytes, rows * zero_row, thread,
                  Tile::THREADS);
  }

  // A word: the scale in the upper, the zero point as a float in the lower half.
  template <typename T>
  DEVICE u32 read(const Matmul& p, const u8* at, int row, int group) const {
    const u32 scale = reinterpret_cast<const u16*>(at)[row * p.blocks + group];
    u32 zero = 1u << (Tile::BITS - 1);
    if (p.zero_points) zero = code_at<Tile::BITS>(at + scale_bytes + row * zero_row, zero_row, group);
    return scale << 16 | float_of_code<T, Tile::BITS>(zero);
  }
};

// A tile of rows after the other; `block_row` is the first, p.across the number of blocks side by side.
template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void stream_block(const Matmul& p, int block_row, int block_token, int block_split, int thread) {
  constexpr int ROW_TILES = Tile::ROW_TILES, TOKEN_TILES = Tile::TOKEN_TILES, WARPS = Tile::WARPS;
  static_assert(Tile::ROWS == LANES, "a row for each lane");
  const int lane = thread % LANES, warp = thread / LANES;
  const int tiles = (p.n + Tile::ROWS - 1) / Tile::ROWS;
  const int token0 = block_token * Tile::TOKENS, tokens = min(Tile::TOKENS, p.m - token0);
  const int begin = block_split * p.split, end = min(p.k, begin + p.split);
  const int first_k = begin + warp * STEP;
  const int stride = p.slice * 2 + 64;  // an odd number of half rows of banks: rows of even and odd g differ
  const Grid<Tile> grid(p);

  u8* ring = shared_memory() + warp * Tile::STAGES * Tile::STEP_BYTES;
  float* totals = reinterpret_cast<float*>(shared_memory() + Tile::RING);
  u8* grids = shared_memory() + Tile::RING + Tile::SUMS;
  u8* activations = grids + (p.ahead + 1) * grid.bytes();

  // Grids come p.ahead tiles before their use: so many that they have arrived when their tile begins.
  for (int i = 0; i < p.ahead; ++i)
    grid.start(p, grids + i * grid.bytes(), (block_row + i * p.across) * Tile::ROWS, thread);
  const int row_bytes = p.chunks * (4 * Tile::BITS);
  int tile_wanted, k_wanted, rows_wanted;
  const u8* wanted;
  const auto begin_tile = [&](int tile) {
    tile_wanted = tile, k_wanted = first_k, rows_wanted = p.n - tile * Tile::ROWS;
    wanted = p.b + (rows_wanted > 0 ? static_cast<i64>(tile) * Tile::ROWS * row_bytes + first_k / 8 * Tile::BITS : 0);
  };
  const auto start_step = [&](int stage) {
    start_weights<ByChunks<Tile::BITS>, Tile::BITS, Tile::ROWS, LANES>(
        ring + stage * Tile::STEP_BYTES, wanted, row_bytes, rows_wanted, lane);
    commit_copies();
    k_wanted += Tile::ROUND, wanted += Tile::ROUND / 8 * Tile::BITS;
    if (k_wanted >= end) begin_tile(tile_wanted + p.across);
  };
  begin_tile(block_row);
#pragma unroll 1
  for (int s = 0; s < Tile::STAGES; ++s) start_step(s);
  stage_activations<Tile>(p, activations, stride, token0, tokens, begin, thread);
  wait_for_copies<Tile::STAGES - 1>();
  __syncthreads();

  int stage = 0, slot = 0;
  for (int tile = block_row, parity = 0; tile < tiles; tile += p.across, parity ^= 1) {
    const int row0 = tile * Tile::ROWS;
    const int behind = slot ? slot - 1 : p.ahead;  // the slot of the tile before, which all have finished
    grid.start(p, grids + behind * grid.bytes(), row0 + p.ahead * p.across * Tile::ROWS, thread);
    const u8* tile_grid = grids + slot * grid.bytes();
    Sums<Tile> sums = {};
#pragma unroll 1
    for (int k = first_k; k < end; k += Tile::ROUND) {
      const u8* from = ring + stage * Tile::STEP_BYTES;
      Chunks<Tile> chunks;
      wait_for_copies<Tile::STAGES - 1>();
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2 * ROW_TILES; ++half) {
        read_words<Tile::BITS>(from, half * 8 + lane / 4, lane % 4, chunks.words[half]);
        align_halves<Tile::BITS>(chunks.words[half]);
      }
      if constexpr (SCALE_SUMS) {  // a lane reads the word of a row, and those of its own from other lanes
        const u32 of_row = grid.template read<T>(p, tile_grid, lane, k >> p.log2_block);
#pragma unroll
        for (int half = 0; half < 2 * ROW_TILES; ++half) chunks.grid[half] = shuffle(of_row, half * 8 + lane / 4);
      } else {
        const int group = min((k + lane % 4 * CHUNK) >> p.log2_block, p.blocks - 1);
#pragma unroll
        for (int half = 0; half < 2 * ROW_TILES; ++half)
          chunks.grid[half] = grid.template read<T>(p, tile_grid, half * 8 + lane / 4, group);
      }
      __syncwarp();
      start_step(stage);
      stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;

      const u8* x = activations + (k - begin) * 2;
      if constexpr (SCALE_SUMS) {
        Sums<Tile> part = {};
        multiply_step<T, Tile, SCALE_SUMS>(part, chunks, x, stride, tokens, lane);
        add_scaled<T, Tile>(sums, part, chunks.grid);
      } else {
        multiply_step<T, Tile, SCALE_SUMS>(sums, chunks, x, stride, tokens, lane);
      }
    }

    // The warps' sums meet in one of two places, [WARPS, TOKENS, ROWS]: who writes to one again has met, at the
    // barrier between, all who read it. Each thread finishes some outputs.
    float* places = totals + parity * (Tile::SUMS / 8);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = r * 16 + lane / 4 + i / 2 * 8, token = t * 8 + lane % 4 * 2 + i % 2;
          if (token < tokens) places[(warp * Tile::TOKENS + token) * (Tile::ROWS + 1) + row] = sums[r][t][i];
        }
    __syncthreads();
    for (int i = thread; i < tokens * Tile::ROWS; i += Tile::THREADS) {
      const int token = i / Tile::ROWS, local = i % Tile::ROWS;
      if (row0 + local >= p.n) continue;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total += places[(w * Tile::TOKENS + token) * (Tile::ROWS + 1) + local];
      finish_output<T>(p, token0 + token, row0 + local, block_split, total);
    }
    slot = slot == p.ahead ? 0 : slot + 1;
  }
}
