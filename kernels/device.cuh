// The instructions the kernels are written in, as functions: one PTX instruction or a few each.
// tests/cuda_emulation/device.cuh is their twin for a CPU: included first, it takes the place of this file.
#ifndef TEQ_GRAPH_DEVICE_CUH
#define TEQ_GRAPH_DEVICE_CUH

#include "types.cuh"

#define DEVICE __device__ __forceinline__
#define KERNEL __global__ void

// The dynamic shared memory of the block, aligned to 1 KiB.
DEVICE u8* shared_memory() {
  extern __shared__ __align__(1024) u8 shared[];
  return shared;
}

DEVICE u32 shared_address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

// (a & mask) | with
DEVICE u32 mask_or(u32 a, u32 mask, u32 with) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(with));
  return d;
}

// Four of the eight bytes of (low, high), each chosen by a digit of `selector`.
DEVICE u32 permute_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// a * b + c on pairs of 16-bit floats, rounded once.
template <typename T>
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  if constexpr (IS_FLOAT16<T>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <typename T>
DEVICE float to_float(u16 bits) {
  if constexpr (!IS_FLOAT16<T>) return __uint_as_float(static_cast<u32>(bits) << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// Rounded to nearest, ties to even.
template <typename T>
DEVICE u16 from_float(float value) {
  u16 bits;
  if constexpr (IS_FLOAT16<T>)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two floats as bfloat16, `low` in the lower half.
DEVICE u32 pack_bfloat16(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The value of another lane of the warp.
DEVICE u32 shuffle(u32 value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

// d[16, 8] += a[16, 16] b[16, 8] over a warp, in float32. With g = lane / 4 and t = lane % 4 a lane holds
//   a: (g, 2t..2t+1), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)   b: (2t.., g), (2t + 8.., g)
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
DEVICE void multiply_accumulate(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
#define MMA(T, NAME)                                                                                        \
  template <>                                                                                               \
  DEVICE void multiply_accumulate<T>(float(&d)[4], const u32(&a)[4], u32 b0, u32 b1) {                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                              \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                    \
  }
MMA(Float16, "f16")
MMA(BFloat16, "bf16")
#undef MMA

// Starts a copy of BYTES (4, 8 or 16) bytes from global to shared memory; zeros instead where not `valid`.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool valid) {
  const u32 target = shared_address(to);
  const int size = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // past L1: a weight is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(BYTES), "r"(size)
                 : "memory");
  }
}

// Starts a copy of 16 bytes from global to shared memory, of which the first `bytes` are there; zeros for the others.
DEVICE void copy_some_async(void* to, const void* from, int bytes) {
  const u32 target = shared_address(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of started copies of this thread.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ------------------------------------------------------------------- products of warpgroups (compute capability 9.0a)

// Starts d[64, TOKENS] += a[64, 16] b[16, TOKENS] over a warpgroup, in float32. The four warps have 16 rows each; of
// those a lane holds in `a` and `d` what it holds for multiply_accumulate. `b` describes b in shared memory.
// Neither `a` and `d` nor b may be touched until the product has been waited for.
template <typename T, int TOKENS>
DEVICE void start_product(float (&d)[TOKENS / 8][4], const u32 (&a)[4], u64 b);
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D4(i) D1(i), D1(i + 1), D1(i + 2), D1(i + 3)
#define D8(i) D4(i), D4(i + 4)
#define WGMMA(T, KIND, TOKENS, NAMES, A, B, ...)                                                                  \
  template <>                                                                                                     \
  DEVICE void start_product<T, TOKENS>(float(&d)[TOKENS / 8][4], const u32(&a)[4], u64 b) {                       \
    asm volatile("{.reg .pred adds; setp.eq.b32 adds, 0, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." KIND "." KIND                             \
                 " {" NAMES "}, {" A "}, " B ", adds, 1, 1, 0;}"                                                  \
                 : __VA_ARGS__                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  }
#define WGMMAS(T, KIND)                                                                                           \
  WGMMA(T, KIND, 32, NAMES_0, "%16, %17, %18, %19", "%20", D4(0))                                                 \
  WGMMA(T, KIND, 64, NAMES_0 ", " NAMES_16, "%32, %33, %34, %35", "%36", D8(0))                                   \
  WGMMA(T, KIND, 128, NAMES_0 ", " NAMES_16 ", " NAMES_32 ", " NAMES_48, "%64, %65, %66, %67", "%68", D8(0), D8(8)) \
  WGMMA(T, KIND, 256,                                                                                             \
        NAMES_0 ", " NAMES_16 ", " NAMES_32 ", " NAMES_48 ", " NAMES_64 ", " NAMES_80 ", " NAMES_96 ", " NAMES_112, \
        "%128, %129, %130, %131", "%132", D8(0), D8(8), D8(16), D8(24))
WGMMAS(Float16, "f16")
WGMMAS(BFloat16, "bf16")
#undef WGMMAS
#undef WGMMA
#undef D8
#undef D4
#undef D1

// Before the first product of a group: what is in registers is there.
DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of started products of this warpgroup.
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of this warpgroup's groups are under way.
template <int PENDING>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What this thread has written to shared memory, copies included that it waited for, is there for products.
DEVICE void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
