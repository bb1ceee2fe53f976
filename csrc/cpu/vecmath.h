// exp, expm1, log, log1p, sine and cosine as polynomials that a compiler vectorises, in float and double, without libm.
//
// Coefficients are minimax fits of our own (Remez; relative errors in the comments). NaN stays NaN; a result
// below the smallest normal number is flushed to 0. Each function states its domain, which is all that the kernel uses.
#pragma once

namespace {

template <class To, class From>
KD_FN To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class R>
struct Real;

template <>
struct Real<float> {
  using Int = int;
  using UInt = unsigned;
  static constexpr int kMantissa = 23;
  static constexpr Int kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3;
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693145752f, kLn2Lo = 1.42860677e-6f, kLn2 = 0.693147181f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kMin = -88.029692f, kMax = 88.0f;  // -127 ln 2, and less than 127.5 ln 2
  static constexpr float kInf = __builtin_huge_valf(), kSmallest = 0x1p-126f;  // the latter a normal number

  // e^r - 1 on |r| <= ln(2)/2, relative error 3e-9.
  static KD_FN float expm1_reduced(float r) {
    float p = 0.00139504918285f;
    p = p * r + 0.00836888935243f;
    p = p * r + 0.0416662057914f;
    p = p * r + 0.166665188397f;
    p = p * r + 0.500000009519f;
    return p * (r * r) + r;
  }
  // kTimes (a power of two) times log(1 + f) on sqrt(1/2) <= 1 + f <= sqrt(2), relative error 3e-8.
  template <int kTimes = 1>
  static KD_FN float log1p_reduced(float f) {
    float p = kTimes * 0.0891786839256f;
    p = p * f + kTimes * -0.143502001413f;
    p = p * f + kTimes * 0.148769609739f;
    p = p * f + kTimes * -0.165656347125f;
    p = p * f + kTimes * 0.199653981422f;
    p = p * f + kTimes * -0.250017469263f;
    p = p * f + kTimes * 0.333338580658f;
    float f2 = f * f;
    return p * (f2 * f) + (kTimes * f - kTimes * 0.5f * f2);
  }
  // On |x| <= pi/2, absolute errors 7e-9 x^3 and 4e-10 x^2.
  static KD_FN void sincos_reduced(float x, float& sine, float& cosine) {
    float x2 = x * x, s = 2.63475639181e-6f, c = -2.62975174165e-7f;
    s = s * x2 - 1.98227394886e-4f;
    s = s * x2 + 8.3332421351e-3f;
    s = s * x2 - 0.166666659638f;
    c = c * x2 + 2.47745797452e-5f;
    c = c * x2 - 1.38886516473e-3f;
    c = c * x2 + 4.166665936e-2f;
    c = c * x2 - 0.49999999964f;
    sine = s * (x2 * x) + x;
    cosine = c * x2 + 1;
  }
};

template <>
struct Real<double> {
  using Int = long long;
  using UInt = unsigned long long;
  static constexpr int kMantissa = 52;
  static constexpr Int kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLog2e = 1.4426950408889634, kLn2Hi = 0.69314718036912382, kLn2Lo = 1.9082149292705877e-10,
                          kLn2 = 0.69314718055994531;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMin = -709.0895657128241, kMax = 709.0;  // -1023 ln 2, and less than 1023.5 ln 2
  static constexpr double kInf = __builtin_huge_val(), kSmallest = 0x1p-1022;

  // The Taylor series: its first omitted term, r^14 / 14!, is below 5e-18 there.
  static KD_FN double expm1_reduced(double r) {
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    return p * (r * r) + r;
  }
  // 2 atanh(s), s = f / (2 + f), |s| <= 0.1716: the first omitted term, s^23 / 23, is below 2e-18 relative to s.
  template <int kTimes = 1>
  static KD_FN double log1p_reduced(double f) {
    double s = f / (2 + f), s2 = s * s;
    double p = 1.0 / 21;
    p = p * s2 + 1.0 / 19;
    p = p * s2 + 1.0 / 17;
    p = p * s2 + 1.0 / 15;
    p = p * s2 + 1.0 / 13;
    p = p * s2 + 1.0 / 11;
    p = p * s2 + 1.0 / 9;
    p = p * s2 + 1.0 / 7;
    p = p * s2 + 1.0 / 5;
    p = p * s2 + 1.0 / 3;
    // 2s + 2s^3 p, with 2s = f - s f so that small f loses nothing.
    return kTimes * (f - s * (f - 2 * s2 * p));
  }
  // Taylor series: the first omitted terms, x^23 / 23! and x^24 / 24!, are below 2e-18 and 1e-19 on |x| <= pi/2.
  static KD_FN void sincos_reduced(double x, double& sine, double& cosine) {
    double x2 = x * x, s = 1.0 / 51090942171709440000.0, c = -1.0 / 1124000727777607680000.0;
    s = s * x2 - 1.0 / 121645100408832000.0;
    s = s * x2 + 1.0 / 355687428096000.0;
    s = s * x2 - 1.0 / 1307674368000.0;
    s = s * x2 + 1.0 / 6227020800.0;
    s = s * x2 - 1.0 / 39916800.0;
    s = s * x2 + 1.0 / 362880.0;
    s = s * x2 - 1.0 / 5040.0;
    s = s * x2 + 1.0 / 120.0;
    s = s * x2 - 1.0 / 6.0;
    c = c * x2 + 1.0 / 2432902008176640000.0;
    c = c * x2 - 1.0 / 6402373705728000.0;
    c = c * x2 + 1.0 / 20922789888000.0;
    c = c * x2 - 1.0 / 87178291200.0;
    c = c * x2 + 1.0 / 479001600.0;
    c = c * x2 - 1.0 / 3628800.0;
    c = c * x2 + 1.0 / 40320.0;
    c = c * x2 - 1.0 / 720.0;
    c = c * x2 + 1.0 / 24.0;
    c = c * x2 - 1.0 / 2.0;
    sine = s * (x2 * x) + x;
    cosine = c * x2 + 1;
  }
};

template <class R>
constexpr R kd_unit = 1;

// Of a NaN and a number, the second; but at least `low` is no NaN.
template <class R>
KD_FN R kd_at_least(R x, R low) {
  return x < low ? low : x;
}
template <class R>
KD_FN R kd_min(R x, R y) {
  return x < y ? x : y;
}
template <class R>
KD_FN R kd_max(R x, R y) {
  return x > y ? x : y;
}

// x = n ln 2 + r with n an integer; returns e^r - 1 and 2^n. x must lie within [kMin, 88].
template <class R>
KD_FN R split_exp(R x, R& power) {
  using M = Real<R>;
  using UInt = typename M::UInt;
  R rounded = x * M::kLog2e + M::kRound;
  R whole = rounded - M::kRound;
#if defined(__FMA__)
  // One exact product: the error of ln 2 itself is n * 2e-9 (2e-17 in double), below an ulp wherever e^x matters.
  R r = x - whole * M::kLn2;
#else
  R r = (x - whole * M::kLn2Hi) - whole * M::kLn2Lo;
#endif
  // The integer stands in the low bits of `rounded`; the shift moves it to the exponent and drops the rest.
  power = bits<R>((bits<UInt>(rounded) << M::kMantissa) + (UInt)M::kOne);
  return M::expm1_reduced(r);
}

// e^x for x <= 88; 0 where the result is not a normal number: there 2^n is clamped to an exponent of all zeros. Written
// as a maximum in which NaN stays NaN.
template <class R>
KD_FN R exp_(R x) {
  R power, e = split_exp(x < Real<R>::kMin ? Real<R>::kMin : x, power);
  return power * e + power;
}

// e^x - 1 for x <= 0.
template <class R>
KD_FN R expm1_(R x) {
  R power, e = split_exp(x < Real<R>::kMin ? Real<R>::kMin : x, power);
  return power * e + (power - 1);
}

// log(1 + x) for -1 < x, 1 + x a normal number.
template <class R>
KD_FN R log1p_(R x) {
  using M = Real<R>;
  using Int = typename M::Int;
  using UInt = typename M::UInt;  // of which differences and shifts are what they are, whatever the sign
  R u = 1 + x;
  Int e = (Int)(bits<UInt>(u) - (UInt)M::kSqrtHalf) >> M::kMantissa;
  // 1 + f = (1 + x) 2^-e, formed from x so that a small x keeps its digits.
  R inverse = bits<R>((UInt)M::kOne - ((UInt)e << M::kMantissa));
  R f = x * inverse + (inverse - 1);
  return (R)e * M::kLn2 + M::log1p_reduced(f);
}

KD_FN float kd_exp(float x) { return exp_(x); }
KD_FN double kd_exp(double x) { return exp_(x); }
// e^x of any x, infinite where it is too large.
template <class R>
KD_FN R kd_power(R x) {
  constexpr R kMax = Real<R>::kMax;
  return x > kMax ? Real<R>::kInf : exp_(x > kMax ? kMax : x);
}
KD_FN float kd_expm1(float x) { return expm1_(x); }
KD_FN double kd_expm1(double x) { return expm1_(x); }
KD_FN float kd_log1p(float x) { return log1p_(x); }
KD_FN double kd_log1p(double x) { return log1p_(x); }
template <class R>
KD_FN R kd_exp_of_units(R x) {
  return exp_(x);
}
template <class R>
KD_FN R kd_log1p_in_units(R x) {
  return log1p_(x);
}

// kTimes (a power of two) times log(x 2^-kScale) of a normal number x.
template <int kTimes = 1, int kScale = 0, class R>
KD_FN R log_(R x) {
  using M = Real<R>;
  using Int = typename M::Int;
  using UInt = typename M::UInt;
  constexpr UInt kScaled = (UInt)kScale << M::kMantissa;
  Int e = (Int)(bits<UInt>(x) - ((UInt)M::kSqrtHalf + kScaled)) >> M::kMantissa;
  R inverse = bits<R>((UInt)M::kOne - kScaled - ((UInt)e << M::kMantissa));
  return (R)e * (kTimes * M::kLn2) + M::template log1p_reduced<kTimes>(x * inverse - 1);
}
// -2 log(x 2^-32).
KD_FN float kd_square_radius(float x) { return log_<-2, 32>(x); }
KD_FN double kd_square_radius(double x) { return log_<-2, 32>(x); }

KD_FN float kd_sqrt(float x) { return __builtin_sqrtf(x); }
KD_FN double kd_sqrt(double x) { return __builtin_sqrt(x); }

// Sine and cosine of 2 pi x 2^-32, 0 <= x <= 2^32: of what the nearest half turn leaves, at most pi / 2; an odd one turns
// the sign.
template <class R>
KD_FN void sincos_turns(R x, R& sine, R& cosine) {
  using M = Real<R>;
  using UInt = typename M::UInt;
  constexpr R kHalfTurn = 0x1p-31f;
  R rounded = x * kHalfTurn + M::kRound, s, c;
  M::sincos_reduced((x * kHalfTurn - (rounded - M::kRound)) * R(3.1415926535897932), s, c);
  UInt sign = bits<UInt>(rounded) << (8 * sizeof(R) - 1);
  sine = bits<R>(bits<UInt>(s) ^ sign);
  cosine = bits<R>(bits<UInt>(c) ^ sign);
}
KD_FN void kd_sincos_turns(float x, float& s, float& c) { sincos_turns(x, s, c); }
KD_FN void kd_sincos_turns(double x, double& s, double& c) { sincos_turns(x, s, c); }

// log x of a sum of exponentials: -inf at 0, and what is not finite stays as it is.
KD_FN double kd_log(double x) {
  if (x == 0) return -Real<double>::kInf;
  return x - x == 0 ? log1p_(x - 1) : x;
}

// tanh x, and 1 - tanh^2 x without the subtraction, through e^(-2|x|).
template <class R>
KD_FN R tanh_(R x) {
  R t = expm1_(-2 * (x < 0 ? -x : x));
  R y = -t / (2 + t);
  return x < 0 ? -y : y;
}
template <class R>
KD_FN R tanh_slope_(R x) {
  R e = exp_(-2 * (x < 0 ? -x : x));
  return 4 * e / ((1 + e) * (1 + e));
}

}  // namespace
