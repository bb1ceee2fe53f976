// What only the device has, each a function of a line or a few: the place of a thread, barriers, exchanges between the
// threads of a warp and the blocks of a cluster, copies that nobody waits for, and approximations. The tests have these
// functions for a processor, and so run the kernels of kd_cuda.cu where there is no GPU.
#pragma once

#define KD_FN __device__ __forceinline__
#define KD_KERNEL extern "C" __global__
#define KD_ARGUMENT const __grid_constant__
#define KD_UNROLL _Pragma("unroll")
// At most so many threads a block, so many blocks at once on a multiprocessor, and so many blocks a cluster.
#define KD_LAUNCH(threads, blocks, cluster) __launch_bounds__(threads, blocks) __cluster_dims__(cluster, 1, 1)

namespace {

// Four registers, which are read and written at once.
struct alignas(16) Quad {
  unsigned w[4];
};

// An mbarrier: a phase ends once everybody who was to arrive has, and as many bytes as those expected.
using Barrier = unsigned long long;

KD_FN float as_float(unsigned x) { return __uint_as_float(x); }
KD_FN unsigned as_bits(float x) { return __float_as_uint(x); }

// ---------------------------------------------------------------------------------------------- where a thread is

KD_FN int thread_index() { return threadIdx.x; }
KD_FN int block_threads() { return blockDim.x; }
KD_FN long long block_index() { return blockIdx.x; }
KD_FN long long block_count() { return gridDim.x; }
KD_FN char* shared_memory() {
  extern __shared__ Quad kd_shared[];
  return (char*)kd_shared;
}

KD_FN unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
KD_FN void* shared_pointer(unsigned address) { return __cvta_shared_to_generic(address); }

// Where shared memory begins, as a number that is kept: a compiler makes it anew in every round of a loop, in five
// instructions, if it knows what it is.
KD_FN unsigned shared_begin() {
  unsigned address = shared_address(shared_memory());
  asm volatile("" : "+r"(address));
  return address;
}

// ---------------------------------------------------------------------------------------------- barriers

KD_FN void block_barrier() { __syncthreads(); }

// Of all threads of a cluster: once, so that everybody's shared memory is there.
KD_FN void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

KD_FN void barrier_init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Arrives, and says how many bytes the phase waits for.
KD_FN void barrier_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over, and sees what its bytes have written.
KD_FN void barrier_wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "waiting: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra waiting;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---------------------------------------------------------------------------------------------- exchanges

// The value of the thread of this warp whose number differs in `mask`; every thread of the warp asks.
KD_FN float from_other(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
KD_FN unsigned from_other(unsigned x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }

// Writes to the same place of another block of the cluster, and counts the bytes in on its barrier.
KD_FN void send(Quad* to, Quad value, Barrier* barrier, unsigned block) {
  asm volatile(
      "{\n\t.reg .b32 to, barrier;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\tmapa.shared::cluster.u32 barrier, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [barrier];\n\t}" ::"r"(
          shared_address(to)),
      "r"(shared_address(barrier)), "r"(block), "r"(value.w[0]), "r"(value.w[1]), "r"(value.w[2]), "r"(value.w[3])
      : "memory");
}

// ---------------------------------------------------------------------------------------------- memory

KD_FN Quad load_shared(unsigned from) {
  Quad x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "r"(from)
               : "memory");
  return x;
}
KD_FN void store_shared(unsigned to, Quad x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

// One byte, and bits put into an aligned word, which other threads put theirs into.
KD_FN unsigned load_byte(unsigned from) {
  unsigned x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
KD_FN void store_byte(unsigned to, unsigned x) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }
KD_FN void or_shared(unsigned to, unsigned bits) {
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(to), "r"(bits) : "memory");
}

// 16 aligned bytes from global to shared memory, there after this thread's next copies_done().
KD_FN void copy_later(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
KD_FN void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 aligned bytes that nobody reads soon.
KD_FN void store_past_cache(void* to, Quad x) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

// ---------------------------------------------------------------------------------------------- 16-bit floats

KD_FN float from_half(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
// Two numbers rounded to nearest, the first one in the low half.
KD_FN unsigned to_halves(float first, float second) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
KD_FN unsigned to_bfloats(float first, float second) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

// x y, rounded: never fused with what is added to it.
KD_FN float product(float x, float y) { return __fmul_rn(x, y); }

// The larger one of each half; of a NaN and a number the number.
KD_FN unsigned larger_halves(unsigned x, unsigned y) {
  unsigned z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
KD_FN unsigned larger_bfloats(unsigned x, unsigned y) {
  unsigned z;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// The larger of two numbers, NaN if one is.
KD_FN float larger_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// ---------------------------------------------------------------------------------------------- approximations

// 2^x, of relative error 2^-22, and log2 x, of absolute error 2^-22 where x is near 1 and relative elsewhere.
KD_FN float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KD_FN float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace
