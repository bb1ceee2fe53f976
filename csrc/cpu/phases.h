// What is done to a row: three phases (normalisers; sums of phi and g; gradient), the one of the divergences of logits, the
// mean of an ensemble before them, and the figures of KDStats.
#pragma once

namespace {

enum Hard { kNoHard, kSharedHard, kOwnHard };  // no hard term; one at T = 1 that shares q; one with its own softmax

// What all rows of a call share, in the working precision.
template <class R>
struct Frame {
  Reader z, v;
  int64_t classes;
  R cz, cv;      // what is read to exponents at temperature T
  R one;         // to exponents at T = 1, student
  R soft, hard;  // factors of the gradient, apart from the row's weight
};

template <bool kValue>
struct Is {
  static constexpr bool value = kValue;
};

// Where a row's gradient goes, and what it is multiplied by.
struct Output {
  void* row;
  int64_t type;
  double weight;  // upstream and the row's own, over what the mean divides by
  bool past_cache;
};

// Exponents c * x - ref of a block, relative to their maximum: ref = c * top. An infinite maximum makes the row NaN, as it
// does in any softmax.
//
// c * x - minus is rounded once, so that at the maximum the rounding error of c * top is left. Of a small ref it is nothing,
// of a large one it may be any exponent: there x is made relative to its maximum first, and minus is 0.
template <class R>
KD_FN bool is_large(R ref) {
  constexpr R kLarge = 1 << 20;
  return !(ref > -kLarge && ref < kLarge);
}

template <class R>
const R* relative_to(R top, const R* x, int64_t n, R* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] - top;
  return to;
}

template <class R>
struct Relative {
  const R* x;
  R top;
  bool large;

  R minus(R c) const { return large ? R(0) : top * c; }
  double ref(R c) const { return large ? (double)top * (double)c : (double)(top * c); }
};

// Of a block x, for exponents with either factor. Where they are -inf all over, ref is 0. `to` may be where x is.
template <class R>
Relative<R> relative(const R* x, int64_t n, R c, R other, R* to) {
  R top = maximum(x, n);
  if (top * c == -Real<R>::kInf || top * other == -Real<R>::kInf) top = 0;
  bool large = is_large(top * c) || is_large(top * other);
  return {large ? relative_to(top, x, n, to) : x, top, large};
}

// The same for all blocks of a row whose reference is that of its maximum.
template <class R>
struct RelativeToRow {
  R top, minus;
  bool large;

  RelativeToRow(double ref, double top) : top((R)top), minus((R)ref), large(is_large((R)ref)) {
    if (large) minus = 0;
  }
  const R* block(const R* x, int64_t n, R* to) const { return large ? relative_to(top, x, n, to) : x; }
};

// The address of what phase 1 prefetches while it works on class `begin` + i of a side: it computes for longer than a block
// takes to arrive, but the processor's own prefetcher only looks ahead while a row is being read. It may lie past the row,
// or past the tensor: a prefetch of no one's memory does nothing.
struct Ahead {
  const char* p;
  int64_t step;
  Ahead(const Reader& r, int64_t begin) : step(r.column * type_size(r.type)) { p = r.row + (begin + kAhead) * step; }
  KD_FN const char* at(int64_t i) const { return p + i * step; }
};

// What phase 1 keeps of a row, block by block relative to the block's own references: the student's exponentials, those
// of the teacher (or, where the student weighs, the terms of the cross sum), and the student's at T = 1 for the hard term.
template <class R>
struct Kept {
  R *z, *other, *one;          // [classes]; `one` is null where T = 1 or there is no hard term
  double *z_ref, *v_ref, *one_ref;  // [blocks]
  R *mixed, *mixed_no;         // [classes]; the teachers' mean, and where classes are binary, of their noes
  R* factors;                  // [classes]; of multiplicative noise on the student
};

// A phase goes through a row in the direction in which the last one did not: what was touched last is still in the cache,
// where what a long row keeps doesn't fit.
KD_FN int64_t blocks_of(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

// Phase 1. With kKeep false the loss is all that is wanted, and nothing is kept.
template <class R, class D, bool kOwnSum, bool kKeep>
void normalise(const Frame<R>& f, RowState& row, const Kept<R>& kept) {
  alignas(64) R z_block[kBlock], v_block[kBlock];
  row = RowState{};
  for (int64_t begin = 0, b = 0; begin < f.classes; begin += kBlock, ++b) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R* z = read(f.z, begin, n, z_block);
    R cz = f.cz, one = f.one;
    const Relative<R> of_z = relative(z, n, cz, one, z_block);
    Relative<R> of_v{};
    z = of_z.x;
    R rz = of_z.minus(cz), r1 = of_z.minus(one);
    R *keep_z = kept.z + begin, *keep_other = kept.other + begin, *keep_one = kept.one + begin;
    RowState block{};
    if constexpr (kReadsTeacher<D>) {
      const R* v = read(f.v, begin, n, v_block);
      R cv = f.cv;
      of_v = relative(v, n, cv, cv, v_block);
      v = of_v.x;
      R rv = of_v.minus(cv);
      Ahead next_z(f.z, begin), next_v(f.v, begin);
      R sums[4];
      accumulate(n, sums, [=](int64_t i, R(&term)[4]) KD_INLINE {
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
      block.z = {of_z.ref(cz), sums[0]};
      block.v = {of_v.ref(cv), sums[1]};
      block.cross = sums[2];
      if (kOwnSum) block.one = {of_z.ref(one), sums[3]};
    } else {
      R sums[1];
      accumulate(n, sums, [=](int64_t i, R(&term)[1]) KD_INLINE {
        term[0] = kd_exp(z[i] * cz - rz);
        if constexpr (kKeep) keep_z[i] = term[0];
      });
      block.z = {of_z.ref(cz), sums[0]};
    }
    if constexpr (kKeep) {
      kept.z_ref[b] = block.z.ref;
      kept.v_ref[b] = block.v.ref;
      kept.one_ref[b] = block.one.ref;
    }
    merge(row, block, D::kTeacherWeighs, D::kA, D::kB);
    if (row.z.ref == block.z.ref) row.top_z = of_z.top;
    if (row.v.ref == block.v.ref) row.top_v = of_v.top;
  }
}

// Phase 2: sums phi and g, and keeps g where the teacher's exponentials were.
template <class R, class D>
double sum_pairs(const Frame<R>& f, D d, RowState& row, const Kept<R>& kept) {
  alignas(64) R z_block[kBlock], v_block[kBlock];
  const RelativeToRow<R> of_z(row.z.ref, row.top_z), of_v(row.v.ref, row.top_v);
  R rz = of_z.minus, rv = of_v.minus, lz = (R)kd_log(row.z.sum), lv = (R)kd_log(row.v.sum), cz = f.cz, cv = f.cv;
  double phi_sum = 0, g_sum = 0;
  for (int64_t b = blocks_of(f.classes) - 1; b >= 0; --b) {
    int64_t begin = b * kBlock, n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R *z = nullptr, *v = nullptr, *ez = kept.z + begin;
    if constexpr (D::kLogs) {
      z = of_z.block(read(f.z, begin, n, z_block), n, z_block);
      v = of_v.block(read(f.v, begin, n, v_block), n, v_block);
    }
    R* ev_then_g = kept.other + begin;
    Ahead before_z(f.z, begin - kBlock - kAhead), before_v(f.v, begin - kBlock - kAhead);
    R to_q = (R)to_probability(row.z, kept.z_ref[b]), to_p = (R)to_probability(row.v, kept.v_ref[b]);
    R sums[2];
    accumulate(n, sums, [=](int64_t i, R(&term)[2]) KD_INLINE {
      // Two steps: one constant for both would lose the logarithm's digits beside a large reference.
      R lq = 0, lp = 0;
      if constexpr (D::kLogs) {
        lq = z[i] * cz - rz - lz;
        lp = v[i] * cv - rv - lv;
      }
      Terms<R> t = terms_of(d, lq, lp, ez[i] * to_q, ev_then_g[i] * to_p);
      term[0] = t.phi;
      term[1] = t.g;
      ev_then_g[i] = t.g;
    }, [=](int64_t i) {
      // The block before, which no hardware expects. Past the row's beginning it is no one's.
      __builtin_prefetch(before_z.at(i));
      __builtin_prefetch(before_v.at(i));
      __builtin_prefetch(ez + i - kBlock);
      __builtin_prefetch(ev_then_g + i - kBlock);
    });
    phi_sum += sums[0];
    g_sum += sums[1];
  }
  row.sum_g = g_sum;
  return phi_sum;
}

// The target against all others: its logits over T less the others' log-sum-exps.
struct Target {
  double y, u;          // the target's logits over T
  double phi, g;        // binary_kl of the margins
};

KD_FN double lse(const Side& side) { return side.sum == 0 ? -Real<double>::kInf : side.ref + kd_log(side.sum); }

KD_FN Target target_of(const RowState& others, double y, double u) {
  Terms<double> t = binary_kl(y - lse(others.z), u - lse(others.v));
  return {y, u, t.phi, t.g};
}

// Puts a single logit, as an exponent, back among those of a side.
KD_FN void include(Side& side, double exponent) {
  if (exponent != -Real<double>::kInf) merge(side, Side{exponent, 1});
}

// Multiplies a block of the gradient by the derivative of the logits with respect to the raw ones, apart from a scale that
// stands alone.
template <class R>
void through_post_processing(const Reader& z, int64_t begin, int64_t n, R* block) {
  alignas(64) R other[kBlock];
  if (z.noise && z.noise->active && z.noise->multiplicative) {
    const R* factor = (const R*)z.noise->factors + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) block[i] *= factor[i];
  }
  if (z.cap != 0) {  // d (c tanh(s z / c)) / d z
    const R* x = read(plain_reader(z.row, z.type, z.column), begin, n, other);
    R s = (R)z.scale, inner = (R)(z.scale / z.cap);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) block[i] *= s * tanh_slope_(x[i] * inner);
  }
}

// Phase 3: with q = to_q ez and so on, every gradient is W (A ez + B other) + Z ez + C e1, minus the hard term's one-hot.
// `label` is the class of the hard term, or -1. `all` is the softmax that a shared hard term has: the row's own, or where
// that leaves the target out, the one with it.
template <class R, class D, int kHard>
void write_gradient(const Frame<R>& f, const D& divergence, const RowState& row, const Side& all, const Target& target,
                    const Kept<R>& kept, int64_t label, const Output& out) {
  alignas(64) R block[kBlock];
  double soft = out.weight * f.soft, hard = label < 0 ? 0 : out.weight * f.hard;
  double d = 0, log_ratio = 0;          // of the reverse KL, whose gradient is q (l - D)
  double on_student = 1, on_teacher = 1;  // of a q - b p
  if constexpr (kReadsTeacher<D> && D::kCross && !D::kTeacherWeighs) {
    d = closed_form<R, D>(divergence, row);
    log_ratio = kd_log(row.z.sum) - kd_log(row.v.sum);
  }
  if constexpr (D::kTarget) {
    on_teacher = row.v.sum == 0 ? 0 : divergence.beta;
    on_student = on_teacher - divergence.alpha * target.g;
  }
  int64_t blocks = blocks_of(f.classes);
  for (int64_t i = 0; i < blocks; ++i) {
    int64_t b = D::kCross ? blocks - 1 - i : i;
    int64_t begin = b * kBlock, n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    double to_q = to_probability(row.z, kept.z_ref[b]), on_both = 0, on_z = 0, on_other = 0;
    if constexpr (kReadsTeacher<D>) {
      if constexpr (!D::kCross) {  // g - q sum g
        on_both = soft;
        on_z = -row.sum_g * to_q;
        on_other = 1;
      } else if constexpr (D::kTeacherWeighs) {  // q - p
        // The larger factor in front: where p = q, both others are 1 and the difference is exactly 0.
        // Where the others are impossible there is nothing to share.
        double of_q = D::kTarget && (on_student == 0 || row.z.sum == 0) ? 0 : on_student * to_q;
        double of_p = D::kTarget && on_teacher == 0 ? 0 : on_teacher * to_probability(row.v, kept.v_ref[b]);
        double size_q = of_q < 0 ? -of_q : of_q, size_p = of_p < 0 ? -of_p : of_p;
        double larger = size_q > size_p ? size_q : size_p;
        on_both = soft * larger;
        on_z = larger == 0 ? 0 : of_q / larger;
        on_other = larger == 0 ? 0 : -of_p / larger;
      } else {  // q (l - D); the kept terms are ez (y - u) of exponents relative to the block's references
        double shift = (kept.z_ref[b] - row.z.ref) - (kept.v_ref[b] - row.v.ref) - log_ratio;
        on_both = soft * to_q;
        on_z = shift - d;
        on_other = 1;
      }
    }

    const R *ez = kept.z + begin, *other = kept.other + begin, *e1 = kept.one + begin;
    R W = (R)on_both, A = (R)on_z, B = (R)on_other;
    R Z = kHard == kSharedHard ? (R)(hard * to_probability(all, kept.z_ref[b])) : R(0);
    R C = kHard == kOwnHard ? (R)(hard * to_probability(row.one, kept.one_ref[b])) : R(0);
    auto fill = [&](auto with_soft) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        R dz = 0;
        if constexpr (with_soft.value) dz = W * (A * ez[i] + B * other[i]);
        if constexpr (kHard == kSharedHard) dz += Z * ez[i];
        if constexpr (kHard == kOwnHard) dz += C * e1[i];
        block[i] = dz;
      }
    };
    // A term of weight 0 is absent, also where it is infinite.
    if (kReadsTeacher<D> && soft != 0)
      fill(Is<kReadsTeacher<D>>{});
    else
      fill(Is<false>{});
    if (label >= begin && label < begin + n) {
      if constexpr (D::kTarget) {
        double likely = 0;
        if (kHard == kSharedHard) likely = to_probability(all, target.y);
        if (kHard == kOwnHard) likely = to_probability(row.one, target.y * (double)f.one / (double)f.cz);
        double on_target = soft == 0 ? 0 : soft * divergence.alpha * target.g;
        block[label - begin] = (R)(on_target + hard * likely);
      }
      if (kHard != kNoHard) block[label - begin] -= (R)hard;
    }
    through_post_processing(f.z, begin, n, block);
    write(out.row, out.type, begin, n, block, out.past_cache);
  }
}

// The rows of the divergences of logits: loss and gradient in one read, since no sum of g is needed.
struct Plain {
  double soft, hard;
  bool bad;  // a target outside [0, 1]
};

// What is taken off the student's logits over T, so that the difference to the teacher's sums to 0 where it is finite.
template <class R>
double mean_difference(const Frame<R>& f) {
  alignas(64) R z_block[kBlock], v_block[kBlock];
  double sum = 0, count = 0;
  for (int64_t begin = 0; begin < f.classes; begin += kBlock) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R *z = read(f.z, begin, n, z_block), *v = read(f.v, begin, n, v_block);
    Ahead next_z(f.z, begin), next_v(f.v, begin);
    R cz = f.cz, cv = f.cv, sums[2];
    accumulate(n, sums, [=](int64_t i, R(&term)[2]) KD_INLINE {
      R difference = z[i] * cz - v[i] * cv;
      bool finite = difference - difference == 0;
      term[0] = finite ? difference : R(0);
      term[1] = finite ? R(1) : R(0);
    }, [=](int64_t i) {
      __builtin_prefetch(next_z.at(i));
      __builtin_prefetch(next_v.at(i));
    });
    sum += sums[0];
    count += sums[1];
  }
  return count == 0 ? 0 : sum / count;
}

// With `out` null the loss is all that is wanted. `targets` are the labels of a binary divergence, or null; `one` is the
// student's softmax at T = 1 of any other hard term, whose exponentials are kept.
template <class R, class D, int kHard>
Plain plain_row(const Frame<R>& f, const D& d, double mean, const Reader* targets, const Side& one,
                const Kept<R>& kept, int64_t label, const Output* out) {
  alignas(64) R z_block[kBlock], v_block[kBlock], t_block[kBlock], block[kBlock];
  Plain total{};
  R cz = f.cz, cv = f.cv, f1 = f.one, off = (R)mean;
  double weight = out ? out->weight : 0, hard = D::kBinary || label >= 0 ? weight * f.hard : 0;
  R W = (R)(weight * f.soft), H = (R)hard;
  for (int64_t begin = 0, b = 0; begin < f.classes; begin += kBlock, ++b) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R *z = read(f.z, begin, n, z_block), *v = read(f.v, begin, n, v_block), *t = z;
    if constexpr (D::kBinary && kHard != kNoHard) t = read(*targets, begin, n, t_block);
    Ahead next_z(f.z, begin), next_v(f.v, begin), next_t(*targets, begin);
    const R* e1 = kept.z + begin;
    R C = !D::kBinary && kHard != kNoHard ? (R)(hard * to_probability(one, kept.z_ref[b])) : R(0);
    R sums[3];
    accumulate(n, sums, [=, &block](int64_t i, R(&term)[3]) KD_INLINE {
      Terms<R> soft_terms = terms_of(d, z[i] * cz - off, v[i] * cv, R(0), R(0));
      R dz = W == 0 ? R(0) : W * soft_terms.g;  // a term of weight 0 is absent, also where it is infinite
      term[0] = soft_terms.phi;
      term[1] = term[2] = 0;
      if constexpr (D::kBinary && kHard != kNoHard) {
        Terms<R> hard_terms = binary_cross_entropy(z[i] * f1, t[i]);
        dz += H * hard_terms.g;
        term[1] = hard_terms.phi;
        term[2] = (t[i] >= 0) & (t[i] <= 1) ? R(0) : R(1);
      } else if constexpr (kHard != kNoHard) {
        dz += C * e1[i];
      }
      block[i] = dz;
    }, [=](int64_t i) {
      __builtin_prefetch(next_z.at(i));
      __builtin_prefetch(next_v.at(i));
      if constexpr (D::kBinary && kHard != kNoHard) __builtin_prefetch(next_t.at(i));
    });
    total.soft += sums[0];
    total.hard += sums[1];
    total.bad |= sums[2] != 0;
    if (!out) continue;
    if (!D::kBinary && kHard != kNoHard && label >= begin && label < begin + n) block[label - begin] -= (R)hard;
    through_post_processing(f.z, begin, n, block);
    write(out->row, out->type, begin, n, block, out->past_cache);
  }
  return total;
}

// Phase 0 of an ensemble: its mean as logits over T, whose softmax is that mean, in the row that is kept for it. A teacher
// of weight 0 is not looked at.
template <class R>
KD_FN R log_of_sum(R a, R b) {
  R larger = a > b ? a : b, smaller = a > b ? b : a;
  // Where both are impossible, so is their sum; the difference of a NaN is one.
  R apart = larger == -Real<R>::kInf ? larger : smaller - larger;
  return (a != a ? a : larger) + kd_log1p(kd_exp(apart));
}

template <class R>
void mix(const Reader* teachers, const double* to_exponent, const double* weights, int64_t count, int64_t classes,
         bool binary, const Kept<R>& kept) {
  alignas(64) R block[kBlock];
  bool first = true;
  for (int64_t m = 0; m < count; ++m) {
    double weight = weights[m];
    if (weight == 0) continue;
    const Reader& v = teachers[m];
    R c = (R)to_exponent[m], w = (R)weight, minus = 0;
    double ref = 0, top = 0;
    if (!binary) {
      Side side{};
      for (int64_t begin = 0; begin < classes; begin += kBlock) {
        int64_t n = classes - begin < kBlock ? classes - begin : kBlock;
        const R* x = read(v, begin, n, block);
        const Relative<R> of = relative(x, n, c, c, block);
        x = of.x;
        R local = of.minus(c), sums[1];
        accumulate(n, sums, [=](int64_t i, R(&term)[1]) KD_INLINE { term[0] = kd_exp(x[i] * c - local); });
        merge(side, Side{of.ref(c), sums[0]});
        if (side.ref == of.ref(c)) top = of.top;
      }
      ref = side.ref;
      minus = (R)(kd_log(side.sum) - kd_log(weight));
    }
    const RelativeToRow<R> relate(ref, top);
    const R shift = relate.minus;
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      int64_t n = classes - begin < kBlock ? classes - begin : kBlock;
      const R* x = relate.block(read(v, begin, n, block), n, block);
      R *to = kept.mixed + begin, *no = kept.mixed_no + begin;
      if (binary) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          R u = x[i] * c, e = kd_exp(u > 0 ? -u : u), rarer = w * e / (1 + e), likelier = w / (1 + e);
          to[i] = (first ? R(0) : to[i]) + (u > 0 ? likelier : rarer);
          no[i] = (first ? R(0) : no[i]) + (u > 0 ? rarer : likelier);
        }
      } else if (first) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = x[i] * c - shift - minus;
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = log_of_sum(to[i], x[i] * c - shift - minus);
      }
    }
    first = false;
  }
  if (first)  // no weight at all
    for (int64_t i = 0; i < classes; ++i) kept.mixed[i] = __builtin_nanf("");
  if (binary && !first)
#pragma omp simd
    for (int64_t i = 0; i < classes; ++i) {
      R yes = kept.mixed[i], no = kept.mixed_no[i];
      R log_yes = yes < Real<R>::kSmallest ? -Real<R>::kInf : log_(yes);
      R log_no = no < Real<R>::kSmallest ? -Real<R>::kInf : log_(no);
      kept.mixed[i] = yes != yes ? yes : log_yes - log_no;
    }
}

// ------------------------------------------------------------------------------------------ figures

template <class R>
double entropy(const Reader& r, const Side& side, double row_top, R c, int64_t classes, int64_t* best) {
  alignas(64) R block[kBlock];
  const RelativeToRow<R> relate(side.ref, row_top);
  R ref = relate.minus, top = -Real<R>::kInf;
  double x = 0;
  *best = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    int64_t n = classes - begin < kBlock ? classes - begin : kBlock;
    const R* w = relate.block(read(r, begin, n, block), n, block);
    R sums[1];
    accumulate(n, sums, [=](int64_t i, R(&term)[1]) KD_INLINE {
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

// Of binary classes: entropies of both sides at T, and on how many classes the student is on the side of the teacher and
// of the target.
struct BinaryFigures {
  double entropy_z, entropy_v, agrees, correct;
};

template <class R>
BinaryFigures binary_figures(const Frame<R>& f, const Reader* targets) {
  alignas(64) R z_block[kBlock], v_block[kBlock], t_block[kBlock];
  BinaryFigures total{};
  for (int64_t begin = 0; begin < f.classes; begin += kBlock) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    const R *z = read(f.z, begin, n, z_block), *v = read(f.v, begin, n, v_block);
    const R* t = targets ? read(*targets, begin, n, t_block) : z;
    R cz = f.cz, cv = f.cv, sums[4];
    accumulate(n, sums, [=](int64_t i, R(&term)[4]) KD_INLINE {
      term[0] = binary_entropy(z[i] * cz);
      term[1] = binary_entropy(v[i] * cv);
      term[2] = (z[i] > 0) == (v[i] > 0) ? R(1) : R(0);
      term[3] = (z[i] > 0) == (t[i] > R(0.5)) ? R(1) : R(0);
    });
    total.entropy_z += sums[0];
    total.entropy_v += sums[1];
    total.agrees += sums[2];
    total.correct += sums[3];
  }
  total.agrees /= f.classes;
  total.correct /= f.classes;
  return total;
}

}  // namespace
