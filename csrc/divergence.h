// The divergences, each once for every C++ backend: read by the host compiler and by CUDA's.
//
// A divergence is a pair over one class, phi and g = d phi / d lq, of the student's and the teacher's log-probabilities
// lq and lp; D = sum phi, and the gradient with respect to the student's logits is dz = (g - q sum g) / T. Kinds:
//
//   Cross: D follows from one weighted sum that the first read of the rows accumulates, X = sum e^a (A a + B b), with a
//          the weighing side's shifted logits and b the other's; no second phase. kTeacherWeighs says which side a is.
//   Pair:  phi and g are summed in a phase of their own, once the normalisers are known. kLogs says whether lq and lp
//          are looked at, or q and p alone.
//   kCentered, kPlain: phi and g are of the logits over T themselves, less their mean or not; dz = g / T.
//
// kTarget: the pair is about the classes that are not the row's label; the label's own term is alpha binary_kl of the
// margins. kBinary: every class is a question of its own, the hard term too.
//
// The includer provides KD_FN (how a function is declared), KD_INFINITY, and for its real type kd_min, kd_max, kd_at_least
// (of which only the last leaves a NaN one), kd_exp (of what is at most 88), kd_power (e^x of any x), kd_expm1 (of what is at
// most 0) and kd_log1p. The same expressions stand in kdkernels/expressions.py; a test pins the two spellings to each other.
//
// A processor may have exponentials and logarithms to another base than e. What takes and gives logs in its units says so
// (kInUnits): kd_unit<R> is a unit in nats, kd_exp_of_units and kd_log1p_in_units are the functions; on a CPU all natural.
#pragma once

namespace {

enum Normaliser { kSoftmax, kCentered, kPlain };

// The two expressions of one class, given its log-probabilities and its probabilities.
template <class R>
struct Terms {
  R phi, g;
};

// What a divergence is unless it says otherwise. It holds up to four parameters and nothing else. Reads and Writes name
// the one whose first and third phase are the same, so that these are compiled once for all of them.
template <class R>
struct Pair {
  using Reads = Pair;
  using Writes = Pair;
  static constexpr bool kCross = false, kTeacherWeighs = false, kLogs = true, kTarget = false, kBinary = false;
  static constexpr bool kInUnits = false;  // whether lq and lp are in the processor's units
  static constexpr bool kGuarded = false;  // whether both expressions are 0 by themselves where p and q are
  static constexpr Normaliser kNormaliser = kSoftmax;
  static constexpr R kA = 0, kB = 0;
};

// KL(p || q) = <p, u - y> - lse u + lse y; gradient T (q - p).
template <class R>
struct ForwardKL : Pair<R> {
  using Reads = ForwardKL;
  using Writes = ForwardKL;
  static constexpr bool kCross = true, kTeacherWeighs = true;
  static constexpr R kA = 1, kB = -1;
  R unused[4];
  template <class S>
  KD_FN S value(S x, S s, S lse_weighing, S lse_other) const {
    return x / s - lse_weighing + lse_other;
  }
  KD_FN Terms<R> terms(R lq, R lp, R, R p) const {
    return {p * (p > 0 ? lp - lq : R(0)), -p};
  }
};

// H(p, q) = -<p, y> + lse y; the gradient of the forward KL.
template <class R>
struct SoftCrossEntropy : Pair<R> {
  using Reads = SoftCrossEntropy;
  using Writes = ForwardKL<R>;
  static constexpr bool kCross = true, kTeacherWeighs = true;
  static constexpr R kA = 0, kB = 1;
  R unused[4];
  template <class S>
  KD_FN S value(S x, S s, S, S lse_other) const {
    return lse_other - x / s;
  }
  KD_FN Terms<R> terms(R lq, R, R, R p) const {
    return {-p * (p > 0 ? lq : R(0)), -p};
  }
};

// KL(q || p) = <q, y - u> - lse y + lse u; gradient T q (l - <q, l>), l = log(q / p).
template <class R>
struct ReverseKL : Pair<R> {
  using Reads = ReverseKL;
  using Writes = ReverseKL;
  static constexpr bool kCross = true, kTeacherWeighs = false;
  static constexpr R kA = 1, kB = -1;
  R unused[4];
  template <class S>
  KD_FN S value(S x, S s, S lse_weighing, S lse_other) const {
    return x / s - lse_weighing + lse_other;
  }
  KD_FN Terms<R> terms(R lq, R lp, R q, R) const {
    R phi = q * (q > 0 ? lq - lp : R(0));
    return {phi, phi + q};
  }
};

// A mixture m = w p + (1 - w) q at one class, relative to the larger of p and q. With d = lp - lq, the exponential of -|d|
// keeps both logs finite at any margin, and log1p keeps them accurate where p is near q. Logs cut off far below any that
// has a probability need no guard: what multiplies them is 0. All logs are in units.
template <class R>
struct Mixed {
  R d, smaller, over, log_mix;
  KD_FN Mixed(R lq, R lp, R w) {
    constexpr R kLowest = -10000;
    d = kd_at_least(lp, kLowest) - kd_at_least(lq, kLowest);
    smaller = kd_exp_of_units(kd_min(d, -d));
    const R mix = (d < 0 ? w : 1 - w) * (smaller - 1);
    over = 1 + mix;
    log_mix = kd_log1p_in_units(mix);
  }
  KD_FN R lq_lm() const { return -log_mix - kd_max(d, R(0)); }
  KD_FN R lp_lm() const { return kd_min(d, R(0)) - log_mix; }
  KD_FN R q_over_m() const { return (d < 0 ? R(1) : smaller) / over; }
  KD_FN R p_over_m() const { return (d < 0 ? smaller : R(1)) / over; }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
template <class R>
struct JSD : Pair<R> {
  static constexpr bool kGuarded = true, kInUnits = true;
  R beta, unused[3];
  KD_FN Terms<R> terms(R lq, R lp, R q, R p) const {
    Mixed<R> m(lq, lp, beta);
    R g = (kd_unit<R> * (1 - beta)) * q * m.lq_lm();
    return {(kd_unit<R> * beta) * p * m.lp_lm() + g, g};
  }
};

// KL(p || m), m = alpha p + (1 - alpha) q.
template <class R>
struct SkewKL : Pair<R> {
  static constexpr bool kGuarded = true, kInUnits = true;
  R alpha, unused[3];
  KD_FN Terms<R> terms(R lq, R lp, R, R p) const {
    Mixed<R> m(lq, lp, alpha);
    return {kd_unit<R> * p * m.lp_lm(), -(1 - alpha) * p * m.q_over_m()};
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q.
template <class R>
struct SkewReverseKL : Pair<R> {
  static constexpr bool kGuarded = true, kInUnits = true;
  R alpha, unused[3];
  KD_FN Terms<R> terms(R lq, R lp, R q, R) const {
    Mixed<R> m(lq, lp, 1 - alpha);
    R phi = kd_unit<R> * q * m.lq_lm();
    return {phi, phi + (1 - alpha) * q * m.p_over_m()};
  }
};

// |p - q| / 2; g = q sign(q - p) / 2.
template <class R>
struct TVD : Pair<R> {
  static constexpr bool kLogs = false, kGuarded = true;
  R unused[4];
  KD_FN Terms<R> terms(R, R, R q, R p) const {
    R difference = q - p;
    bool less = q < p, more = q > p;
    return {R(0.5) * (less ? -difference : difference), R(0.5) * (less ? -q : more ? q : difference)};
  }
};

// (q - p)^2 / 2; g = q (q - p).
template <class R>
struct SquaredError : Pair<R> {
  static constexpr bool kLogs = false, kGuarded = true;
  R unused[4];
  KD_FN Terms<R> terms(R, R, R q, R p) const {
    R difference = q - p;
    return {R(0.5) * difference * difference, q * difference};
  }
};

// -(p^alpha q^beta - alpha / s p^s - beta / s q^s) / (alpha beta), s = alpha + beta, and its limits. Relative to the
// larger of p and q, whose exponent is a, with t = -|lp - lq|, b the other exponent and e(c) = (e^(ct) - 1) / c, which is
// t at c = 0: phi = larger^s (e^(at) e(b) - e(a)) / s; at s = 0 (e(a) - t) / a; at a = b = 0 t^2 / 2. Nothing divides by
// alpha or beta where they may be 0.
template <class R>
KD_FN R inverse(R x) {
  return x == 0 ? R(0) : 1 / x;
}

// A choice as arithmetic, since gcc makes two paths, and no vectors, of many selections by one condition.
template <class R>
KD_FN R either(R first, R x, R y) {
  return first * x + (1 - first) * y;
}

// With both exponents above 0: every power is at most 1.
template <class R>
struct AlphaBeta : Pair<R> {
  R alpha, beta, unused[2];
  KD_FN Terms<R> terms(R lq, R lp, R, R) const {
    const R s = alpha + beta, over_alpha = 1 / alpha, over_beta = 1 / beta, over_s = 1 / s;
    const R d = lp - lq, student_larger = d < 0 ? R(1) : R(0), t = d < -d ? d : -d;
    const R grown_a = kd_expm1(either(student_larger, alpha, beta) * t);
    const R grown_b = kd_expm1(either(student_larger, beta, alpha) * t);
    const R larger = kd_exp(s * (lq > lp ? lq : lp));
    const R subtrahend = larger * grown_a * either(student_larger, over_alpha, over_beta);
    const R minuend = larger * (1 + grown_a) * grown_b * either(student_larger, over_beta, over_alpha);
    return {(minuend - subtrahend) * over_s, d < 0 ? -subtrahend : minuend};
  }
};

// With one exponent of 0, whose limit is taken, and the other, c, above it: e(c) is the only power of the margin.
template <class R>
struct AlphaBetaLimit : Pair<R> {
  R alpha, beta, unused[2];
  KD_FN Terms<R> terms(R lq, R lp, R, R) const {
    const R c = alpha + beta, over_c = 1 / c, of_alpha = alpha == 0 ? R(0) : R(1);
    const R d = lp - lq, student_larger = d < 0 ? R(1) : R(0);
    const R t = d < -d ? d : -d;
    const R grown = kd_expm1(c * t), larger = kd_exp(c * (lq > lp ? lq : lp));
    // Whether the exponent of the larger one is c.
    const bool is_c = student_larger == of_alpha;
    const R with_t = larger * (is_c ? 1 + grown : R(1));
    const R at_c = larger * grown * over_c, at_0 = with_t == 0 ? R(0) : with_t * t;
    const R minuend = is_c ? at_0 : at_c, subtrahend = is_c ? at_c : at_0;
    return {(minuend - subtrahend) * over_c, d < 0 ? -subtrahend : minuend};
  }
};

// With any exponents: 0, whose limit is taken, or below it, where a power grows with the margin.
template <class R>
struct AlphaBetaAny : Pair<R> {
  R alpha, beta, unused[2];
  static KD_FN R magnitude(R x) { return x < 0 ? -x : x; }
  KD_FN Terms<R> terms(R lq, R lp, R, R) const {
    const R s = alpha + beta, size_alpha = magnitude(alpha), size_beta = magnitude(beta);
    const R over_alpha = inverse(size_alpha), over_beta = inverse(size_beta);
    const R d = lp - lq, student_larger = d < 0 ? R(1) : R(0);
    const R t = d < -d ? d : -d, f = t < R(-1e30) ? R(-1e30) : t;  // f: no product with it is 0 inf
    const R of_alpha = alpha * f, of_beta = beta * f;
    // e of the sizes of the exponents; that of a negative one is this times e^(-ct).
    const R e_alpha = alpha == 0 ? t : kd_expm1(size_alpha * f) * over_alpha;
    const R e_beta = beta == 0 ? t : kd_expm1(size_beta * f) * over_beta;
    const R e_a = lp < lq ? e_alpha : e_beta, e_b = lp < lq ? e_beta : e_alpha;
    const R grows_alpha = of_alpha > 0 ? of_alpha : R(0), grows_beta = of_beta > 0 ? of_beta : R(0);
    const R log_larger = s * (lq > lp ? lq : lp);
    const R from_larger = kd_power(log_larger + either(student_larger, grows_alpha, grows_beta));
    const R from_both = kd_power(log_larger + either(student_larger, of_alpha + grows_beta, of_beta + grows_alpha));
    // What underflows weighs nothing, also beside an infinite logarithm.
    const R subtrahend = from_larger * (from_larger == 0 ? R(0) : e_a), minuend = from_both * (from_both == 0 ? R(0) : e_b);
    // With s = 0 the other exponent is -a.
    const R over_a = either(student_larger, inverse(alpha), inverse(beta));
    const R at_s_0 = alpha == 0 ? R(0.5) * t * t : (subtrahend - t) * over_a;
    R phi = s == 0 ? at_s_0 : (minuend - subtrahend) * inverse(s);
    // A difference of infinite powers is infinite; what was no number before stays none.
    phi = phi == phi ? phi : (t < 0 ? R(KD_INFINITY) : 1 + t);
    return {phi, d < 0 ? -subtrahend : minuend};
  }
};

// (y - u)^2 / 2, of logits over T.
template <class R>
struct LogitMSE : Pair<R> {
  static constexpr Normaliser kNormaliser = kPlain;
  R unused[4];
  KD_FN Terms<R> terms(R y, R u, R, R) const {
    R difference = y - u;
    return {R(0.5) * difference * difference, difference};
  }
};
template <class R>
struct CenteredLogitMSE : LogitMSE<R> {
  static constexpr Normaliser kNormaliser = kCentered;
};

// KL of yes and no, p = sigmoid u, q = sigmoid y; g = q - p. Both outcomes exchanged it is the same: the teacher's rarer
// one is taken, so that nothing cancels where both sides are sure.
template <class R>
KD_FN Terms<R> binary_kl(R y, R u) {
  const bool exchanged = u > 0;
  const R x = exchanged ? -y : y, w = exchanged ? -u : u;
  const bool unlikely = x > 0;  // what the teacher thinks the rarer, the student the likelier outcome
  const R t = kd_exp(w), e = kd_exp(unlikely ? -x : x), over_both = 1 / ((1 + t) * (1 + e));
  const R over_t = over_both * (1 + e), over_e = over_both * (1 + t), p = t * over_t;
  const R from_student = p > 0 ? (unlikely ? over_t * x + p * w : p * (w - x)) : (unlikely ? x : R(0));
  const R difference = (unlikely ? R(1) : e) * over_e - p;
  return {kd_log1p((e - t) * over_t) + from_student, exchanged ? -difference : difference};
}

// -y log sigmoid z - (1 - y) log(1 - sigmoid z), the hard term of a binary divergence; g = sigmoid z - y.
template <class R>
KD_FN Terms<R> binary_cross_entropy(R z, R y) {
  const bool likely = z > 0;
  const R n = likely ? -z : z, weight = likely ? 1 - y : y, e = kd_exp(n);
  return {kd_log1p(e) - weight * (weight == 0 ? R(0) : n), (likely ? R(1) : e) / (1 + e) - y};
}

template <class R>
struct BinaryKL : Pair<R> {
  static constexpr Normaliser kNormaliser = kPlain;
  static constexpr bool kBinary = true;
  R unused[4];
  KD_FN Terms<R> terms(R y, R u, R, R) const { return binary_kl(y, u); }
};

// alpha binary_kl(margins of the target) + beta KL(p || q) among the others.
template <class R>
struct DKD : Pair<R> {
  using Reads = ForwardKL<R>;
  using Writes = DKD;
  static constexpr bool kCross = true, kTeacherWeighs = true, kTarget = true;
  static constexpr R kA = 1, kB = -1;
  R alpha, beta, unused[2];
  template <class S>
  KD_FN S value(S x, S s, S lse_weighing, S lse_other) const {
    return beta * (x / s - lse_weighing + lse_other);
  }
  KD_FN Terms<R> terms(R lq, R lp, R, R p) const {
    const R weight = beta * p;
    return {weight * (weight == 0 ? R(0) : lp - lq), -weight};
  }
};

// Every divergence: X(number, template, name in the Python table). Two have no name of their own: they take the place of
// AlphaBeta where a parameter is not above 0.
#define KD_DIVERGENCES(X)                                                                                      \
  X(0, ForwardKL, "forward_kl") X(1, SoftCrossEntropy, "soft_cross_entropy") X(2, ReverseKL, "reverse_kl")     \
  X(3, JSD, "jsd") X(4, SkewKL, "skew_kl") X(5, SkewReverseKL, "skew_reverse_kl") X(6, TVD, "tvd")             \
  X(7, SquaredError, "squared_error") X(8, AlphaBeta, "alpha_beta") X(9, AlphaBetaAny, "alpha_beta <= 0")      \
  X(10, LogitMSE, "logit_mse") X(11, CenteredLogitMSE, "centered_logit_mse") X(12, DKD, "dkd")                 \
  X(13, BinaryKL, "binary_kl") X(14, AlphaBetaLimit, "alpha_beta = 0")

// The number that a divergence has with these parameters.
KD_FN int with_parameters(int divergence, const double* params) {
  constexpr int kAlphaBeta = 8, kAlphaBetaAny = 9, kAlphaBetaLimit = 14;
  if (divergence != kAlphaBeta || (params[0] > 0 && params[1] > 0)) return divergence;
  bool limit = params[0] >= 0 && params[1] >= 0 && params[0] + params[1] > 0;
  return limit ? kAlphaBetaLimit : kAlphaBetaAny;
}

}  // namespace
