// Runs the threads of one block as fibers of this thread.
#pragma once

#include <functional>

// Calls `body(thread)` for each of `threads` threads, with `shared_bytes` of shared memory. Throws std::runtime_error
// where threads wait for each other for ever, or memory is used past its end.
void run_block(int threads, int shared_bytes, const std::function<void(int)>& body);
