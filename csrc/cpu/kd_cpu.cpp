// The CPU library: one generic row kernel behind a plain C interface, loaded by kdkernels/backends/cpu.py with ctypes.
//
// A row goes through at most three phases: (1) the normalisers of both sides and, where the divergence has a closed
// form, its cross sum; (2) for the others, the sums of phi and g; (3) the gradient. All work on blocks of kBlock
// classes in the working precision R (float, or double for double logits): a reader turns any dtype, stride, scale or
// softcap into such a block, and a writer rounds the finished gradient once.
//
// Phase 1 reads the row from memory and keeps the exponentials in a buffer that stays in the second-level cache, so that
// each is computed once: the gradient of every divergence here is then a linear combination of what was kept.
//
// This file is compiled once per instruction set (KD_ISA names the variant), and once with KD_DISPATCH for the entry
// points that pick a variant at load. No torch, no libstdc++, no libm, no -ffast-math.

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define KD_ABI 5
#define KD_MAX_DIMS 8

// ---------------------------------------------------------------------------------------------- the C interface
// Both records are arrays of 8-byte fields; backends/cpu.py packs them in this order.

// What a call computes, the same for every call of a LossSpec.
struct KdOptions {
  int64_t divergence;  // a number of KD_DIVERGENCES
  double params[4];
  double temperature, soft_weight, t_factor, hard_weight;
  int64_t ignore_index, reduction;  // 0 mean, 1 sum, 2 none
  double z_scale, z_cap, v_scale, v_cap;  // a cap of 0 is none
  int64_t stats;
  int64_t stream_bytes;  // gradients of at least this many bytes bypass the cache
  int64_t grain;         // elements below which work is not split
  int64_t huge_bytes;    // gradients of at least this many bytes are asked for in huge pages
};

// One call. Leading dimensions are common to both sides, each with its own strides, in elements.
struct KdCall {
  int64_t mode;  // 0: loss; 1: loss and gradient; 2: gradient times upstream
  int64_t rows, classes, width;  // width: the gradient's classes; those from `classes` on get 0
  const void *z, *v;
  int64_t z_type, v_type;    // 0 float, 1 double, 2 bfloat16, 3 half
  int64_t z_column, v_column;  // strides of the last dimension
  int64_t dims, shape[KD_MAX_DIMS], z_stride[KD_MAX_DIMS], v_stride[KD_MAX_DIMS];
  const int64_t* labels;   // [rows] or null
  const uint8_t* mask;     // [rows] or null
  const double* weights;   // [rows] or null
  double num_items;        // < 0: none given
  const void* upstream;    // mode 2: [rows] or one, of the loss's type
  int64_t upstream_stride;
  void* gradient;          // [rows, width], of z's type
  void* loss;              // one, or [rows]; float, or double where either side is double
  double* stats;           // [7]
  void (*parallel_for)();  // torch_parallel_for, or null for serial
};

typedef void (*KdRange)(int64_t, int64_t, void*);
typedef int32_t (*KdParallelFor)(int64_t, int64_t, int64_t, KdRange, void*);

// Results of kd_run: kd_ok, or one of these.
enum { kd_ok = -1, kd_no_memory = -2 };  // a value >= 0 is the first counted row whose label is out of range

struct KdTable {
  int64_t (*run)(const KdOptions*, const KdCall*);
  void (*scale)(const void* in, void* out, int64_t rows, int64_t classes, int64_t type, const void* upstream,
                int64_t upstream_type, int64_t upstream_stride, int64_t grain, void (*parallel_for)());
  void (*pointwise)(int64_t divergence, const double* params, int64_t n, const double* lq, const double* lp,
                    double* phi, double* g);
};

#ifndef KD_DISPATCH
// ---------------------------------------------------------------------------------------------- one variant
#define KD_FN inline __attribute__((always_inline))
#define KD_PASTE_(a, b) a##b
#define KD_PASTE(a, b) KD_PASTE_(a, b)

#include "vecmath.h"

#include "../divergence.h"
#include "../row.h"

namespace {

// Classes per block. Both sides' blocks, the gradient's and a converted copy of each stay in a 32 KiB first-level cache
// at 1,024; larger blocks would save merges and evict each other.
constexpr int64_t kBlock = 1024;
// How far phase 1 prefetches, in classes. Forward KL of (256, 32,000), 2 threads, ns per class: 0.74 without, 0.49 at 1,024,
// 0.48 at 2,048, 0.50 at 3,072 and 4,096.
constexpr int64_t kAhead = 2048;

enum Type { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };
enum Hard { kNoHard, kSharedHard, kOwnHard };  // no hard term; one at T = 1 that shares q; one with its own softmax
enum Mode { kLoss, kLossAndGradient, kScaledGradient };

KD_FN int64_t type_size(int64_t type) { return type == kFloat ? 4 : type == kDouble ? 8 : 2; }

// ------------------------------------------------------------------------------------------ 16-bit floats

KD_FN float from_bfloat16(uint16_t x) { return bits<float>((uint32_t)x << 16); }

KD_FN uint16_t to_bfloat16(float x) {
  uint32_t u = bits<uint32_t>(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

KD_FN float from_half(uint16_t x) {
  uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13;
  // The exponent's bias differs by 112; multiplying handles subnormals, and a full exponent stays full.
  float scaled = bits<float>(magnitude) * 0x1p112f;
  uint32_t u = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : bits<uint32_t>(scaled);
  return bits<float>(u | ((uint32_t)(x & 0x8000) << 16));
}

KD_FN uint16_t to_half(float x) {
  uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffff;
  // Subnormal halves: adding 0.5 leaves their value, rounded, in the low bits.
  uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000 ? small : normal;
  h = magnitude >= 0x477ff000 ? 0x7c00 : h;  // 65,520 and above round to infinity
  h = magnitude > 0x7f800000 ? 0x7e00 : h;
  return (uint16_t)(h | ((u >> 16) & 0x8000));
}

// ------------------------------------------------------------------------------------------ reading a side

// One side of a row: where it is, and how its elements become logits.
struct Reader {
  const char* row;
  int64_t type, column;
  double scale, cap;
};

template <class R, class S, class F>
KD_FN void convert(const S* x, int64_t n, int64_t column, R* out, F f) {
  if (column == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = f(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = f(x[i * column]);
  }
}

// Classes [begin, begin + n) of a side in the working precision: where they lie, if they are that already, else in `to`.
template <class R>
const R* read(const Reader& r, int64_t begin, int64_t n, R* to) {
  const char* p = r.row + begin * r.column * type_size(r.type);
  bool plain = r.type == (sizeof(R) == 8 ? kDouble : kFloat) && r.column == 1;
  if (plain && r.cap == 0) return (const R*)p;
  switch (r.type) {
    case kFloat:
      convert((const float*)p, n, r.column, to, [](float x) { return (R)x; });
      break;
    case kDouble:
      convert((const double*)p, n, r.column, to, [](double x) { return (R)x; });
      break;
    case kBFloat16:
      convert((const uint16_t*)p, n, r.column, to, [](uint16_t x) { return (R)from_bfloat16(x); });
      break;
    default:
      convert((const uint16_t*)p, n, r.column, to, [](uint16_t x) { return (R)from_half(x); });
  }
  if (r.cap != 0) {
    R inner = (R)(r.scale / r.cap), cap = (R)r.cap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cap * tanh_(to[i] * inner);
  }
  return to;
}

// ------------------------------------------------------------------------------------------ writing the gradient

// Copies bytes past the cache: a gradient larger than the caches is not read again soon, and an ordinary store would
// first read each line from memory.
void stream(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  constexpr int64_t kLine = 64;
  char* d = (char*)to;
  const char* s = (const char*)from;
  int64_t head = (int64_t)(-(uintptr_t)d & (kLine - 1));
  if (head > bytes) head = bytes;
  memcpy(d, s, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(d + i), _mm512_loadu_si512(s + i));
#elif defined(__AVX__)
    _mm256_stream_si256((__m256i*)(d + i), _mm256_loadu_si256((const __m256i*)(s + i)));
    _mm256_stream_si256((__m256i*)(d + i + 32), _mm256_loadu_si256((const __m256i*)(s + i + 32)));
#else
    for (int j = 0; j < 64; j += 16)
      _mm_stream_si128((__m128i*)(d + i + j), _mm_loadu_si128((const __m128i*)(s + i + j)));
#endif
  }
  memcpy(d + i, s + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// Rounds a finished block to the gradient's type.
template <class R>
void write(void* row, int64_t type, int64_t begin, int64_t n, const R* block, bool past_cache) {
  alignas(64) uint16_t narrow[kBlock];
  char* to = (char*)row + begin * type_size(type);
  const void* from = block;
  if (type == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = to_bfloat16((float)block[i]);
    from = narrow;
  } else if (type == kHalf) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = to_half((float)block[i]);
    from = narrow;
  } else if (type == kFloat && sizeof(R) == 8) {
    for (int64_t i = 0; i < n; ++i) ((float*)to)[i] = (float)block[i];
    return;
  }
  if (past_cache)
    stream(to, from, n * type_size(type));
  else
    memcpy(to, from, n * type_size(type));
}

// ------------------------------------------------------------------------------------------ the three phases

// What all rows of a call share, in the working precision.
template <class R>
struct Frame {
  Reader z, v;
  int64_t classes;
  R cz, cv;     // raw (or capped) logits to exponents at temperature T
  R one;        // to exponents at T = 1, student
  R soft, hard; // factors of the gradient, apart from the row's weight
};

struct Nothing {
  KD_FN void operator()(int64_t) const {}
};

// A loop over n classes with kSums sums: f(i, term) gives the terms of class i. The sums are kept in lanes, which are
// added up by halves in the end, so that the order of additions is the same on every run and the loop has no serial chain.
// `ahead(i)` is called once for each group of lanes, which is a cache line of R.
template <int kSums, class R, class F, class Ahead = Nothing>
KD_FN void accumulate(int64_t n, R (&sums)[kSums], F f, Ahead ahead = Ahead{}) {
  constexpr int kLanes = 64 / sizeof(R);
  alignas(64) R lane[kSums][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    ahead(i);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      R term[kSums];
      f(i + l, term);
      for (int k = 0; k < kSums; ++k) lane[k][l] += term[k];
    }
  }
  for (int l = 0; i < n; ++i, ++l) {
    R term[kSums];
    f(i, term);
    for (int k = 0; k < kSums; ++k) lane[k][l] += term[k];
  }
  for (int k = 0; k < kSums; ++k) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[k][l] += lane[k][l + half];
    sums[k] = lane[k][0];
  }
}

template <class R>
KD_FN R maximum(const R* x, int64_t n) {
  constexpr int kLanes = 128 / sizeof(R);
  alignas(64) R lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = -Real<R>::kInf;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
  return lane[0];
}

// The reference of exponents c * x - ref, given the maximum of x: 0 where no x is finite. An infinite maximum makes the
// row NaN, as it does in any softmax.
template <class R>
KD_FN R reference(R maximum, R c) {
  return maximum == -Real<R>::kInf ? R(0) : maximum * c;
}

// The address of what phase 1 prefetches while it works on class `begin` + i of a side: it computes for longer than a block
// takes to arrive, but the processor's own prefetcher only looks ahead while a row is being read. It may lie past the row,
// or past the tensor: a prefetch of no one's memory does nothing.
struct Ahead {
  const char* p;
  int64_t step;
  Ahead(const Reader& r, int64_t begin) : step(r.column * type_size(r.type)) { p = r.row + (begin + kAhead) * step; }
  KD_FN const char* at(int64_t i) const { return p + i * step; }
};

// No soft term: the hard one alone.
template <class R>
struct NoDivergence {
  static constexpr bool kCross = true, kTeacherWeighs = false;
  static constexpr R kA = 0, kB = 0;
  R unused[4];
};
template <class D>
constexpr bool kReadsTeacher = true;
template <class R>
constexpr bool kReadsTeacher<NoDivergence<R>> = false;

// What phase 1 keeps of a row, block by block relative to the block's own references: the student's exponentials, those
// of the teacher (or, where the student weighs, the terms of the cross sum), and the student's at T = 1 for the hard term.
template <class R>
struct Kept {
  R *z, *other, *one;        // [classes]; `one` is null where T = 1 or there is no hard term
  R *z_ref, *v_ref, *one_ref;  // [blocks]
};

// Phase 1. With kKeep false the loss is all that is wanted, and nothing is kept.
template <class R, class D, bool kOwnSum, bool kKeep>
void normalise(const Frame<R>& f, RowState& row, const Kept<R>& kept) {
  alignas(64) R z_block[kBlock], v_block[kBlock];
  row = RowState{};
  for (int64_t begin = 0, b = 0; begin < f.classes; begin += kBlock, ++b) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R* z = read(f.z, begin, n, z_block);
    R cz = f.cz, one = f.one, mz = maximum(z, n), rz = reference(mz, cz), r1 = reference(mz, one), rv = 0;
    R *keep_z = kept.z + begin, *keep_other = kept.other + begin, *keep_one = kept.one + begin;
    RowState block{};
    if constexpr (kReadsTeacher<D>) {
      const R* v = read(f.v, begin, n, v_block);
      R cv = f.cv;
      rv = reference(maximum(v, n), cv);
      Ahead next_z(f.z, begin), next_v(f.v, begin);
      R sums[4];
      accumulate(n, sums, [=](int64_t i, R(&term)[4]) {
        R y = z[i] * cz - rz, u = v[i] * cv - rv;
        R ey = kd_exp(y), eu = kd_exp(u);
        R a = D::kTeacherWeighs ? u : y, b = D::kTeacherWeighs ? y : u, ea = D::kTeacherWeighs ? eu : ey;
        // A class that the weighing side can't produce contributes nothing, also where a or b is infinite. A NaN is in
        // the sums already.
        R cross = 0;
        if constexpr (D::kCross) cross = ea > 0 ? ea * (D::kA == 0 ? D::kB * b : D::kA * a + D::kB * b) : R(0);
        R e1 = kOwnSum ? kd_exp(z[i] * one - r1) : R(0);
        term[0] = ey;
        term[1] = eu;
        term[2] = cross;
        term[3] = e1;
        if constexpr (kKeep) {
          keep_z[i] = ey;
          keep_other[i] = D::kCross && !D::kTeacherWeighs ? cross : eu;
          if constexpr (kOwnSum) keep_one[i] = e1;
        }
      }, [=](int64_t i) {
        // Here and not in a function of Ahead: gcc takes one that only prefetches for one without effect, and drops it.
        __builtin_prefetch(next_z.at(i));
        __builtin_prefetch(next_v.at(i));
      });
      block.z = {rz, sums[0]};
      block.v = {rv, sums[1]};
      block.cross = sums[2];
      if (kOwnSum) block.one = {r1, sums[3]};
    } else {
      R sums[1];
      accumulate(n, sums, [=](int64_t i, R(&term)[1]) {
        term[0] = kd_exp(z[i] * cz - rz);
        if constexpr (kKeep) keep_z[i] = term[0];
      });
      block.z = {rz, sums[0]};
    }
    if constexpr (kKeep) {
      kept.z_ref[b] = rz;
      kept.v_ref[b] = rv;
      kept.one_ref[b] = r1;
    }
    merge(row, block, D::kTeacherWeighs, D::kA, D::kB);
  }
}

// What a kept exponential is multiplied by to be a probability.
KD_FN double to_probability(const Side& side, double block_ref) {
  return exp_of_shift(block_ref - side.ref) / side.sum;
}

// The frame's part of a pair: a class that neither side can produce contributes nothing.
template <class R, class D>
KD_FN Terms<R> terms_of(const D& d, R lq, R lp, R q, R p) {
  Terms<R> t = d.terms(lq, lp, q, p);
  bool dead = lq == -Real<R>::kInf && lp == -Real<R>::kInf;
  return {dead ? R(0) : t.phi, dead ? R(0) : t.g};
}

// Phase 2: sums phi and g, and keeps g where the teacher's exponentials were.
template <class R, class D>
double sum_pairs(const Frame<R>& f, D d, RowState& row, const Kept<R>& kept) {
  alignas(64) R z_block[kBlock], v_block[kBlock];
  R rz = (R)row.z.ref, rv = (R)row.v.ref, lz = (R)kd_log(row.z.sum), lv = (R)kd_log(row.v.sum), cz = f.cz, cv = f.cv;
  double phi_sum = 0, g_sum = 0;
  for (int64_t begin = 0, b = 0; begin < f.classes; begin += kBlock, ++b) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R *z = read(f.z, begin, n, z_block), *v = read(f.v, begin, n, v_block), *ez = kept.z + begin;
    R* ev_then_g = kept.other + begin;
    R to_q = (R)to_probability(row.z, kept.z_ref[b]), to_p = (R)to_probability(row.v, kept.v_ref[b]);
    R sums[2];
    accumulate(n, sums, [=](int64_t i, R(&term)[2]) {
      // Two steps: one constant for both would lose the logarithm's digits beside a large reference.
      R lq = z[i] * cz - rz - lz, lp = v[i] * cv - rv - lv;
      Terms<R> t = terms_of(d, lq, lp, ez[i] * to_q, ev_then_g[i] * to_p);
      term[0] = t.phi;
      term[1] = t.g;
      ev_then_g[i] = t.g;
    });
    phi_sum += sums[0];
    g_sum += sums[1];
  }
  row.sum_g = g_sum;
  return phi_sum;
}

// D of a row from its state, for the divergences that need no second phase.
template <class R, class D>
double closed_form(const RowState& row) {
  const Side &a = D::kTeacherWeighs ? row.v : row.z, &b = D::kTeacherWeighs ? row.z : row.v;
  return D::value(row.cross, a.sum, kd_log(a.sum), kd_log(b.sum));
}

// Phase 3: with q = to_q ez and so on, every gradient is W (A ez + B other) + Z ez + C e1, minus the hard term's one-hot.
// `label` is the class of the hard term, or -1.
template <class R, class D, int kHard>
void write_gradient(const Frame<R>& f, const RowState& row, const Kept<R>& kept, double weight, int64_t label,
                    void* out, int64_t out_type, bool past_cache) {
  alignas(64) R block[kBlock], raw_block[kBlock];
  double soft = weight * f.soft, hard = label < 0 ? 0 : weight * f.hard;
  double d = 0, log_ratio = 0;  // of the reverse KL, whose gradient is q (l - D)
  if constexpr (kReadsTeacher<D> && D::kCross && !D::kTeacherWeighs) {
    d = closed_form<R, D>(row);
    log_ratio = kd_log(row.z.sum) - kd_log(row.v.sum);
  }
  for (int64_t begin = 0, b = 0; begin < f.classes; begin += kBlock, ++b) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    double to_q = to_probability(row.z, kept.z_ref[b]), on_both = 0, on_z = 0, on_other = 0;
    if constexpr (kReadsTeacher<D>) {
      if constexpr (!D::kCross) {  // g - q sum g
        on_both = soft;
        on_z = -row.sum_g * to_q;
        on_other = 1;
      } else if constexpr (D::kTeacherWeighs) {  // q - p
        // The larger factor in front: where p = q, both others are 1 and the difference is exactly 0.
        double to_p = to_probability(row.v, kept.v_ref[b]), larger = to_q > to_p ? to_q : to_p;
        on_both = soft * larger;
        on_z = larger == 0 ? 0 : to_q / larger;
        on_other = larger == 0 ? 0 : -to_p / larger;
      } else {  // q (l - D); the kept terms are ez (y - u) of exponents relative to the block's references
        double shift = (kept.z_ref[b] - row.z.ref) - (kept.v_ref[b] - row.v.ref) - log_ratio;
        on_both = soft * to_q;
        on_z = shift - d;
        on_other = 1;
      }
    }

    const R *ez = kept.z + begin, *other = kept.other + begin, *e1 = kept.one + begin;
    R W = (R)on_both, A = (R)on_z, B = (R)on_other, Z = kHard == kSharedHard ? (R)(hard * to_q) : R(0);
    R C = kHard == kOwnHard ? (R)(hard * to_probability(row.one, kept.one_ref[b])) : R(0);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      R dz = 0;
      if constexpr (kReadsTeacher<D>) dz = W * (A * ez[i] + B * other[i]);
      if constexpr (kHard == kSharedHard) dz += Z * ez[i];
      if constexpr (kHard == kOwnHard) dz += C * e1[i];
      block[i] = dz;
    }
    if (kHard != kNoHard && label >= begin && label < begin + n) block[label - begin] -= (R)hard;
    if (f.z.cap != 0) {  // d (c tanh(s z / c)) / d z
      Reader raw = f.z;
      raw.cap = 0;
      const R* x = read(raw, begin, n, raw_block);
      R s = (R)f.z.scale, inner = (R)(f.z.scale / f.z.cap);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) block[i] *= s * tanh_slope_(x[i] * inner);
    }
    write(out, out_type, begin, n, block, past_cache);
  }
}

// ------------------------------------------------------------------------------------------ figures

struct Figures {
  double entropy_z, entropy_v, agrees;
  int64_t best;
};

template <class R>
double entropy(const Reader& r, const Side& side, R c, int64_t classes, int64_t* best) {
  alignas(64) R block[kBlock];
  R ref = (R)side.ref, top = -Real<R>::kInf;
  double x = 0;
  *best = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    int64_t n = classes - begin < kBlock ? classes - begin : kBlock;
    const R* w = read(r, begin, n, block);
    R sums[1];
    accumulate(n, sums, [=](int64_t i, R(&term)[1]) {
      R y = w[i] * c - ref, e = kd_exp(y);
      term[0] = e > 0 ? e * y : R(0);
    });
    x += sums[0];
    R m = maximum(w, n);
    if (m > top)
      for (int64_t i = 0; i < n; ++i)
        if (w[i] == m) {
          top = m;
          *best = begin + i;
          break;
        }
  }
  return kd_log(side.sum) - x / side.sum;
}

// ------------------------------------------------------------------------------------------ a call

enum { kRowLoss, kRowSoft, kRowHard, kRowEntropyZ, kRowEntropyV, kRowAgrees, kRowCorrect, kRowFigures };

template <class R>
struct Job {
  const KdOptions* o;
  const KdCall* c;
  double denominator;  // what `mean` divides by; 1 otherwise
  double* rows;        // [rows, kRowFigures or 1]
  int64_t figures;
  bool past_cache, failed;
};

KD_FN bool counts(const KdOptions& o, const KdCall& c, int64_t n) {
  if (c.mask) return c.mask[n] != 0;
  return c.labels ? c.labels[n] != o.ignore_index : true;
}

KD_FN bool is_labelled(const KdOptions& o, const KdCall& c, int64_t n) {
  return c.labels && c.labels[n] != o.ignore_index;
}

void row_offsets(const KdCall& c, int64_t n, int64_t& z, int64_t& v) {
  z = v = 0;
  for (int64_t d = c.dims - 1; d >= 0; --d) {
    int64_t i = d == 0 ? n : n % c.shape[d];
    n /= c.shape[d];
    z += i * c.z_stride[d];
    v += i * c.v_stride[d];
  }
}

template <class R, class D, int kHard>
void do_rows(int64_t begin, int64_t end, void* context) {
  Job<R>& job = *(Job<R>*)context;
  const KdOptions& o = *job.o;
  const KdCall& c = *job.c;
  constexpr bool reads_teacher = kReadsTeacher<D>;
  constexpr bool pair = !D::kCross;

  D d;
  for (int i = 0; i < 4; ++i) ((R*)&d)[i] = (R)o.params[i];

  Frame<R> f;
  double z_scale = o.z_cap != 0 ? 1 : o.z_scale, v_scale = o.v_cap != 0 ? 1 : o.v_scale;
  double T = reads_teacher ? o.temperature : 1;
  f.classes = c.classes;
  f.cz = (R)(z_scale / T);
  f.cv = (R)(v_scale / T);
  f.one = (R)z_scale;
  f.soft = (R)(o.soft_weight * o.t_factor * z_scale / T);
  f.hard = (R)(o.hard_weight * z_scale);

  bool writes = c.mode != kLoss;
  Kept<R> kept{};
  void* buffer = nullptr;
  if (writes || pair) {
    int64_t blocks = (c.classes + kBlock - 1) / kBlock, row_size = blocks * kBlock;
    buffer = aligned_alloc(64, sizeof(R) * row_size * (kHard == kOwnHard ? 4 : 3));
    if (!buffer) {
      __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
      return;
    }
    R* p = (R*)buffer;
    kept = {p, p + row_size, kHard == kOwnHard ? p + 2 * row_size : nullptr, nullptr, nullptr, nullptr};
    kept.z_ref = p + row_size * (kHard == kOwnHard ? 3 : 2);
    kept.v_ref = kept.z_ref + blocks;
    kept.one_ref = kept.v_ref + blocks;
  }
  int64_t z_size = type_size(c.z_type), v_size = type_size(c.v_type);
  for (int64_t n = begin; n < end; ++n) {
    double* figures = job.rows ? job.rows + n * job.figures : nullptr;
    char* out = writes ? (char*)c.gradient + n * c.width * z_size : nullptr;
    if (!counts(o, c, n)) {
      if (figures) memset(figures, 0, job.figures * sizeof(double));
      if (writes) memset(out, 0, c.width * z_size);
      continue;
    }
    int64_t z_offset, v_offset;
    row_offsets(c, n, z_offset, v_offset);
    f.z = {(const char*)c.z + z_offset * z_size, c.z_type, c.z_column, o.z_scale, o.z_cap};
    f.v = {(const char*)c.v + v_offset * v_size, c.v_type, c.v_column, o.v_scale, o.v_cap};
    int64_t label = is_labelled(o, c, n) ? c.labels[n] : -1;
    double weight = c.weights ? c.weights[n] : 1;

    RowState row;
    double soft = 0;
    if (writes || pair)
      normalise<R, D, kHard == kOwnHard, true>(f, row, kept);
    else
      normalise<R, D, kHard == kOwnHard, false>(f, row, kept);
    if constexpr (kHard != kOwnHard) row.one = row.z;
    if constexpr (pair)
      soft = sum_pairs<R, D>(f, d, row, kept);
    else if constexpr (reads_teacher)
      soft = closed_form<R, D>(row);
    if (figures) {
      double hard = 0;
      if (kHard != kNoHard && label >= 0) {
        R at_label[1];
        hard = kd_log(row.one.sum) - ((double)*read(f.z, label, 1, at_label) * (double)f.one - row.one.ref);
      }
      // A term of weight 0 is absent, also where it is infinite.
      double loss = o.soft_weight == 0 ? 0 : o.soft_weight * o.t_factor * soft;
      if (o.hard_weight != 0) loss += o.hard_weight * hard;
      figures[kRowLoss] = weight * loss;
      if (o.stats) {
        int64_t best_z, best_v;
        figures[kRowSoft] = o.t_factor * soft;
        figures[kRowHard] = hard;
        figures[kRowEntropyZ] = entropy<R>(f.z, row.z, f.cz, c.classes, &best_z);
        figures[kRowEntropyV] = entropy<R>(f.v, row.v, f.cv, c.classes, &best_v);
        figures[kRowAgrees] = best_z == best_v;
        figures[kRowCorrect] = label >= 0 && best_z == label;
      }
    }
    if (writes) {
      double upstream = 1;
      if (c.mode == kScaledGradient) upstream = (double)((const R*)c.upstream)[n * c.upstream_stride];
      write_gradient<R, D, kHard>(f, row, kept, upstream * weight / job.denominator, label, out, c.z_type, job.past_cache);
      if (c.width > c.classes) memset(out + c.classes * z_size, 0, (c.width - c.classes) * z_size);
    }
  }
  free(buffer);
#if defined(__x86_64__)
  if (writes && job.past_cache) _mm_sfence();
#endif
}

// Sums x[0], x[step], ... by halves: the same tree for the same n, whatever ran in parallel before.
double tree_sum(const double* x, int64_t n, int64_t step) {
  if (n <= 8) {
    double s = 0;
    for (int64_t i = 0; i < n; ++i) s += x[i * step];
    return s;
  }
  int64_t half = n / 2;
  return tree_sum(x, half, step) + tree_sum(x + half * step, n - half, step);
}

// Rows that make up `grain` elements, so that small calls are not split.
KD_FN int64_t rows_per_task(int64_t grain, int64_t classes) {
  int64_t rows = grain / (classes > 0 ? classes : 1);
  return rows > 1 ? rows : 1;
}

void parallel(void (*parallel_for)(), int64_t n, int64_t grain, KdRange work, void* context) {
  if (n == 0) return;
  if (parallel_for && n > grain)
    ((KdParallelFor)parallel_for)(0, n, grain, work, context);
  else
    work(0, n, context);
}

template <class R>
KdRange choose_rows(const KdOptions& o, const KdCall& c) {
  bool soft = o.soft_weight != 0 || o.stats;
  bool hard = c.labels && (o.hard_weight != 0 || o.stats);
  if (!soft) return do_rows<R, NoDivergence<R>, kSharedHard>;
  int which = !hard ? kNoHard : o.temperature == 1 ? kSharedHard : kOwnHard;
#define KD_CHOOSE(number, D, name)                                 \
  if (o.divergence == number)                                      \
    return which == kNoHard       ? do_rows<R, D<R>, kNoHard>      \
           : which == kSharedHard ? do_rows<R, D<R>, kSharedHard>  \
                                  : do_rows<R, D<R>, kOwnHard>;
  KD_DIVERGENCES(KD_CHOOSE)
#undef KD_CHOOSE
  return nullptr;
}

// Advice that fresh memory be given in pages of 2 MiB: most of the time of a first write is page faults. Memory that has
// its pages already stays as it is, and so does everything where the system has no such pages.
void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 16;  // the largest ordinary page of any machine: a partial one isn't ours
  uintptr_t begin = ((uintptr_t)memory + kPage - 1) & -kPage, end = ((uintptr_t)memory + bytes) & -kPage;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

template <class R>
int64_t run(const KdOptions& o, const KdCall& c) {
  int64_t counted = 0, labelled = 0;
  bool uses_labels = c.labels && (o.hard_weight != 0 || o.stats);
  for (int64_t n = 0; n < c.rows; ++n) {
    if (!counts(o, c, n)) continue;
    ++counted;
    if (!is_labelled(o, c, n)) continue;
    ++labelled;
    if (uses_labels && (c.labels[n] < 0 || c.labels[n] >= c.classes)) return n;
  }
  Job<R> job{&o, &c, 1, nullptr, o.stats ? kRowFigures : 1, false, false};
  double items = counted == 0 ? 1 : c.num_items >= 0 ? c.num_items : (double)counted;
  if (o.reduction == 0) job.denominator = items;
  int64_t gradient_bytes = c.mode == kLoss ? 0 : c.rows * c.width * type_size(c.z_type);
  job.past_cache = gradient_bytes >= o.stream_bytes;
  if (gradient_bytes >= o.huge_bytes) ask_for_huge_pages(c.gradient, gradient_bytes);
  if (c.mode != kScaledGradient) {
    job.rows = (double*)malloc(sizeof(double) * (c.rows * job.figures + 1));
    if (!job.rows) return kd_no_memory;
  }
  parallel(c.parallel_for, c.rows, rows_per_task(o.grain, c.classes), choose_rows<R>(o, c), &job);
  if (job.rows && !job.failed) {
    if (o.reduction == 2)
      for (int64_t n = 0; n < c.rows; ++n) ((R*)c.loss)[n] = (R)job.rows[n * job.figures];
    else
      *(R*)c.loss = (R)(tree_sum(job.rows, c.rows, job.figures) / job.denominator);
    if (o.stats) {
      double over_rows = counted ? 1.0 / counted : 0, over_labelled = labelled ? 1.0 / labelled : 0;
      double over_terms = o.reduction == 1 ? 1 : 1 / items;
      double by[] = {0, over_terms, over_terms, over_rows, over_rows, over_rows, over_labelled};
      for (int k = 1; k < kRowFigures; ++k)
        c.stats[k - 1] = tree_sum(job.rows + k, c.rows, kRowFigures) * by[k];
      c.stats[kRowFigures - 1] = (double)counted;
    }
  }
  free(job.rows);
  return job.failed ? kd_no_memory : kd_ok;
}

int64_t run_any(const KdOptions* o, const KdCall* c) {
  return c->z_type == kDouble || c->v_type == kDouble ? run<double>(*o, *c) : run<float>(*o, *c);
}

// ------------------------------------------------------------------------------------------ backward's scaling

struct Scaling {
  const char* in;
  char* out;
  int64_t classes, type;
  const void* upstream;
  int64_t upstream_type, stride;
};

KD_FN double upstream_of(const Scaling& s, int64_t n) {
  int64_t i = n * s.stride;
  return s.upstream_type == kDouble ? ((const double*)s.upstream)[i] : (double)((const float*)s.upstream)[i];
}

template <class R>
void scale_rows(int64_t begin, int64_t end, void* context) {
  const Scaling& s = *(const Scaling*)context;
  alignas(64) R block[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    int64_t size = type_size(s.type);
    R factor = (R)upstream_of(s, n);
    Reader row{s.in + n * s.classes * size, s.type, 1, 1, 0};
    for (int64_t i = 0; i < s.classes; i += kBlock) {
      int64_t m = s.classes - i < kBlock ? s.classes - i : kBlock;
      const R* x = read(row, i, m, block);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) block[j] = x[j] == 0 ? R(0) : x[j] * factor;  // rows that don't count stay 0
      write(s.out + n * s.classes * size, s.type, i, m, block, false);
    }
  }
}

// out = in * upstream, row by row; in place it returns at once where every factor is 1.
void scale(const void* in, void* out, int64_t rows, int64_t classes, int64_t type, const void* upstream,
           int64_t upstream_type, int64_t stride, int64_t grain, void (*parallel_for)()) {
  Scaling s{(const char*)in, (char*)out, classes, type, upstream, upstream_type, stride};
  bool ones = in == out;
  for (int64_t n = 0; ones && n < (stride == 0 && rows > 1 ? 1 : rows); ++n)
    ones = upstream_of(s, n) == 1;
  if (ones) return;
  parallel(parallel_for, rows, rows_per_task(grain, classes), type == kDouble ? scale_rows<double> : scale_rows<float>, &s);
}

void pointwise(int64_t divergence, const double* params, int64_t n, const double* lq, const double* lp, double* phi,
               double* g) {
#define KD_POINTWISE(number, D, name)                             \
  if (divergence == number) {                                     \
    D<double> d;                                                  \
    memcpy((void*)&d, params, sizeof d);                          \
    for (int64_t i = 0; i < n; ++i) {                             \
      Terms<double> t = terms_of(d, lq[i], lp[i], kd_exp(lq[i]), kd_exp(lp[i]));                    \
      phi[i] = t.phi;                                             \
      g[i] = t.g;                                                 \
    }                                                             \
  }
  KD_DIVERGENCES(KD_POINTWISE)
#undef KD_POINTWISE
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const KdTable KD_PASTE(kd_table_, KD_ISA);
extern "C" const KdTable KD_PASTE(kd_table_, KD_ISA) = {run_any, scale, pointwise};

#else
// ---------------------------------------------------------------------------------------------- the entry points
#define KD_FN inline
#define KD_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_baseline;
#ifdef KD_HAVE_AVX2
extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_avx2;
#endif
#ifdef KD_HAVE_AVX512
extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_avx512;
#endif

namespace {

double kd_exp(double x);
double kd_expm1(double x);
double kd_log1p(double x);
#include "../divergence.h"

struct Variant {
  const char* name;
  const KdTable* table;
};

// The variants that this processor can run, best first.
int variants(Variant* out) {
  int n = 0;
#ifdef KD_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    out[n++] = {"avx512", &kd_table_avx512};
#endif
#ifdef KD_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out[n++] = {"avx2", &kd_table_avx2};
#endif
  out[n++] = {"baseline", &kd_table_baseline};
  return n;
}


// Tests run every variant that the processor has; everyone else runs the best.
const KdTable* table_of(int64_t variant) {
  Variant all[3];
  int n = variants(all);
  return all[variant < n ? variant : 0].table;
}

}  // namespace

KD_EXPORT int64_t kd_abi() { return KD_ABI; }

// The name of a variant this processor can run, best first; null past the last.
KD_EXPORT const char* kd_variant(int64_t i) {
  Variant all[3];
  return i < variants(all) ? all[i].name : nullptr;
}

// The number of a divergence in this library, or -1.
KD_EXPORT int64_t kd_divergence(const char* name) {
#define KD_NAME(number, D, text) \
  if (strcmp(name, text) == 0) return number;
  KD_DIVERGENCES(KD_NAME)
#undef KD_NAME
  return -1;
}

KD_EXPORT int64_t kd_run(int64_t variant, const KdOptions* options, const KdCall* call) {
  return table_of(variant)->run(options, call);
}

KD_EXPORT void kd_scale(int64_t variant, const void* in, void* out, int64_t rows, int64_t classes, int64_t type,
                        const void* upstream, int64_t upstream_type, int64_t upstream_stride, int64_t grain,
                        void (*parallel_for)()) {
  table_of(variant)->scale(in, out, rows, classes, type, upstream, upstream_type, upstream_stride, grain, parallel_for);
}

KD_EXPORT void kd_pointwise(int64_t variant, int64_t divergence, const double* params, int64_t n, const double* lq,
                            const double* lp, double* phi, double* g) {
  table_of(variant)->pointwise(divergence, params, n, lq, lp, phi, g);
}
#endif
