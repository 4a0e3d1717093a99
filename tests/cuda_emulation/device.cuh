// The twin of kernels/device.cuh for a CPU: the same functions, so that the kernels run as they are, a block at a time.
//
// Each thread of a block is a fiber; it runs until it waits for others. What a GPU does behind a thread's back is kept
// as strict as the manual has it: copies arrive when they are waited for and not before, and shared memory begins as
// not-a-number.
#ifndef TEQ_GRAPH_DEVICE_CUH
#define TEQ_GRAPH_DEVICE_CUH

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "types.cuh"

#define DEVICE inline

// ------------------------------------------------------------------------------------------------ the block (block.cpp)

u8* shared_memory();
// Waits for the block's, or the warp's, other threads.
void __syncthreads();
void __syncwarp();
// Memory that the lanes of a warp share for one instruction.
u32* warp_exchange();
int lane_of_thread();

void start_copy(void* to, const void* from, int bytes, bool valid);
void commit_copies();
void wait_until_pending(int groups);

using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------------- instructions

inline u32 mask_or(u32 a, u32 mask, u32 with) { return (a & mask) | with; }

inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

inline float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// 16-bit floats by their definition: sign, exponent, mantissa; ties to even. Computed in double, which holds products
// and the sums that occur here exactly.
template <typename T>
double decode(u16 bits) {
  constexpr int mantissa = T::MANTISSA, bias = T::BIAS, top = 2 * bias + 1;
  const int exponent = bits >> mantissa & top, fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

template <typename T>
double to_double(u16 bits) {
  static const std::vector<double> values = [] {
    std::vector<double> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = decode<T>(static_cast<u16>(i));
    return all;
  }();
  return values[bits];
}

template <typename T>
u16 from_double(double value) {
  constexpr int mantissa = T::MANTISSA, bias = T::BIAS;
  const u16 sign = std::signbit(value) ? 0x8000 : 0, infinity = static_cast<u16>((2 * bias + 1) << mantissa);
  if (std::isnan(value)) return 0x7FFF;
  int exponent = 1 - bias;  // that of subnormal numbers
  if (value != 0.0) exponent = max(exponent, std::ilogb(value));
  const int ulp = exponent - mantissa;
  const double steps = std::nearbyint(std::ldexp(std::fabs(value), -ulp));
  if (!(std::ldexp(steps, ulp) < std::ldexp(1.0, bias + 1))) return sign | infinity;
  // Steps count from 2^mantissa, but for subnormal numbers; a carry into the exponent adds up as it should.
  return static_cast<u16>(sign | (static_cast<int>(steps) + ((exponent + bias - 1) << mantissa)));
}

template <typename T>
u32 fma2(u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int half = 0; half < 32; half += 16) {
    const auto at = [half](u32 pair) { return to_double<T>(static_cast<u16>(pair >> half)); };
    result |= static_cast<u32>(from_double<T>(std::fma(at(a), at(b), at(c)))) << half;
  }
  return result;
}

template <typename T>
float to_float(u16 bits) {
  return static_cast<float>(to_double<T>(bits));
}

template <typename T>
u16 from_float(float value) {
  return from_double<T>(value);
}

inline u32 pack_bfloat16(float low, float high) {
  return from_double<BFloat16>(low) | static_cast<u32>(from_double<BFloat16>(high)) << 16;
}

// Lanes put their operands where the warp sees them; each then computes its own outputs by the map of the PTX manual.
template <typename T>
void multiply_accumulate(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u32* exchange = warp_exchange();
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  const u32 own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(exchange + lane * 6, own, sizeof own);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = t * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      const u32 of_a = exchange[(row % 8 * 4 + k % 8 / 2) * 6 + row / 8 + k / 8 * 2];
      const u32 of_b = exchange[(column * 4 + k % 8 / 2) * 6 + 4 + k / 8];
      sum += to_double<T>(static_cast<u16>(of_a >> k % 2 * 16)) * to_double<T>(static_cast<u16>(of_b >> k % 2 * 16));
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
  __syncwarp();
}

template <int BYTES>
void copy_async(void* to, const void* from, bool valid) {
  start_copy(to, from, BYTES, valid);
}

template <int PENDING>
void wait_for_copies() {
  wait_until_pending(PENDING);
}

#endif
