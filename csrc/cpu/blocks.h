// Blocks of a row: what of any dtype, stride, scale, softcap or noise becomes a block of logits in the working precision R
// (float, or double for double logits), and how a finished block of the gradient is rounded and written.
#pragma once

namespace {

// Classes per block. Both sides' blocks, the gradient's and a converted copy of each stay in a 32 KiB first-level cache
// at 1,024; larger blocks would save merges and evict each other.
constexpr int64_t kBlock = 1024;

// How far phase 1 prefetches, in classes. Forward KL of (256, 32,000), 2 threads, ns per class: 0.74 without, 0.49 at 1,024,
// 0.48 at 2,048, 0.50 at 3,072 and 4,096.
constexpr int64_t kAhead = 2048;

}  // namespace

#include "noise.h"

namespace {

enum Type { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };

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
  const RowNoise* noise;  // or null, for every row of a call
  int64_t excluded;       // a class that counts as impossible, or -1

  // Whether the scale is put on here; else it is the caller's, for nothing.
  bool scales() const { return cap != 0 || noise != nullptr; }
};

KD_FN Reader plain_reader(const void* row, int64_t type, int64_t column) {
  return {(const char*)row, type, column, 1, 0, nullptr, -1};
}

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
  bool excludes = r.excluded >= begin && r.excluded < begin + n;
  if (plain && !r.scales() && !excludes) return (const R*)p;
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
  } else if (r.noise && r.scale != 1) {
    R scale = (R)r.scale;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] *= scale;
  }
  if (r.noise && r.noise->active) {
    int64_t size = type_size(r.type);
    add_noise(*r.noise, begin, n, r.column == 1 ? Later{p + kAhead * size, 4 * size} : Later{}, to);
  }
  if (excludes) to[r.excluded - begin] = -Real<R>::kInf;
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

// ------------------------------------------------------------------------------------------ sums and maxima of a block

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

}  // namespace
