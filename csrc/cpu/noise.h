// Noise for a block of classes: the words of csrc/philox.h, as many at once as the processor multiplies.
#pragma once

namespace {

constexpr int64_t kGroups = kBlock / 4;  // of four classes, which share a counter

#if defined(__AVX512F__)
#define KD_WIDE_PHILOX
constexpr int kWide = 8;
using Wide = __m512i;
KD_FN Wide wide(uint64_t x) { return _mm512_set1_epi64((long long)x); }
KD_FN Wide wide_count(uint32_t from) { return _mm512_add_epi64(wide(from), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }
KD_FN Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
KD_FN Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
KD_FN Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
KD_FN void store_low(uint32_t* to, Wide a) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi64_epi32(a)); }
#elif defined(__AVX2__)
#define KD_WIDE_PHILOX
constexpr int kWide = 4;
using Wide = __m256i;
KD_FN Wide wide(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
KD_FN Wide wide_count(uint32_t from) { return _mm256_add_epi64(wide(from), _mm256_setr_epi64x(0, 1, 2, 3)); }
KD_FN Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
KD_FN Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
KD_FN Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
KD_FN void store_low(uint32_t* to, Wide a) {
  Wide low = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(low));
}
#endif

// What will be read later of the row that gets the noise, and is prefetched while noise is drawn: memory has nothing else
// to do meanwhile. Past the row it is no one's, and nothing happens.
struct Later {
  const char* row;
  int64_t group;  // bytes of four classes, or 0 for nothing
};

// The words of groups [first, first + n), n a multiple of 16. A counter stands in the low half of 64 bits, which is all
// that a 32-bit multiplication looks at, so that what the last one left in the high half needs no clearing. (gcc makes
// three instructions of each of the plain loop's multiplications: 1.8 ns a class with it, 0.9 with this.)
void block_words(const RowNoise& row, kd_u32 first, int64_t n, Later later, uint32_t (*words)[kGroups]) {
#if defined(KD_WIDE_PHILOX)
  const Wide m0 = wide(kMultiplier0), m1 = wide(kMultiplier1);
  // All but the first word of a counter is the row's, so that half of the first two rounds is, too.
  const uint64_t second = (uint64_t)kMultiplier1 * row.row_high;
  const kd_u32 row_0 = (kd_u32)(second >> 32) ^ row.row_low ^ row.k0;
  const uint64_t third = (uint64_t)kMultiplier0 * row_0;
  for (int64_t i = 0; i < n; i += 2 * kWide) {
    for (int64_t line = 0; line < 2 * kWide * later.group; line += 64)
      __builtin_prefetch(later.row + i * later.group + line);
    Wide c0[2], c1[2], c2[2], c3[2];
    kd_u32 k0 = row.k0 + kWeyl0, k1 = row.k1 + kWeyl1;
    for (int j = 0; j < 2; ++j) {
      Wide a = multiply(wide_count(first + (kd_u32)(i + j * kWide)), m0);
      Wide b = multiply(exclusive_or(high(a), wide(row.stream), wide(row.k1)), m1);
      c0[j] = exclusive_or(high(b), wide((kd_u32)second), wide(k0));
      c1[j] = b;
      c2[j] = exclusive_or(wide(third >> 32), a, wide(k1));
      c3[j] = wide((kd_u32)third);
    }
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
      k0 += kWeyl0;
      k1 += kWeyl1;
      for (int j = 0; j < 2; ++j) {
        Wide a = multiply(c0[j], m0), b = multiply(c2[j], m1);
        c0[j] = exclusive_or(high(b), c1[j], wide(k0));
        c2[j] = exclusive_or(high(a), c3[j], wide(k1));
        c1[j] = b;
        c3[j] = a;
      }
    }
    for (int j = 0; j < 2; ++j) {
      store_low(words[0] + i + j * kWide, c0[j]);
      store_low(words[1] + i + j * kWide, c1[j]);
      store_low(words[2] + i + j * kWide, c2[j]);
      store_low(words[3] + i + j * kWide, c3[j]);
    }
  }
#else
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Words w = row.words(first + (kd_u32)i);
    words[0][i] = w.w0;
    words[1][i] = w.w1;
    words[2][i] = w.w2;
    words[3][i] = w.w3;
  }
#endif
}

// Calls put(i, noise of class begin + i) for n classes, at most a block; noise is b sigma epsilon.
template <class R, class Put>
KD_FN void each_noise(const RowNoise& row, int64_t begin, int64_t n, Later later, Put put) {
  if (row.per_row) {
    R shared = (R)row.shared;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) put(i, shared);
    return;
  }
  R sigma = (R)row.sigma;
  if (begin % 4 != 0 || n < 4) {
    for (int64_t i = 0; i < n; ++i) put(i, normal_at(row, begin + i, sigma));
    return;
  }
  alignas(64) uint32_t words[4][kGroups];
  alignas(64) R normals[kGroups][4];
  int64_t groups = (n + 63) / 64 * 16;
  block_words(row, (kd_u32)(begin / 4), groups, later, words);
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    box_muller(words[0][i], words[1][i], sigma, normals[i][0], normals[i][1]);
    box_muller(words[2][i], words[3][i], sigma, normals[i][2], normals[i][3]);
  }
  const R* noise = &normals[0][0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(i, noise[i]);
}

// Puts the noise on a block of logits. What is impossible stays so.
template <class R>
void add_noise(const RowNoise& row, int64_t begin, int64_t n, Later later, R* x) {
  if (!row.multiplicative) {
    each_noise<R>(row, begin, n, later, [=](int64_t i, R noise) { x[i] += noise; });
  } else if (row.factors) {
    R* factors = (R*)row.factors + begin;
    each_noise<R>(row, begin, n, later, [=](int64_t i, R noise) {
      R factor = 1 + noise;
      bool impossible = x[i] == -Real<R>::kInf;
      x[i] = impossible ? x[i] : x[i] * factor;
      factors[i] = impossible ? R(1) : factor;
    });
  } else {
    each_noise<R>(row, begin, n, later, [=](int64_t i, R noise) {
      x[i] = x[i] == -Real<R>::kInf ? x[i] : x[i] * (1 + noise);
    });
  }
}

}  // namespace
