// Counter-based noise: Philox-4x32-10 and Box-Muller, the sample that kdkernels/noise.py defines.
//
// A number is a function of a seed and of where it is needed, so that every phase draws it again and nothing is stored.
// The includer provides KD_FN and, for its real types and x between 0 and 2^32, kd_square_radius, -2 log(x 2^-32), and
// kd_sincos_turns, sine and cosine of 2 pi x 2^-32; and kd_sqrt.
//
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

namespace {

using kd_u32 = unsigned int;
using kd_u64 = unsigned long long;

constexpr kd_u32 kStudentStream = 1;       // teacher m has stream 2m
constexpr kd_u32 kCoinStream = 1u << 31;  // added for the coin of a row

constexpr kd_u32 kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

struct Words {
  kd_u32 w0, w1, w2, w3;
};

KD_FN Words philox(kd_u32 c0, kd_u32 c1, kd_u32 c2, kd_u32 c3, kd_u32 k0, kd_u32 k1) {
  for (int round = 0; round < 10; ++round) {
    kd_u64 first = (kd_u64)kMultiplier0 * c0, second = (kd_u64)kMultiplier1 * c2;
    kd_u32 n0 = (kd_u32)(second >> 32) ^ c1 ^ k0, n2 = (kd_u32)(first >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = (kd_u32)second;
    c2 = n2;
    c3 = (kd_u32)first;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

// 2^32 times the number in (0, 1) that a word stands for, in float whatever the working precision. The words above the last
// but one float below 2^32 would be rounded to 2^32.
KD_FN float scaled_unit(kd_u32 word) {
  word = word < 0xFFFFFF7Fu ? word : 0xFFFFFF7Fu;
  return (float)word + 0.5f;
}

// Two normals of standard deviation sigma from two words.
template <class R>
KD_FN void box_muller(kd_u32 first, kd_u32 second, R sigma, R& a, R& b) {
  R radius = sigma * kd_sqrt(kd_square_radius((R)scaled_unit(first))), sine, cosine;
  kd_sincos_turns((R)scaled_unit(second), sine, cosine);
  a = radius * cosine;
  b = radius * sine;
}

// The noise of one side of a row.
struct RowNoise {
  kd_u32 k0, k1, row_low, row_high, stream;
  bool active;  // whether the row's coin says so
  bool multiplicative, per_row;
  double sigma;
  double shared;  // per_row: sigma times the one number of the row
  void* factors;  // [classes], where the factors of multiplicative noise are kept for the gradient, or null

  KD_FN Words words(kd_u32 group) const { return philox(group, row_low, row_high, stream, k0, k1); }
};

// The normal of class c, of standard deviation sigma.
template <class R>
KD_FN R normal_at(const RowNoise& row, long long c, R sigma) {
  Words w = row.words((kd_u32)(c / 4));
  R even, odd;
  if (c % 4 < 2)
    box_muller(w.w0, w.w1, sigma, even, odd);
  else
    box_muller(w.w2, w.w3, sigma, even, odd);
  return c % 2 == 0 ? even : odd;
}

// The noise of one row: its coin, and what all of its classes share.
template <class R>
KD_FN RowNoise noise_of_row(double sigma, double probability, bool multiplicative, bool per_row, kd_u64 seed, kd_u64 row,
                            kd_u32 stream) {
  RowNoise r{(kd_u32)seed, (kd_u32)(seed >> 32), (kd_u32)row, (kd_u32)(row >> 32), stream, sigma != 0, multiplicative,
             per_row, sigma, 0, nullptr};
  if (probability < 1) {
    RowNoise coin = r;
    coin.stream |= kCoinStream;
    r.active = r.active && scaled_unit(coin.words(0).w0) * 0x1p-32f < (float)probability;
  }
  if (per_row) r.shared = normal_at(r, 0, (R)sigma);
  return r;
}

}  // namespace
