// csrc/cuda/device.h for a processor: the same functions, so that kd_cuda.cu runs where there is no GPU. Stricter than a
// GPU where that shows what is missing: shared memory starts as NaN, and so is what a copy or a message is still to fill.
#pragma once

#include <math.h>

#include <cstring>

#include "grid.h"

#define KD_FN inline
#define KD_KERNEL extern "C"
#define KD_ARGUMENT const
#define KD_UNROLL
#define KD_LAUNCH(threads, blocks, cluster)

namespace {

struct alignas(16) Quad {
  unsigned w[4];
};

using Barrier = unsigned long long;

KD_FN float as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
KD_FN unsigned as_bits(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// ---------------------------------------------------------------------------------------------- where a thread is

KD_FN int thread_index() { return kd_self->thread; }
KD_FN int block_threads() { return kd_self->threads; }
KD_FN long long block_index() { return kd_self->block; }
KD_FN long long block_count() { return kd_self->blocks; }
KD_FN char* shared_memory() { return kd_self->shared; }
KD_FN unsigned shared_address(const void* p) { return (unsigned)((const char*)p - kd_self->shared); }

// ---------------------------------------------------------------------------------------------- barriers

KD_FN void block_barrier() { kd_block_barrier(); }
KD_FN void cluster_barrier() { kd_cluster_barrier(); }
KD_FN void barrier_init(Barrier* barrier, unsigned arrivals) { kd_barrier_init(barrier, arrivals); }
KD_FN void barrier_expect(Barrier* barrier, unsigned bytes) { kd_barrier_expect(barrier, bytes); }
KD_FN void barrier_wait(Barrier* barrier, unsigned parity) { kd_barrier_wait(barrier, parity); }

// ---------------------------------------------------------------------------------------------- exchanges

KD_FN float from_other(float x, int mask) { return as_float(kd_exchange(as_bits(x), mask)); }
KD_FN unsigned from_other(unsigned x, int mask) { return kd_exchange(x, mask); }
KD_FN void send(Quad* to, Quad value, Barrier* barrier, unsigned block) { kd_send(to, value.w, barrier, block); }

// ---------------------------------------------------------------------------------------------- memory

// Addresses of shared memory are counted from its beginning.
KD_FN void* shared_pointer(unsigned address) { return shared_memory() + address; }
KD_FN unsigned shared_begin() { return 0; }
KD_FN Quad load_shared(unsigned from) {
  kd_aligned(shared_pointer(from), "load_shared");
  return *(const Quad*)shared_pointer(from);
}
KD_FN void store_shared(unsigned to, Quad x) {
  kd_aligned(shared_pointer(to), "store_shared");
  *(Quad*)shared_pointer(to) = x;
}
KD_FN unsigned load_byte(unsigned from) { return *(const unsigned char*)shared_pointer(from); }
KD_FN void store_byte(unsigned to, unsigned x) { *(unsigned char*)shared_pointer(to) = (unsigned char)x; }
KD_FN void or_shared(unsigned to, unsigned bits) {
  __atomic_fetch_or((unsigned*)shared_pointer(to), bits, __ATOMIC_RELAXED);
}
KD_FN void copy_later(unsigned to, const void* from) { kd_copy_later(shared_pointer(to), from); }
KD_FN void copies_done() { kd_copies_done(); }
KD_FN void store_past_cache(void* to, Quad x) {
  kd_aligned(to, "store_past_cache");
  *(Quad*)to = x;
}

// ---------------------------------------------------------------------------------------------- 16-bit floats

KD_FN float from_half(unsigned short x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return (float)y;
}
KD_FN unsigned to_half(float x) {
  _Float16 y = (_Float16)x;
  unsigned short bits;
  std::memcpy(&bits, &y, sizeof bits);
  return x == x ? bits : 0x7FFF;
}
KD_FN unsigned to_bfloat(float x) {
  unsigned bits = as_bits(x);
  return x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
}
KD_FN unsigned to_halves(float first, float second) { return to_half(first) | to_half(second) << 16; }
KD_FN unsigned to_bfloats(float first, float second) { return to_bfloat(first) | to_bfloat(second) << 16; }

// ---------------------------------------------------------------------------------------------- approximations

constexpr float kSmallestNormal = 0x1p-126f;

// CUDA's, and not C's.
KD_FN void sincospif(float x, float* sine, float* cosine) {
  *sine = (float)sin(x * M_PI);
  *cosine = (float)cos(x * M_PI);
}

KD_FN float flushed(float x) { return fabsf(x) < kSmallestNormal ? copysignf(0.0f, x) : x; }

// Between -1 and 1, a function of the bits of x.
KD_FN double error_of(float x) {
  unsigned h = as_bits(x) * 0x9E3779B9u;
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return (double)(int)(h ^ h >> 16) * 0x1p-31;
}

// Nothing is fused here: g++ is told so.
KD_FN float product(float x, float y) { return x * y; }

// Half by half; of a NaN and a number the number.
template <class Convert>
KD_FN unsigned larger_of_each(unsigned x, unsigned y, Convert to_float) {
  unsigned z = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    unsigned short a = (unsigned short)(x >> shift), b = (unsigned short)(y >> shift);
    float fa = to_float(a), fb = to_float(b);
    z |= (unsigned)(fa != fa || fb > fa ? b : a) << shift;
  }
  return z;
}
KD_FN unsigned larger_halves(unsigned x, unsigned y) {
  return larger_of_each(x, y, [](unsigned short h) { return from_half(h); });
}
KD_FN unsigned larger_bfloats(unsigned x, unsigned y) {
  return larger_of_each(x, y, [](unsigned short h) { return as_float((unsigned)h << 16); });
}
KD_FN float larger_or_nan(float x, float y) { return x != x || x > y ? x : y; }

// With KD_APPROXIMATE the errors are those that PTX allows, 2^-22 with the rounding to float, and not those of one device.
// 2^0 and what is infinite or NaN stay exact, as PTX says, too.
KD_FN float exp2_fast(float x) {
  x = flushed(x);
#ifdef KD_APPROXIMATE
  if (x == 0 || !isfinite(x)) return exp2f(x);
  return flushed((float)(exp2((double)x) * (1 + error_of(x) * 0x1.8p-23)));
#else
  return flushed(exp2f(x));
#endif
}
KD_FN float log2_fast(float x) {
  x = flushed(x);
#ifdef KD_APPROXIMATE
  double y = log2((double)x), error = error_of(x) * 0x1.8p-23;
  if (!isfinite(y)) return (float)y;
  return flushed((float)(x > 0.5f && x < 2 ? y + error : y * (1 + error)));
#else
  return log2f(x);
#endif
}

}  // namespace
