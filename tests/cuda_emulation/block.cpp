#include "block.h"

#include <ucontext.h>

#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "device.cuh"

namespace {

constexpr int LANES = 32;
constexpr int STACK = 64 * 1024;
constexpr int ALIGNMENT = 1024;
constexpr u8 POISON = 0xFF;  // not-a-number in every float format

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  int waits_for = -1;  // barrier: 0 the block's, 1 + w that of warp w; -1 none
  int exchanges = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> arrived;  // and not published to products yet
  bool fenced = false;
  std::vector<Product> started;
  std::deque<std::vector<Product>> products;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> arrived;
  std::vector<u32> exchange;
  std::vector<u8> shared, published;  // what threads see, and what products see
  u8* aligned = nullptr;
  std::function<void(int)> body;
  ucontext_t caller{};  // run_block
  int current = 0;
  std::exception_ptr error;
};

Block* block = nullptr;

// Goes on with the next thread that can, or in run_block where none can or one has failed.
void leave() {
  const int threads = static_cast<int>(block->fibers.size()), from = block->current;
  ucontext_t* to = &block->caller;
  for (int i = 1; i < threads && !block->error; ++i) {
    const int next = (from + i) % threads;
    Fiber& fiber = block->fibers[next];
    if (fiber.done || fiber.waits_for >= 0) continue;
    block->current = next;
    to = &fiber.context;
    break;
  }
  swapcontext(&block->fibers[from].context, to);
}

void arrive(int barrier, int size) {
  if (++block->arrived[barrier] == size) {
    block->arrived[barrier] = 0;
    for (Fiber& fiber : block->fibers)
      if (fiber.waits_for == barrier) fiber.waits_for = -1;
    return;
  }
  block->fibers[block->current].waits_for = barrier;
  leave();
}

void enter() {
  try {
    block->body(block->current);
  } catch (...) {
    block->error = std::current_exception();
  }
  block->fibers[block->current].done = true;
  leave();
}

}  // namespace

u8* shared_memory() { return block->aligned; }
void __syncthreads() { arrive(0, static_cast<int>(block->fibers.size())); }
void __syncwarp() { arrive(1 + block->current / LANES, LANES); }
int lane_of_thread() { return block->current % LANES; }

// Of two places in turn: who writes to one has met, at the other, all who read from it.
const u32* exchange(const u32 (&own)[6]) {
  const int place = block->current / LANES * 2 + block->fibers[block->current].exchanges++ % 2;
  u32* operands = block->exchange.data() + place * LANES * 6;
  std::memcpy(operands + lane_of_thread() * 6, own, sizeof own);
  __syncwarp();
  return operands;
}

void start_copy(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % bytes || (valid && reinterpret_cast<std::uintptr_t>(from) % bytes))
    throw std::runtime_error("a copy is not aligned to its size");
  std::memset(to, POISON, bytes);
  std::memset(block->published.data() + shared_address(to), POISON, bytes);
  block->fibers[block->current].open.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Fiber& self = block->fibers[block->current];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_until_pending(int groups) {
  Fiber& self = block->fibers[block->current];
  for (; static_cast<int>(self.groups.size()) > groups; self.groups.pop_front())
    for (const Copy& copy : self.groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<u8*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
      self.arrived.push_back(copy);
    }
}

u32 shared_address(const void* at) { return static_cast<u32>(static_cast<const u8*>(at) - block->aligned); }

void publish_to_products() {
  Fiber& self = block->fibers[block->current];
  for (const Copy& copy : self.arrived)
    std::memcpy(block->published.data() + shared_address(copy.to), copy.to, copy.bytes);
  self.arrived.clear();
}

void fence_products() { block->fibers[block->current].fenced = true; }

void start(const Product& product) {
  Fiber& self = block->fibers[block->current];
  if (!self.fenced) throw std::runtime_error("products begin without a fence");
  self.started.push_back(product);
}

void commit_products() {
  Fiber& self = block->fibers[block->current];
  self.products.push_back(std::move(self.started));
  self.started.clear();
  self.fenced = false;
}

void wait_until_products_pending(int groups) {
  Fiber& self = block->fibers[block->current];
  for (; static_cast<int>(self.products.size()) > groups; self.products.pop_front())
    for (const Product& product : self.products.front()) product.multiply(product, block->published.data());
}

void run_block(int threads, int shared_bytes, const std::function<void(int)>& body) {
  constexpr int GUARD = 64;
  Block self;
  block = &self;
  self.fibers = std::vector<Fiber>(threads);
  self.arrived.assign(1 + threads / LANES, 0);
  self.exchange.assign(2 * threads * 6, ~0u);
  self.shared.assign(shared_bytes + GUARD + ALIGNMENT, POISON);
  self.published.assign(shared_bytes + GUARD, POISON);
  self.aligned = self.shared.data() + -reinterpret_cast<std::uintptr_t>(self.shared.data()) % ALIGNMENT;
  self.body = body;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = self.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, enter, 0);
  }
  swapcontext(&self.caller, &self.fibers[0].context);
  if (self.error) std::rethrow_exception(self.error);
  for (const Fiber& fiber : self.fibers)
    if (!fiber.done) throw std::runtime_error("threads wait for each other for ever");
  for (const Fiber& fiber : self.fibers)
    if (fiber.fenced || !fiber.products.empty()) throw std::runtime_error("products are not waited for");
  for (int i = 0; i < GUARD; ++i)
    if (self.aligned[shared_bytes + i] != POISON) throw std::runtime_error("shared memory is written past its end");
  block = nullptr;
}
