// A grid of CUDA threads, run on a processor: what device.h of this folder and grid.cpp know of each other.
#pragma once

#include <cstddef>

// A thread of the grid, a fiber with a stack of its own. Here is what it knows of its place; grid.cpp has the rest.
struct KdThread {
  int thread, threads;      // of the block
  long long block, blocks;  // of the grid
  char* shared;             // the block's memory, of 0xFF at first
};

// Who runs. All fibers are of one thread of the processor and only ever wait for each other in the functions below.
extern KdThread* kd_self;

void kd_block_barrier();
void kd_cluster_barrier();
unsigned kd_exchange(unsigned x, int mask);

void kd_barrier_init(unsigned long long* barrier, unsigned arrivals);
void kd_barrier_expect(unsigned long long* barrier, unsigned bytes);
void kd_barrier_wait(unsigned long long* barrier, unsigned parity);
void kd_send(void* to, const unsigned* value, unsigned long long* barrier, unsigned block);

void kd_copy_later(void* to, const void* from);
void kd_copies_done();
void kd_aligned(const void* p, const char* what);

// A kernel by its name, called with the bytes of its argument.
struct KdKernel {
  KdKernel(const char* name, void (*call)(const void*), std::size_t bytes);
  const char* name;
  void (*call)(const void*);
  std::size_t bytes;
  KdKernel* next;
};

template <class Argument>
struct KdCall {
  template <void (*kernel)(Argument)>
  static void call(const void* argument) {
    kernel(*(const Argument*)argument);
  }
};
template <class Argument>
KdCall<Argument> kd_call_of(void (*)(Argument));
template <class Argument>
constexpr std::size_t kd_bytes_of(void (*)(Argument)) {
  return sizeof(Argument);
}

// tests/cuda_shim.py writes one for every kernel of a unit.
#define KD_REGISTER(kernel) \
  static KdKernel kd_register_##kernel(#kernel, decltype(kd_call_of(kernel))::call<kernel>, kd_bytes_of(kernel));
