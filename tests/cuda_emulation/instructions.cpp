// Arithmetic of 16-bit floats, and the product of a warp: in a file of their own, which is compiled once and optimized.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "device.cuh"

namespace {

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
const std::vector<double> DECODED = [] {
  std::vector<double> all(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i] = decode<T>(static_cast<u16>(i));
  return all;
}();

template <typename T>
double to_double(u16 bits) {
  return DECODED<T>[bits];
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

}  // namespace

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

u32 pack_bfloat16(float low, float high) {
  return from_double<BFloat16>(low) | static_cast<u32>(from_double<BFloat16>(high)) << 16;
}

// Each lane computes its own outputs by the map of the PTX manual.
template <typename T>
void multiply_accumulate(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  const u32* operands = exchange({a[0], a[1], a[2], a[3], b0, b1});
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = t * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      const u32 of_a = operands[(row % 8 * 4 + k % 8 / 2) * 6 + row / 8 + k / 8 * 2];
      const u32 of_b = operands[(column * 4 + k % 8 / 2) * 6 + 4 + k / 8];
      sum += to_double<T>(static_cast<u16>(of_a >> k % 2 * 16)) * to_double<T>(static_cast<u16>(of_b >> k % 2 * 16));
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
}

// Each lane computes its own outputs by the maps of the PTX manual: of the fragments of a and d, and of the swizzled b.
template <typename T, int TOKENS>
void multiply_warpgroup(const Product& self, const u8* memory) {
  const auto field = [&](int begin, int bits) { return static_cast<u32>(self.b >> begin & ((u64{1} << bits) - 1)); };
  const u32 start = field(0, 14) << 4, stride = field(32, 14) << 4;
  if (field(62, 2) != 1 || field(49, 3) != 0) throw std::runtime_error("b is not swizzled by 128 bytes from a multiple of 1 KiB");
  const auto at = [&](u32 token, u32 k) {
    const u32 address = start + token / 8 * stride + token % 8 * 128 + k * 2;
    u16 bits;
    std::memcpy(&bits, memory + (address ^ (address >> 7 & 7) << 4), 2);
    return to_double<T>(bits);
  };
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  const u32* operands = exchange({self.a[0], self.a[1], self.a[2], self.a[3], 0, 0});
  double a[2][16];  // rows g and g + 8
  for (int i = 0; i < 32; ++i) {
    const int half = i / 16, k = i % 16;
    const u32 pair = operands[(g * 4 + k % 8 / 2) * 6 + half + k / 8 * 2];
    a[half][k] = to_double<T>(static_cast<u16>(pair >> k % 2 * 16));
  }
  for (int i = 0; i < TOKENS / 2; ++i) {
    const int token = i / 4 * 8 + t * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * at(token, k);
    self.d[i] = static_cast<float>(self.d[i] + sum);
  }
}

#define INSTRUCTIONS(T)                \
  template u32 fma2<T>(u32, u32, u32); \
  template float to_float<T>(u16);     \
  template u16 from_float<T>(float);   \
  template void multiply_accumulate<T>(float (&)[4], const u32 (&)[4], u32, u32); \
  template void multiply_warpgroup<T, 32>(const Product&, const u8*); \
  template void multiply_warpgroup<T, 64>(const Product&, const u8*); \
  template void multiply_warpgroup<T, 128>(const Product&, const u8*); \
  template void multiply_warpgroup<T, 256>(const Product&, const u8*);
INSTRUCTIONS(Float16)
INSTRUCTIONS(BFloat16)
