// The twin of kernels/device.cuh for a CPU: the same functions, so that the kernels run as they are, a block at a time.
//
// Each thread of a block is a fiber; it runs until it waits for others. What a GPU does behind a thread's back is kept
// as strict as the manual has it: copies arrive when they are waited for and not before, and until then, as from the
// beginning, their place is not-a-number. Products of warpgroups read and write when they are waited for, and see what
// has been published to them and nothing else.
#ifndef TEQ_GRAPH_DEVICE_CUH
#define TEQ_GRAPH_DEVICE_CUH

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "types.cuh"

#define DEVICE inline

// ----------------------------------------------------------------------------------------------- the block (block.cpp)

u8* shared_memory();
// Waits for the block's, or the warp's, other threads.
void __syncthreads();
void __syncwarp();
// Puts a lane's operands where its warp sees them and waits for the others': [lanes, 6], until the call after the next.
const u32* exchange(const u32 (&own)[6]);
int lane_of_thread();

// Copies `valid` of `bytes` bytes, and zeros for the others.
void start_copy(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_until_pending(int groups);

// A product of a warpgroup that has been started: `multiply` does what a lane has of it, from the operand in `memory`.
struct Product {
  void (*multiply)(const Product& self, const u8* memory);
  float* d;
  const u32* a;
  u64 b;
};
void start(const Product& product);
void fence_products();
void commit_products();
void wait_until_products_pending(int groups);
void publish_to_products();
u32 shared_address(const void* at);

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

inline u32 shuffle(u32 value, int lane) { return exchange({value})[lane * 6]; }

inline float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The rest is in instructions.cpp, for Float16 and BFloat16.
template <typename T>
u32 fma2(u32 a, u32 b, u32 c);
template <typename T>
float to_float(u16 bits);
template <typename T>
u16 from_float(float value);
u32 pack_bfloat16(float low, float high);
template <typename T>
void multiply_accumulate(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <int BYTES>
void copy_async(void* to, const void* from, bool valid) {
  start_copy(to, from, BYTES, valid ? BYTES : 0);
}

inline void copy_some_async(void* to, const void* from, int bytes) { start_copy(to, from, 16, bytes); }

template <int PENDING>
void wait_for_copies() {
  wait_until_pending(PENDING);
}

// d[64, TOKENS] += a[64, 16] b[16, TOKENS], when it is waited for.
template <typename T, int TOKENS>
void multiply_warpgroup(const Product& self, const u8* memory);

template <typename T, int TOKENS>
void start_product(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b) {
  start({multiply_warpgroup<T, TOKENS>, d[0], a, b});
}

template <int PENDING>
void wait_for_products() {
  wait_until_products_pending(PENDING);
}

#endif
