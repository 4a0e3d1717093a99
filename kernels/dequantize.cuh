// Weights as 16-bit floats, for products with so many tokens that they are torch's.
#pragma once

#include "tiles.cuh"

constexpr int ROWS_OF_THREAD = 4;  // at the same columns: their reads are under way together
constexpr int COLUMNS_OF_THREAD = 8;

// The codes `index` * 8 .. + 8 of a row that begins at `row`, in the first words.
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

// y[N, K] = dequant(B), eight columns of some rows a thread. Sizes m, slice, split, across and ahead mean nothing here.
template <typename T, int BITS>
DEVICE void dequantize_thread(const Matmul& p, int index, i64 first_row) {
  const int column = index * COLUMNS_OF_THREAD;
  if (column >= p.k) return;
  u32 words[ROWS_OF_THREAD][BITS] = {}, grid[ROWS_OF_THREAD];
#pragma unroll
  for (int r = 0; r < ROWS_OF_THREAD; ++r) {
    const i64 row = min(first_row + r, static_cast<i64>(p.n) - 1);
    read_eight<BITS>(p.b + row * p.chunks * (4 * BITS), index, words[r]);
    grid[r] = grid_of_row<BITS>(p, row, column >> p.log2_block);
  }
#pragma unroll
  for (int r = 0; r < ROWS_OF_THREAD; ++r) {
    if (first_row + r >= p.n) return;
    const Vector weights = {
        consecutive_weights<T, BITS, false, 0>(words[r], grid[r]), consecutive_weights<T, BITS, false, 1>(words[r], grid[r]),
        consecutive_weights<T, BITS, false, 2>(words[r], grid[r]), consecutive_weights<T, BITS, false, 3>(words[r], grid[r])};
    *reinterpret_cast<Vector*>(p.y + (first_row + r) * p.k + column) = weights;
  }
}
