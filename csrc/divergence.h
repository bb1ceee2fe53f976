// The divergences, each once for every C++ backend: read by the host compiler and by CUDA's.
//
// A divergence is a pair over one class, phi and g = d phi / d lq, of the student's and the teacher's log-probabilities
// lq and lp; D = sum phi, and the gradient with respect to the student's logits is dz = (g - q sum g) / T. Two kinds:
//
//   Cross: D follows from one weighted sum that the first read of the rows accumulates, X = sum e^a (A a + B b), with a
//          the weighing side's shifted logits and b the other's; no second phase. kTeacherWeighs says which side a is.
//   Pair:  phi and g are summed in a phase of their own, once the normalisers are known.
//
// The includer provides KD_FN (how a function is declared), kd_expm1 (of what is at most 0) and kd_log1p for its real type.
// The same expressions stand in kdkernels/divergences.py; a test pins the two spellings to each other.
#pragma once

namespace {

// The two expressions of one class, given its log-probabilities and its probabilities.
template <class R>
struct Terms {
  R phi, g;
};

// KL(p || q) = <p, u - y> - lse u + lse y; gradient T (q - p).
template <class R>
struct ForwardKL {
  static constexpr bool kCross = true, kTeacherWeighs = true;
  static constexpr R kA = 1, kB = -1;
  R unused[4];
  static KD_FN double value(double x, double s, double lse_weighing, double lse_other) {
    return x / s - lse_weighing + lse_other;
  }
  KD_FN Terms<R> terms(R lq, R lp, R, R p) const {
    return {p * (p > 0 ? lp - lq : R(0)), -p};
  }
};

// H(p, q) = -<p, y> + lse y; the gradient of the forward KL.
template <class R>
struct SoftCrossEntropy {
  static constexpr bool kCross = true, kTeacherWeighs = true;
  static constexpr R kA = 0, kB = 1;
  R unused[4];
  static KD_FN double value(double x, double s, double, double lse_other) { return lse_other - x / s; }
  KD_FN Terms<R> terms(R lq, R, R, R p) const {
    return {-p * (p > 0 ? lq : R(0)), -p};
  }
};

// KL(q || p) = <q, y - u> - lse y + lse u; gradient T q (l - <q, l>), l = log(q / p).
template <class R>
struct ReverseKL {
  static constexpr bool kCross = true, kTeacherWeighs = false;
  static constexpr R kA = 1, kB = -1;
  R unused[4];
  static KD_FN double value(double x, double s, double lse_weighing, double lse_other) {
    return x / s - lse_weighing + lse_other;
  }
  KD_FN Terms<R> terms(R lq, R lp, R q, R) const {
    R phi = q * (q > 0 ? lq - lp : R(0));
    return {phi, phi + q};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. With d = lp - lq, the exponential of -|d| keeps
// both logs finite at any margin, and log1p keeps them accurate where p is near q.
template <class R>
struct JSD {
  static constexpr bool kCross = false, kTeacherWeighs = false;
  static constexpr R kA = 0, kB = 0;
  R beta, unused[3];
  KD_FN Terms<R> terms(R lq, R lp, R q, R p) const {
    R d = lp - lq;
    bool student_larger = d < 0;
    R t = kd_expm1(student_larger ? d : -d);
    R log_mix = kd_log1p((student_larger ? beta : 1 - beta) * t);
    R lq_lm = q > 0 ? -log_mix - (student_larger ? R(0) : d) : R(0);
    R lp_lm = p > 0 ? -log_mix + (student_larger ? d : R(0)) : R(0);
    R g = (1 - beta) * q * lq_lm;
    return {beta * p * lp_lm + g, g};
  }
};

// Every divergence: X(number, template, name in the Python table).
#define KD_DIVERGENCES(X) X(0, ForwardKL, "forward_kl") X(1, SoftCrossEntropy, "soft_cross_entropy") \
  X(2, ReverseKL, "reverse_kl") X(3, JSD, "jsd")

}  // namespace
