// Types that a GPU and its emulation share.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// 16-bit floats: a sign, an exponent that counts from -BIAS, and so many bits of mantissa.
struct Float16 {
  static constexpr int MANTISSA = 10, BIAS = 15;
};
struct BFloat16 {
  static constexpr int MANTISSA = 7, BIAS = 127;
};

template <typename T>
constexpr bool IS_FLOAT16 = T::MANTISSA == Float16::MANTISSA;

struct alignas(16) Vector {
  u32 x, y, z, w;
};
struct alignas(8) ShortVector {
  u32 x, y;
};
