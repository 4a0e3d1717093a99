// Weights as 16-bit floats, for products with so many tokens that they are torch's.
#pragma once

#include "tiles.cuh"

constexpr int EIGHT = 8;           // codes of a thread, in each of its rows
constexpr int ROWS_OF_THREAD = 4;  // at the same columns: their reads are under way together

// y[N, K] = dequant(B), eight columns of some rows a thread. Sizes m, slice, split, across and ahead mean nothing here.
template <typename T, int BITS>
DEVICE void dequantize_thread(const Matmul& p, int index, i64 first_row) {
  const int column = index * EIGHT;
  if (column >= p.k) return;
  const Rows<BITS> rows(p, first_row);
  u32 words[ROWS_OF_THREAD][BITS] = {}, grid[ROWS_OF_THREAD];
#pragma unroll
  for (int r = 0; r < ROWS_OF_THREAD; ++r) {
    const i64 row = min(first_row + r, static_cast<i64>(p.n) - 1);
    read_eight<BITS>(p.b + row * p.chunks * (4 * BITS), index, words[r]);
    grid[r] = rows.read(r, column >> p.log2_block);
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
