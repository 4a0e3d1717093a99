// Codes of 2, 3, 4 and 8 bits as MatMulNBits stores them, and how a thread turns them into pairs of 16-bit floats.
//
// A chunk is 32 consecutive codes of a row, BITS words. Its two halves' bit streams are read in step: a word of 16-bit
// halves holds the same bits of two streams, so one instruction takes a code from both. Pair p of a chunk is codes
//
//     first(p) and first(p) + DISTANCE,    p = 0 .. 15
//
//     bits  words of halves             DISTANCE  pairs in a word
//     2     w0 w1                       8         8
//     3     made by align_halves        16        16 over all three
//     4     w0 w1 w2 w3                 4         4
//     8     w0 .. w7                    2         2
//
// The order of k within a product is free, so the activations are laid out in this order of pairs.
#pragma once

#include "device.cuh"

constexpr int CHUNK = 32;
constexpr int PAIRS = CHUNK / 2;

template <int BITS>
constexpr int DISTANCE = BITS == 3 ? 16 : 16 / BITS;

// The lower code of pair `p`.
template <int BITS>
DEVICE constexpr int first(int p) {
  return p / DISTANCE<BITS> * 2 * DISTANCE<BITS> + p % DISTANCE<BITS>;
}

// The bits of 2^exponent.
template <typename T>
DEVICE constexpr u32 power_of_two(int exponent) {
  return static_cast<u32>(exponent + T::BIAS) << T::MANTISSA;
}

DEVICE constexpr u32 both(u32 half) { return half | half << 16; }

// A number that a code completes to a float, as its lowest bit is worth one: 2^10 in float16, 2^7 in bfloat16.
template <typename T>
constexpr u32 MAGIC = both(power_of_two<T>(T::MANTISSA));

// How far a code of 2, 4 or 8 bits that begins at bit `at` of its half is brought down to fit in the mantissa: by as
// few distinct shifts as there can be, as words shifted alike are shifted once, and to few distinct places, as each has
// an offset.
template <typename T, int BITS>
DEVICE constexpr int shift_of(int at) {
  if (IS_FLOAT16<T>) return at / 8 * 8;
  if (BITS == 4) return at;
  if (at + BITS <= T::MANTISSA) return 0;
  return at + BITS <= 12 ? 5 : 10;
}

// The words of a chunk as words of halves.
template <int BITS>
DEVICE void align_halves(u32 (&words)[BITS]) {
  if constexpr (BITS == 3) {  // bits 0..47 are the one stream, 48..95 the other
    const u32 w0 = words[0], w1 = words[1], w2 = words[2];
    words[0] = permute_bytes(w0, w1, 0x7610);
    words[1] = permute_bytes(w0, w2, 0x5432);
    words[2] = permute_bytes(w1, w2, 0x7610);
  }
}

// Where the codes of pair `p` begin in the halves that `window_of` gives.
template <typename T, int BITS>
DEVICE constexpr int place_of(int p) {
  if (BITS == 3) return p % (T::MANTISSA / BITS) * BITS;
  const int at = BITS * (p % DISTANCE<BITS>) % 16;
  return at - shift_of<T, BITS>(at);
}

// Halves that have the codes of pair P within a mantissa's length. Of 3 bits as many codes as there is room for come
// from one window, which begins at any byte of the two streams, so that no code is in two.
template <typename T, int BITS, int P>
DEVICE u32 window_of(const u32 (&words)[BITS]) {
  if constexpr (BITS == 3) {
    constexpr int bit = BITS * P - place_of<T, BITS>(P), byte = bit / 8, word = byte / 2;
    if constexpr (byte % 2 && word + 1 < BITS) return permute_bytes(words[word], words[word + 1], 0x6341) >> bit % 8;
    return words[word] >> bit % 16;
  } else {
    constexpr int bit = BITS * (P % DISTANCE<BITS>);
    return words[P / DISTANCE<BITS> + bit / 16] >> shift_of<T, BITS>(bit % 16);
  }
}

// code - zero of pair P as floats, exactly. `zero`: the zero point, in both halves; `words`: of halves.
template <typename T, int BITS, int P>
DEVICE u32 centered_pair(const u32 (&words)[BITS], u32 zero) {
  constexpr u32 SIGN = 0x8000u;
  if constexpr (BITS > T::MANTISSA) {
    // A byte is too long for this mantissa together with a magic number: by way of float32, 2^23 + code.
    constexpr int word = P / DISTANCE<BITS>, at = BITS * (P % DISTANCE<BITS>);
    const float offset = 8388608.0f + to_float<T>(static_cast<u16>(zero));
    const float low = as_float(permute_bytes(words[word], 0x4B000000u, 0x7440 + at / 8)) - offset;
    const float high = as_float(permute_bytes(words[word], 0x4B000000u, 0x7440 + at / 8 + 2)) - offset;
    return pack_bfloat16(low, high);
  } else {
    // magic + code * 2^s, of which 2^-s makes code + magic * 2^-s
    constexpr int s = place_of<T, BITS>(P);
    static_assert(s >= 0 && s + BITS <= T::MANTISSA, "the code is outside the mantissa");
    const u32 whole = mask_or(window_of<T, BITS, P>(words), both((1u << BITS) - 1) << s, MAGIC<T>);
    const u32 offset = fma2<T>(zero, both(SIGN | power_of_two<T>(0)), both(SIGN | power_of_two<T>(T::MANTISSA - s)));
    return fma2<T>(whole, both(power_of_two<T>(-s)), offset);
  }
}

// Halves magic + code * 2^LOW and magic + code * 2^HIGH -> code - zero, exactly. `zero`: an integer.
template <typename T, int LOW, int HIGH>
DEVICE u32 center(u32 whole, u32 zero) {
  constexpr u32 SIGN = 0x8000u;
  constexpr u32 offset = (SIGN | power_of_two<T>(T::MANTISSA - LOW)) | (SIGN | power_of_two<T>(T::MANTISSA - HIGH)) << 16;
  return fma2<T>(whole, power_of_two<T>(-LOW) | power_of_two<T>(-HIGH) << 16,
                 zero * (1u << LOW | 1u << (16 + HIGH)) + offset);
}

// The same of bytes b and b + 1 of a word, which are too long for the mantissa of bfloat16: by way of float32.
DEVICE u32 center_bytes(u32 word, u32 b, u32 zero) {
  const float offset = as_float(0x4B000000u | zero);
  const float low = as_float(permute_bytes(word, 0x4B000000u, 0x7440 | b)) - offset;
  const float high = as_float(permute_bytes(word, 0x4B000000u, 0x7440 | (b + 1))) - offset;
  return pack_bfloat16(low, high);
}

// Whether two codes are too long for the mantissa, so that each of a pair has to come to bit 0.
template <typename T, int BITS>
constexpr bool APART = BITS != 8 && 2 * BITS > T::MANTISSA;

// code - zero of the consecutive codes 2P and 2P + 1 of a chunk as floats, exactly: for activations in the order of
// memory. `words`: as stored; `zero`: the zero point, an integer. The 16 bits that hold both codes are put into both
// halves, where each code is left at its own place.
template <typename T, int BITS, int P>
DEVICE u32 consecutive_pair(const u32 (&words)[BITS], u32 zero) {
  constexpr int bit = 2 * BITS * P, byte = bit / 8, word = byte / 4, next = word + 1 < BITS ? word + 1 : word;
  constexpr u32 b = byte % 4, mask = (1u << BITS) - 1;
  if constexpr (BITS > T::MANTISSA) {
    return center_bytes(words[word], b, zero);
  } else if constexpr (BITS == 8) {
    return center<T, 0, 0>(permute_bytes(words[word], MAGIC<T>, 0x5050 | b | (b + 1) << 8), zero);
  } else if constexpr (APART<T, BITS>) {
    const u32 halves = permute_bytes(words[word], words[word] >> BITS, 0x4400 + b * 0x1111);
    return center<T, 0, 0>(mask_or(halves, both(mask), MAGIC<T>), zero);
  } else {
    constexpr int at = bit % 8, shift = at + 2 * BITS > T::MANTISSA ? at : 0, low = at - shift, high = low + BITS;
    const u32 twice = permute_bytes(words[word], words[next], 0x1010 + b * 0x1111);
    const u32 whole = mask_or(twice >> shift, mask << low | mask << (16 + high), MAGIC<T>);
    return center<T, low, high>(whole, zero);
  }
}

// Where the lane `t` of four finds codes 2t and 2t + 1 of every eight of a chunk.
template <typename T, int BITS>
struct PairOfLane {
  u32 selector;  // of the bytes that hold the first pair, from two words
  int shift;     // of the pair, in these bytes

  DEVICE explicit PairOfLane(int t)
      : selector((APART<T, BITS> ? 0x4400u : 0x1010u) + 2 * BITS * t / 8 * 0x1111u), shift(2 * BITS * t % 8) {}

  // code - zero of the pair of the J-th eight as floats, exactly. `words`: as stored; `zero`: an integer.
  template <int J>
  DEVICE u32 of(const u32 (&words)[BITS], u32 zero) const {
    constexpr int byte = BITS * J, word = byte / 4, next = word + 1 < BITS ? word + 1 : word;
    constexpr u32 mask = (1u << BITS) - 1;
    if constexpr (APART<T, BITS>) {
      static_assert(BITS == 4, "the pair is a byte");
      const u32 halves = permute_bytes(words[word], words[word] >> BITS, selector);
      return center<T, 0, 0>(mask_or(halves, both(mask), MAGIC<T>), zero);
    } else {
      const u32 twice = permute_bytes(words[word], words[next], selector + byte % 4 * 0x1111u);
      if constexpr (BITS > T::MANTISSA) return center_bytes(twice, 0, zero);
      if constexpr (BITS == 8) return center<T, 0, 0>(permute_bytes(twice, MAGIC<T>, 0x5150), zero);
      return center<T, 0, BITS>(mask_or(twice >> shift, mask | mask << (16 + BITS), MAGIC<T>), zero);
    }
  }
};

// Pairs of consecutive activations -> the pairs of `first`. x: 32 activations as they are in memory.
template <int BITS>
DEVICE void arrange_activations(const u32 (&x)[PAIRS], u32 (&pairs)[PAIRS]) {
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int low = first<BITS>(p), high = low + DISTANCE<BITS>;
    pairs[p] = permute_bytes(x[low / 2], x[high / 2], low % 2 ? 0x7632 : 0x5410);
  }
}

// Code `index` of a stream of BITS-bit codes that is `bytes` long: the packed zero points of a row.
template <int BITS>
DEVICE u32 code_at(const u8* stream, int bytes, int index) {
  const int bit = index * BITS, byte = bit / 8;
  u32 window = stream[byte];
  if (8 % BITS && byte + 1 < bytes) window |= stream[byte + 1] << 8;
  return window >> bit % 8 & ((1u << BITS) - 1);
}

// A code as the bits of a float.
template <typename T, int BITS>
DEVICE u32 float_of_code(u32 code) {
  if constexpr (BITS > T::MANTISSA) return from_float<T>(static_cast<float>(code));
  constexpr u32 one = power_of_two<T>(0), magic = power_of_two<T>(T::MANTISSA);
  return fma2<T>(magic | code, one, 0x8000u | magic) & 0xFFFFu;  // magic + code - magic
}
