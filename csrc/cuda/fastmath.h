// What divergence.h, philox.h and row.h ask for, in float on a GPU. Exponents of a row's softmax are powers of two, which is
// what the device computes.
#pragma once

#define KD_INFINITY __builtin_bit_cast(float, 0x7F800000)  // NVRTC has no other constant

namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kInf = KD_INFINITY, kNaN = __builtin_bit_cast(float, 0x7FC00000);

KD_FN float kd_at_least(float x, float low) { return larger_or_nan(x, low); }
KD_FN float kd_min(float x, float y) { return fminf(x, y); }
KD_FN float kd_max(float x, float y) { return fmaxf(x, y); }
KD_FN float kd_exp(float x) { return exp2_fast(x * kLog2e); }
KD_FN double kd_exp(double x) { return exp(x); }
KD_FN double kd_log1p(double x) { return log1p(x); }
KD_FN float kd_power(float x) { return exp2_fast(x * kLog2e); }
KD_FN float kd_expm1(float x) { return expm1f(x); }
KD_FN float kd_log(float x) { return logf(x); }

// Units of logarithms are those of powers of two.
template <class R>
constexpr R kd_unit = kLn2;
KD_FN float kd_exp_of_units(float x) { return exp2_fast(x); }

// log2(1 + x): the device's logarithm, but near 0, where its error is absolute, the series up to x^5 / 5. Of 16-bit logits it
// is the logarithm alone: two that differ do so by more than its error.
KD_FN float kd_log1p_in_units(float x) {
  float log = log2_fast(1 + x);
#ifdef KD_OF_16_BITS
  return log;
#else
  float series = x * (1 + x * (-0.5f + x * (0.333333333f + x * (-0.25f + x * 0.2f)))) * kLog2e;
  return fabsf(x) < 0.03125f ? series : log;
#endif
}
KD_FN float kd_log1p(float x) { return kd_log1p_in_units(x) * kLn2; }

// -2 log(x 2^-32), also where that is near 0.
KD_FN float kd_square_radius(float x) { return -2 * logf(x * 0x1p-32f); }
KD_FN float kd_sqrt(float x) { return sqrtf(x); }
KD_FN void kd_sincos_turns(float x, float& sine, float& cosine) { sincospif(x * 0x1p-31f, &sine, &cosine); }

// What exponents are relative to. Where it is large, its own rounding error might be any exponent: there `lo` has what is
// missing in `hi`, and logits are made relative to their maximum before they are multiplied.
struct Reference {
  float hi, lo;
};

KD_FN bool is_large(float hi) { return !(hi > -0x1p20f && hi < 0x1p20f); }

using kd_sum = float;
using kd_ref = Reference;
KD_FN float kd_apart(Reference a, Reference b) { return (a.hi - b.hi) + (a.lo - b.lo); }
KD_FN float kd_raise(float x) { return exp2_fast(x); }

}  // namespace
