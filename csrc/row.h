// The state of one row between the phases: normalisers of both sides and the cross sum, merged part by part. A part is what
// is summed relative to a reference of its own: a block of a row on a CPU, what one thread has of it on a GPU. So the
// precision doesn't depend on where the maximum stands in the row, and a row is read once.
//
// The includer provides KD_FN and KD_INFINITY; kd_sum, the type of sums; kd_ref, what exponents are relative to, with
// kd_apart(a, b), the exponent a - b; kd_raise(x), e^x, or 2^x where exponents are powers of two; and kd_log(x), log x of a
// sum.
#pragma once

namespace {

// ------------------------------------------------------------------------------------------ sums

// One softmax: the reference that its exponents are relative to (about their maximum; 0 where nothing is finite), and
// their sum.
struct Side {
  kd_ref ref;
  kd_sum sum;
};

struct RowState {
  Side z, v;     // student and teacher at temperature T
  Side one;      // the student at T = 1, where the hard term needs its own
  kd_sum cross;  // sum e^a (A a + B b) of a Cross divergence
  kd_sum sum_g;  // sum of g of a Pair divergence
  kd_sum top_z, top_v;  // the raw logits that the references at T are of
};

// How far exponents move, and what their sum is multiplied by.
struct Shift {
  kd_sum by, factor;
};

KD_FN kd_sum factor_of(kd_sum by) { return by == 0 ? kd_sum(1) : kd_raise(by); }

// Takes a side relative to another reference. One with no mass has nothing that a shift would change.
KD_FN Shift move(Side& side, kd_ref to) {
  kd_sum by = side.sum == 0 ? kd_sum(0) : kd_apart(side.ref, to);
  Shift s{by, factor_of(by)};
  side.ref = to;
  side.sum *= s.factor;
  return s;
}

// The same of a row. A and B are the coefficients of the cross sum, whose weights are the teacher's or the student's.
KD_FN void move(RowState& row, kd_ref z, kd_ref v, kd_ref one, bool teacher_weighs, kd_sum A, kd_sum B) {
  kd_sum mass = teacher_weighs ? row.v.sum : row.z.sum;
  Shift of_z = move(row.z, z), of_v = move(row.v, v);
  move(row.one, one);
  const Shift &a = teacher_weighs ? of_v : of_z, &b = teacher_weighs ? of_z : of_v;
  // What weighs nothing any more is gone, infinite or not.
  row.cross = mass == 0 || a.factor == 0 ? kd_sum(0) : a.factor * (row.cross + mass * (A * a.by + B * b.by));
}

// The reference of two parts together: the larger one, of those that have mass.
KD_FN kd_ref common(const Side& a, const Side& b) {
  if (a.sum == 0) return b.ref;
  if (b.sum == 0) return a.ref;
  return kd_apart(b.ref, a.ref) > 0 ? b.ref : a.ref;
}

KD_FN void merge(Side& row, Side part) {
  kd_ref ref = common(row, part);
  move(row, ref);
  move(part, ref);
  row.sum += part.sum;
}

KD_FN void merge(RowState& row, RowState part, bool teacher_weighs, kd_sum A, kd_sum B) {
  kd_ref z = common(row.z, part.z), v = common(row.v, part.v), one = common(row.one, part.one);
  move(row, z, v, one, teacher_weighs, A, B);
  move(part, z, v, one, teacher_weighs, A, B);
  row.z.sum += part.z.sum;
  row.v.sum += part.v.sum;
  row.one.sum += part.one.sum;
  row.cross += part.cross;
}

// What a kept exponential is multiplied by to be a probability.
KD_FN kd_sum to_probability(const Side& side, kd_ref ref) { return factor_of(kd_apart(ref, side.ref)) / side.sum; }

// ------------------------------------------------------------------------------------------ divergences in a row

template <class R>
constexpr R kImpossible = -R(KD_INFINITY);

// No soft term: the hard one alone.
template <class R>
struct NoDivergence : Pair<R> {
  using Reads = NoDivergence;
  using Writes = NoDivergence;
  static constexpr bool kCross = true;
  R unused[4];
};
template <class D>
constexpr bool kReadsTeacher = true;
template <class R>
constexpr bool kReadsTeacher<NoDivergence<R>> = false;

// The frame's part of a pair: a class that neither side can produce contributes nothing.
template <class R, class D>
KD_FN Terms<R> terms_of(const D& d, R lq, R lp, R q, R p) {
  Terms<R> t = d.terms(lq, lp, q, p);
  if constexpr (D::kGuarded) return t;
  bool dead = lq == kImpossible<R> && lp == kImpossible<R>;
  return {dead ? R(0) : t.phi, dead ? R(0) : t.g};
}

// D of a row from its state, for the divergences that need no second phase.
template <class R, class D>
KD_FN kd_sum closed_form(const D& d, const RowState& row) {
  const Side &a = D::kTeacherWeighs ? row.v : row.z, &b = D::kTeacherWeighs ? row.z : row.v;
  // Where the teacher is sure of the target, the others share nothing.
  if constexpr (D::kTarget) {
    if (a.sum == 0 || d.beta == 0) return 0;
    // What the student gives none of the others is infinitely far.
    if (b.sum == 0) return d.beta * -kImpossible<kd_sum>;
  }
  return d.value(row.cross, a.sum, kd_log(a.sum), kd_log(b.sum));
}

template <class R>
KD_FN R binary_entropy(R x) {
  R size = x < 0 ? -x : x, e = kd_exp(-size);
  return kd_log1p(e) + (e > 0 ? size * e / (1 + e) : R(0));
}

}  // namespace
