// Prints constants of the sources, a line each. Macro: CONSTANTS, expressions with commas between them.
#include <cstdio>

#include "device.cuh"
// after its twin of device.cuh
#include "dequantize.cuh"
#include "warpgroups.cuh"

int main() {
  for (const i64 value : {CONSTANTS}) std::printf("%lld\n", value);
}
