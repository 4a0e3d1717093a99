// Y[M, N] = A[M, K] dequant(B)^T + bias, B in the storage of MatMulNBits. README.md has the map of a block's work.
#pragma once

#include "codes.cuh"

// The members are the kernels' parameters, in their order: parameters.py lists them for the host.
struct Matmul {
  const u16* a;            // [M, K] of T, rows of whole 16-byte vectors
  const u8* b;             // [N, blocks * block_size * BITS / 8], rows of whole chunks
  const u16* scales;       // [N, blocks] of T
  const u8* zero_points;   // [N, ceil(blocks * BITS / 8)], or null for 2^(BITS - 1)
  const u16* bias;         // [N] of T, or null
  u16* y;                  // [M, N] of T
  float* partial;          // [splits, M, N], or null where one block does all of K
  int m, n, k;
  int blocks, log2_block;  // per row; a row of one block has log2_block 30
  int chunks;              // stored chunks of a row
  int slice;               // elements of K whose activations are in shared memory at once, whole rounds of the warps
  int split;               // elements of K a block does, whole rounds of the warps; blockIdx.z says which
  int across, ahead;       // blocks over rows of B where they stay; tiles of rows whose grids are on their way
};

constexpr int LANES = 32;
constexpr int STEP = 128;  // elements of K a warp does at a time: a chunk for each of the four lanes of a row

// How a block's work is cut up.
template <int BITS_, int TOKENS_, int ROW_TILES_, int WARPS_N_, int WARPS_K_>
struct Tiling {
  static constexpr int BITS = BITS_;
  static constexpr int TOKENS = TOKENS_;        // rows of A; in tiles of 8
  static constexpr int ROW_TILES = ROW_TILES_;  // tiles of 16 rows of B in a warp
  static constexpr int WARPS_N = WARPS_N_;      // warps side by side over rows of B
  static constexpr int WARPS_K = WARPS_K_;      // warps that share rows and take turns over K
  static constexpr int TOKEN_TILES = TOKENS / 8;
  static constexpr int ROWS = 16 * ROW_TILES * WARPS_N;
  static constexpr int THREADS = LANES * WARPS_N * WARPS_K;
  static constexpr int ROUND = STEP * WARPS_K;
  static constexpr int BLOCKS = 1;

  // Copies of B under way: some 4 KiB for each warp, in its own part of shared memory, of each lane its own vectors.
  static constexpr int STEP_BYTES = ROW_TILES * 16 * STEP * BITS / 8;
  static constexpr int STAGES = 4096 / STEP_BYTES < 2 ? 2 : 4096 / STEP_BYTES;
  static constexpr int COPY = BITS == 3 ? 4 : BITS == 2 ? 8 : 16;  // bytes: rows begin at multiples of it
  static constexpr int COPIES = 4 * BITS / COPY;
  static constexpr int RING = STAGES * STEP_BYTES * WARPS_N * WARPS_K;

  // Shared memory: RING, then activations, then a word for each row and group; sums reuse it all in the end.
  static constexpr int SUMS = WARPS_K * TOKENS * (ROWS + 1) * 4;
};

// A word of shared memory for a row and group: the scale in the upper, the zero point in the lower half.
DEVICE u32 both_low(u32 word) { return permute_bytes(word, 0, 0x1010); }
DEVICE u32 both_high(u32 word) { return permute_bytes(word, 0, 0x3232); }

// Activations of tokens token0.. and elements k0 .. k0 + p.slice of K into shared memory, in the order of pairs:
// row r, step s, then of the j-th four pairs of a chunk those of all four lanes, as lanes read them together.
template <typename Tile>
DEVICE void stage_activations(const Matmul& p, u8* to, int stride, int token0, int tokens, int k0, int thread) {
  const int chunks = p.slice / CHUNK;
  for (int i = thread; i < tokens * chunks; i += Tile::THREADS) {
    const int row = i / chunks, chunk = i % chunks, k = k0 + chunk * CHUNK;
    const u16* from = p.a + static_cast<i64>(token0 + row) * p.k + k;
    u32 x[PAIRS], pairs[PAIRS];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const bool inside = k + v * 8 < p.k;
      const Vector vector = inside ? *reinterpret_cast<const Vector*>(from + v * 8) : Vector{0, 0, 0, 0};
      x[v * 4] = vector.x, x[v * 4 + 1] = vector.y, x[v * 4 + 2] = vector.z, x[v * 4 + 3] = vector.w;
    }
    arrange_activations<Tile::BITS>(x, pairs);
    u8* target = to + row * stride + chunk / 4 * (STEP * 2) + chunk % 4 * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<Vector*>(target + j * 64) =
          Vector{pairs[j * 4], pairs[j * 4 + 1], pairs[j * 4 + 2], pairs[j * 4 + 3]};
  }
}

// Scales and zero points of the block's rows and the groups from `group0` on into shared memory, [groups, ROWS].
template <typename T, typename Tile>
DEVICE void stage_grid(const Matmul& p, u32* to, int row0, int group0, int groups, int thread) {
  const int zero_bytes = (p.blocks * Tile::BITS + 7) / 8;
  for (int i = thread; i < groups * Tile::ROWS; i += Tile::THREADS) {
    const int group = group0 + i % groups, local = i / groups;
    const i64 row = row0 + local;
    u32 word = 0;
    if (row < p.n && group < p.blocks) {
      u32 zero = 1u << (Tile::BITS - 1);
      if (p.zero_points) zero = code_at<Tile::BITS>(p.zero_points + row * zero_bytes, zero_bytes, group);
      word = static_cast<u32>(p.scales[row * p.blocks + group]) << 16 | from_float<T>(static_cast<float>(zero));
    }
    to[i % groups * Tile::ROWS + local] = word;
  }
}

// Starts the copies of a lane's chunks of one step: rows row0 + g and row0 + g + 8 of each tile, chunk k / CHUNK + t.
template <typename Tile>
DEVICE void start_step(const Matmul& p, u8* stage, i64 row0, int k, bool wanted, int lane) {
  const int chunk = k / CHUNK + lane % 4;
#pragma unroll
  for (int half = 0; half < 2 * Tile::ROW_TILES; ++half) {
    const i64 row = row0 + half * 8 + lane / 4;
    const bool inside = wanted && row < p.n && chunk < p.chunks;
    const u8* from = p.b + (inside ? (row * p.chunks + chunk) * (4 * Tile::BITS) : 0);
#pragma unroll
    for (int c = 0; c < Tile::COPIES; ++c)
      copy_async<Tile::COPY>(stage + ((half * Tile::COPIES + c) * LANES + lane) * Tile::COPY, from + c * Tile::COPY,
                             inside);
  }
  commit_copies();
}

// The words of a lane's chunk that `start_step` brought.
template <typename Tile>
DEVICE void read_chunk(const u8* stage, int half, int lane, u32 (&words)[Tile::BITS]) {
#pragma unroll
  for (int w = 0; w < Tile::BITS; ++w) {
    const int c = w * 4 / Tile::COPY, within = w * 4 % Tile::COPY;
    words[w] = *reinterpret_cast<const u32*>(stage + ((half * Tile::COPIES + c) * LANES + lane) * Tile::COPY + within);
  }
}

template <typename Tile>
using Sums = float[Tile::ROW_TILES][Tile::TOKEN_TILES][4];

// What a lane has of a step: chunks of the rows g and g + 8 of each tile, and their scales and zero points.
template <typename Tile>
struct Chunks {
  u32 words[2 * Tile::ROW_TILES][Tile::BITS];
  u32 grid[2 * Tile::ROW_TILES];
};

// Pair P of a chunk as weights, without their scale where that multiplies sums.
template <typename T, typename Tile, bool SCALE_SUMS, int P>
DEVICE u32 weight_pair(const u32 (&words)[Tile::BITS], u32 grid) {
  const u32 centered = centered_pair<T, Tile::BITS, P>(words, both_low(grid));
  if constexpr (SCALE_SUMS) return centered;
  return fma2<T>(centered, both_high(grid), both(0x8000u));  // + -0: a product
}

// The two products that the J-th four pairs of each chunk make.
template <typename T, typename Tile, bool SCALE_SUMS, int J>
DEVICE void multiply_quarter(Sums<Tile>& sums, const Chunks<Tile>& chunks, const u8* activations, int stride,
                             int tokens, int lane) {
  u32 weights[Tile::ROW_TILES][2][4];
#pragma unroll
  for (int half = 0; half < 2 * Tile::ROW_TILES; ++half) {
    const u32(&words)[Tile::BITS] = chunks.words[half];
    u32(&of_tile)[2][4] = weights[half / 2];
    of_tile[0][half % 2] = weight_pair<T, Tile, SCALE_SUMS, J * 4>(words, chunks.grid[half]);
    of_tile[0][half % 2 + 2] = weight_pair<T, Tile, SCALE_SUMS, J * 4 + 1>(words, chunks.grid[half]);
    of_tile[1][half % 2] = weight_pair<T, Tile, SCALE_SUMS, J * 4 + 2>(words, chunks.grid[half]);
    of_tile[1][half % 2 + 2] = weight_pair<T, Tile, SCALE_SUMS, J * 4 + 3>(words, chunks.grid[half]);
  }
#pragma unroll
  for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile) {
    const int token = min(tile * 8 + lane / 4, tokens - 1);  // nobody reads the sums of a token too many
    const Vector x = *reinterpret_cast<const Vector*>(activations + token * stride + J * 64 + lane % 4 * 16);
#pragma unroll
    for (int r = 0; r < Tile::ROW_TILES; ++r) {
      multiply_accumulate<T>(sums[r][tile], weights[r][0], x.x, x.y);
      multiply_accumulate<T>(sums[r][tile], weights[r][1], x.z, x.w);
    }
  }
}

template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void multiply_step(Sums<Tile>& sums, const Chunks<Tile>& chunks, const u8* activations, int stride, int tokens,
                          int lane) {
  multiply_quarter<T, Tile, SCALE_SUMS, 0>(sums, chunks, activations, stride, tokens, lane);
  multiply_quarter<T, Tile, SCALE_SUMS, 1>(sums, chunks, activations, stride, tokens, lane);
  multiply_quarter<T, Tile, SCALE_SUMS, 2>(sums, chunks, activations, stride, tokens, lane);
  multiply_quarter<T, Tile, SCALE_SUMS, 3>(sums, chunks, activations, stride, tokens, lane);
}

// sums += part * scale of its row
template <typename T, typename Tile>
DEVICE void add_scaled(Sums<Tile>& sums, const Sums<Tile>& part, const u32 (&grid)[2 * Tile::ROW_TILES]) {
#pragma unroll
  for (int r = 0; r < Tile::ROW_TILES; ++r) {
    const float low = to_float<T>(static_cast<u16>(grid[r * 2] >> 16));
    const float high = to_float<T>(static_cast<u16>(grid[r * 2 + 1] >> 16));
#pragma unroll
    for (int tile = 0; tile < Tile::TOKEN_TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][tile][i] += part[r][tile][i] * (i < 2 ? low : high);
  }
}

// An output of this block: y, with its bias, or its part of it where K is split.
template <typename T>
DEVICE void finish_output(const Matmul& p, int token, i64 row, int split, float total) {
  const i64 at = static_cast<i64>(token) * p.n + row;
  if (p.partial) {
    p.partial[static_cast<i64>(split) * p.m * p.n + at] = total;
  } else {
    if (p.bias) total += to_float<T>(p.bias[row]);
    p.y[at] = from_float<T>(total);
  }
}

// SCALE_SUMS: a step lies in one group, whose scale multiplies its sums; otherwise each chunk does, and scales
// multiply weights.
template <typename T, typename Tile, bool SCALE_SUMS>
DEVICE void matmul_block(const Matmul& p, int block_row, int block_token, int block_split, int thread) {
  constexpr int ROW_TILES = Tile::ROW_TILES, TOKEN_TILES = Tile::TOKEN_TILES, WARPS_K = Tile::WARPS_K;
  const int lane = thread % LANES, warp = thread / LANES, warp_n = warp / WARPS_K, warp_k = warp % WARPS_K;
  const i64 row0 = static_cast<i64>(block_row) * Tile::ROWS;
  const i64 warp_row = row0 + warp_n * ROW_TILES * 16;
  const int token0 = block_token * Tile::TOKENS;
  const int tokens = min(Tile::TOKENS, p.m - token0);
  const int begin = block_split * p.split;
  const int end = static_cast<int>(min(static_cast<i64>(p.k), static_cast<i64>(begin) + p.split));
  const int stride = p.slice * 2 + 64;  // an odd number of half rows of banks: rows of even and odd g differ
  const int slice_groups = ((p.slice - 1) >> p.log2_block) + 1;

  u8* ring = shared_memory() + warp * Tile::STAGES * Tile::STEP_BYTES;
  u8* activations = shared_memory() + Tile::RING;
  u32* grids = reinterpret_cast<u32*>(activations + min(Tile::TOKENS, p.m) * stride);

  Sums<Tile> sums = {};
  int k_wanted = begin + warp_k * STEP;
#pragma unroll
  for (int s = 0; s < Tile::STAGES; ++s, k_wanted += Tile::ROUND)
    start_step<Tile>(p, ring + s * Tile::STEP_BYTES, warp_row, k_wanted, k_wanted < end, lane);

  int stage = 0;
  for (int k0 = begin; k0 < end; k0 += p.slice) {
    const int group0 = k0 >> p.log2_block;
    __syncthreads();  // the slice before has been read
    stage_activations<Tile>(p, activations, stride, token0, tokens, k0, thread);
    stage_grid<T, Tile>(p, grids, static_cast<int>(row0), group0, slice_groups, thread);
    __syncthreads();
    const int k_end = min(k0 + p.slice, end);
    for (int k = k0 + warp_k * STEP; k < k_end; k += Tile::ROUND) {
      u8* from = ring + stage * Tile::STEP_BYTES;
      Chunks<Tile> chunks;
      const int group = ((SCALE_SUMS ? k : k + lane % 4 * CHUNK) >> p.log2_block) - group0;
      const u32* grid_rows = grids + group * Tile::ROWS + warp_n * ROW_TILES * 16 + lane / 4;
      wait_for_copies<Tile::STAGES - 1>();
#pragma unroll
      for (int half = 0; half < 2 * ROW_TILES; ++half) {
        read_chunk<Tile>(from, half, lane, chunks.words[half]);
        align_halves<Tile::BITS>(chunks.words[half]);
        chunks.grid[half] = grid_rows[half * 8];
      }
      __syncwarp();
      start_step<Tile>(p, from, warp_row, k_wanted, k_wanted < end, lane);
      k_wanted += Tile::ROUND;
      stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;

      const u8* x = activations + (k - k0) * 2;
      if constexpr (SCALE_SUMS) {
        Sums<Tile> part = {};
        multiply_step<T, Tile, SCALE_SUMS>(part, chunks, x, stride, tokens, lane);
        add_scaled<T, Tile>(sums, part, chunks.grid);
      } else {
        multiply_step<T, Tile, SCALE_SUMS>(sums, chunks, x, stride, tokens, lane);
      }
    }
  }

  // Sums of the warps over K meet in shared memory, [WARPS_K, TOKENS, ROWS]; then each thread finishes some outputs.
  constexpr int ROW_STRIDE = Tile::ROWS + 1;
  float* totals = reinterpret_cast<float*>(shared_memory());
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (warp_n * ROW_TILES + r) * 16 + lane / 4 + i / 2 * 8;
        const int token = tile * 8 + lane % 4 * 2 + i % 2;
        totals[(warp_k * Tile::TOKENS + token) * ROW_STRIDE + row] = sums[r][tile][i];
      }
  __syncthreads();
  for (int i = thread; i < tokens * Tile::ROWS; i += Tile::THREADS) {
    const int token = i / Tile::ROWS, local = i % Tile::ROWS;
    const i64 row = row0 + local;
    if (row >= p.n) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS_K; ++w) total += totals[(w * Tile::TOKENS + token) * ROW_STRIDE + local];
    finish_output<T>(p, token0 + token, row, block_split, total);
  }
}

// y = sum of the splits' partial products + bias, in the order of splits.
template <typename T>
DEVICE void reduce_output(const Matmul& p, int splits, i64 at) {
  if (at >= static_cast<i64>(p.m) * p.n) return;
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) total += p.partial[static_cast<i64>(s) * p.m * p.n + at];
  if (p.bias) total += to_float<T>(p.bias[at % p.n]);
  p.y[at] = from_float<T>(total);
}
