// Rows of a stored teacher: k classes and what is in the tail. Read once: the normaliser of the classes that are not stored
// and, while they pass, the logits of those that are; k terms in double; and once more, out of the cache, for the gradient,
// whose exponentials are computed again, since a row of them kept would be more memory than all that is stored.
#pragma once

namespace {

// Numbers of one row, by stored class, and in the end by the tail.
struct Entries {
  double *logits, *lq, *lp, *g;
  void* memory = nullptr;

  bool allocate(int64_t k) {
    memory = malloc(sizeof(double) * 4 * (k + 1));
    logits = (double*)memory;
    lq = logits + (k + 1);
    lp = lq + (k + 1);
    g = lp + (k + 1);
    return memory != nullptr;
  }
  ~Entries() { free(memory); }
};

// Sums phi, and g in `sum_g`, over n classes.
template <class D>
double stored_terms(const double* params, int64_t n, const double* lq, const double* lp, double* g, double* sum_g) {
  D d;
  memcpy((void*)&d, params, sizeof d);
  double sums[2];
  accumulate(n, sums, [=](int64_t i, double(&term)[2]) KD_INLINE {
    Terms<double> t = terms_of(d, lq[i], lp[i], kd_exp(lq[i]), kd_exp(lp[i]));
    term[0] = t.phi;
    term[1] = g[i] = t.g;
  });
  *sum_g = sums[1];
  return sums[0];
}

inline StoredTerms stored_terms_of(int divergence) {
#define KD_STORED(number, D, name)                                                                        \
  if constexpr (D<double>::kNormaliser == kSoftmax && !D<double>::kTarget && !D<double>::kBinary)         \
    if (divergence == number) return stored_terms<D<double>>;
  KD_DIVERGENCES(KD_STORED)
#undef KD_STORED
  return nullptr;
}

// Class i of a block, read where it is used.
template <class R>
struct InPlace {
  const R* x;
  KD_FN R operator()(int64_t i) const { return x[i]; }
};
template <class R>
struct FromBFloat16 {
  const uint16_t* x;
  KD_FN R operator()(int64_t i) const { return (R)from_bfloat16(x[i]); }
};

// `read` of any number of classes.
template <class R>
const R* read_run(const Reader& r, int64_t begin, int64_t n, R* to) {
  const R* first = read(r, begin, n < kBlock ? n : kBlock, to);
  if (first != to) return first;
  for (int64_t i = kBlock; i < n; i += kBlock) read(r, begin + i, n - i < kBlock ? n - i : kBlock, to + i);
  return to;
}

// Calls f with what reads classes [begin, begin + n): a block of bfloat16 isn't written down first.
template <class R, class F>
KD_FN void with_block(const Reader& r, int64_t begin, int64_t n, R* block, F f) {
  if (r.type == kBFloat16 && r.column == 1 && !r.scales() && r.excluded < 0)
    f(FromBFloat16<R>{(const uint16_t*)r.row + begin});
  else
    f(InPlace<R>{read_run(r, begin, n, block)});
}

// Exponentials of exponents in units: powers of two of floats, which take fewer operations than those of e, and powers of e.
template <class R>
struct Powers {
  static constexpr double kUnit = 1;  // units in 1
  static KD_FN R raise(R x) { return kd_exp(x); }
};

template <>
struct Powers<float> {
  static constexpr double kUnit = 1.4426950408889634;
  // 2^x of x <= 127; 0 where that is not a normal number. 2^f - 1 on |f| <= 1/2 by a polynomial whose error is 3e-9 of 2^f.
  static KD_FN float raise(float x) {
    x = x < -127 ? -127 : x;  // as a maximum in which NaN stays NaN
    const float rounded = x + Real<float>::kRound, f = x - (rounded - Real<float>::kRound);
    float p = 1.55946782e-4f;
    p = p * f + 1.34066439e-3f;
    p = p * f + 9.61769297e-3f;
    p = p * f + 5.55031055e-2f;
    p = p * f + 2.40226528e-1f;
    p = p * f + 6.93147215e-1f;
    p = p * f + 1;
    return p * bits<float>((bits<unsigned>(rounded) << 23) + (unsigned)Real<float>::kOne);
  }
};

// What the student's logits are multiplied by to be exponents, in units and in all digits of what that comes to.
template <class R>
struct Factors {
  R at_T, at_one;
  double y, one;
  explicit Factors(const Frame<R>& f)
      : at_T((R)(f.cz * Powers<R>::kUnit)), at_one((R)(f.one * Powers<R>::kUnit)), y(at_T / Powers<R>::kUnit),
        one(at_one / Powers<R>::kUnit) {}
};

// Classes of a row whose sums stay in lanes of the working precision until they are added up in double. In blocks of kBlock,
// of which those that hold a stored class were copied, the loss of (64, 128,256) took 3.05 ms of one thread, and takes 2.53 in place.
constexpr int64_t kRun = 4096;

// Sums of e^(c x - minus) with two factors, and the largest x, in lanes.
template <class R, bool kOwn>
struct Exponentials {
  static constexpr int kLanes = 64 / sizeof(R);
  R cz, rz, one, r1;
  alignas(64) R at_T[kLanes] = {}, at_one[kLanes] = {}, largest[kLanes];

  Exponentials(R cz, R rz, R one, R r1) : cz(cz), rz(rz), one(one), r1(r1) {
    for (int l = 0; l < kLanes; ++l) largest[l] = -Real<R>::kInf;
  }
  template <class X>
  KD_FN void add(X x, int64_t begin, int64_t end, Ahead next) {
    const R cz = this->cz, rz = this->rz, one = this->one, r1 = this->r1;
    alignas(64) R sum[kLanes], other[kLanes], top[kLanes];
    for (int l = 0; l < kLanes; ++l) sum[l] = at_T[l], other[l] = at_one[l], top[l] = largest[l];
    auto each = [&](int64_t i, int l) KD_INLINE {
      const R y = x(i);
      top[l] = y > top[l] ? y : top[l];
      sum[l] += Powers<R>::raise(y * cz - rz);
      if constexpr (kOwn) other[l] += Powers<R>::raise(y * one - r1);
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      __builtin_prefetch(next.at(i));
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) each(i + l, l);
    }
    for (int l = 0; i < end; ++i, ++l) each(i, l);
    for (int l = 0; l < kLanes; ++l) at_T[l] = sum[l], at_one[l] = other[l], largest[l] = top[l];
  }
  static double total(const R* lane) {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lane[l];
    return sum;
  }
};

// The normaliser of what is not stored, at T and, with kOwn, at T = 1; the logits of what is go to `logits`. Ids rise, but
// for those below 0, which are none.
//
// Exponents are relative to the largest logit so far, so that classes are gone through once, in place; where one is far
// above it, they are done again relative to their own. Lanes that hold a stored class are copied, and that made impossible.
template <class R, bool kOwn>
void normalise_rest(const Frame<R>& f, const Factors<R>& by, const int64_t* ids, int64_t k, double* logits, RowState& row) {
  constexpr R kFar = 16;  // units: 2^16 or e^16 times kRun is far from overflowing
  constexpr int kLanes = Exponentials<R, kOwn>::kLanes;
  alignas(64) R block[kRun], group[kLanes];
  const R cz = by.at_T, one = by.at_one;
  row = RowState{};
  int64_t next = 0;
  for (int64_t begin = 0; begin < f.classes; begin += kRun) {
    const int64_t n = f.classes - begin < kRun ? f.classes - begin : kRun, first = next;
    const R so_far = (R)row.top_z, rz = so_far * cz, r1 = so_far * one;
    const bool in_place = row.z.sum > 0 && !is_large(rz) && !is_large(r1);
    Exponentials<R, kOwn> sums(cz, rz, one, r1);
    const Ahead ahead(f.z, begin);
    with_block(f.z, begin, n, block, [&](auto x) KD_INLINE {
      int64_t done = 0;
      while (next < k && ids[next] < begin + n) {
        if (ids[next] < 0) {
          ++next;
          continue;
        }
        const int64_t from = (ids[next] - begin) / kLanes * kLanes, to = from + kLanes < n ? from + kLanes : n;
        for (int l = 0; l < kLanes; ++l) group[l] = from + l < n ? x(from + l) : -Real<R>::kInf;
        for (; next < k && ids[next] < begin + to; ++next) {
          if (ids[next] < 0) continue;
          logits[next] = group[ids[next] - begin - from];
          group[ids[next] - begin - from] = -Real<R>::kInf;
        }
        if (in_place) {
          sums.add(x, done, from, ahead);
          sums.add(InPlace<R>{group}, 0, kLanes, ahead);
        }
        done = to;
      }
      if (in_place) sums.add(x, done, n, ahead);
    });
    if (in_place && !((maximum(sums.largest, kLanes) - so_far) * (cz > one ? cz : one) > kFar)) {
      row.z.sum += sums.total(sums.at_T);
      if (kOwn) row.one.sum += sums.total(sums.at_one);
      continue;
    }
    const R* z = read_run(f.z, begin, n, block);
    if (z != block) memcpy(block, z, n * sizeof(R));
    for (int64_t i = first; i < next; ++i)
      if (ids[i] >= 0) block[ids[i] - begin] = -Real<R>::kInf;
    const Relative<R> of = relative(block, n, cz, one, block);
    Exponentials<R, kOwn> own(cz, of.minus(cz), one, of.minus(one));
    own.add(InPlace<R>{of.x}, 0, n, ahead);
    auto ref = [&](R minus, double c) { return of.large ? of.top * c : minus / Powers<R>::kUnit; };
    const Side part{ref(own.rz, by.y), own.total(own.at_T)};
    merge(row.z, part);
    if (kOwn) merge(row.one, Side{ref(own.r1, by.one), own.total(own.at_one)});
    if (row.z.ref == part.ref) row.top_z = of.top;
  }
}

// The softmax of exponents c x of the stored classes.
KD_FN Side stored_side(const int64_t* ids, int64_t k, const double* logits, double c) {
  double top = -Real<double>::kInf, sum = 0;
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0 && !(logits[i] * c <= top)) top = logits[i] * c;
  if (top == -Real<double>::kInf) return {0, 0};
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) sum += kd_exp(logits[i] * c - top);
  return {top, sum};
}

KD_FN Side both(Side a, Side b) {
  merge(a, b);
  return a;
}

// What the gradient of a row is made of.
struct StoredRow {
  RowState rest;    // of what is not stored
  Side soft, whole, one;  // what the soft term is normalised by; all classes at T, and at T = 1
  double sum_g, g_rest;
};

// Of a class that is not stored: soft (g_rest e / rest - G e / all) + hard softmax. Where it is stored, the k corrections.
template <class R, int kHard>
void write_stored_gradient(const Frame<R>& f, const Factors<R>& by, const StoredRow& row, const Entries& entries,
                           const int64_t* ids, int64_t k, bool tail, int64_t label, const Output& out) {
  alignas(64) R block[kBlock];
  const double soft = out.weight * f.soft, hard = label < 0 ? 0 : out.weight * f.hard;
  const Side& rest = row.rest.z;
  double on_rest = 0;
  if (tail && soft != 0 && rest.sum != 0)
    on_rest = soft * (row.g_rest / rest.sum - row.sum_g * to_probability(row.soft, rest.ref));
  if (kHard == kSharedHard && rest.sum != 0) on_rest += hard * to_probability(row.whole, rest.ref);
  const double on_one = kHard == kOwnHard && row.rest.one.sum != 0 ? hard * to_probability(row.one, row.rest.one.ref) : 0;
  const RelativeToRow<R> of_z(rest.ref * Powers<R>::kUnit, row.rest.top_z);
  const RelativeToRow<R> of_one(row.rest.one.ref * Powers<R>::kUnit, row.rest.top_z);
  const R A = (R)on_rest, C = (R)on_one, cz = by.at_T, one = by.at_one, rz = of_z.minus, r1 = of_one.minus;
  auto gradient = [=](R z, R z1) KD_INLINE {
    R dz = A * Powers<R>::raise(z * cz - rz);
    if constexpr (kHard == kOwnHard) dz += C * Powers<R>::raise(z1 * one - r1);
    return dz;
  };
  int64_t next = k - 1;
  for (int64_t b = blocks_of(f.classes) - 1; b >= 0; --b) {
    int64_t begin = b * kBlock, n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    if (A == 0 && C == 0) {
      memset(block, 0, n * sizeof(R));
    } else if (of_z.large || of_one.large) {
      alignas(64) R at_T[kBlock], at_one[kBlock];
      const R* x = read(f.z, begin, n, at_T);
      const R *z1 = of_one.block(x, n, at_one), *z = of_z.block(x, n, at_T);
      for (int64_t i = 0; i < n; ++i) block[i] = gradient(z[i], z1[i]);
    } else {
      Ahead before(f.z, begin - kBlock - kAhead);
      R* to = block;
      alignas(64) R read_block[kBlock];
      with_block(f.z, begin, n, read_block, [=](auto x) KD_INLINE {
        constexpr int kLanes = 64 / sizeof(R);
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
          __builtin_prefetch(before.at(i));
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) to[i + l] = gradient(x(i + l), x(i + l));
        }
        for (; i < n; ++i) to[i] = gradient(x(i), x(i));
      });
    }
    for (; next >= 0 && (ids[next] < 0 || ids[next] >= begin); --next) {
      if (ids[next] < 0) continue;
      const double x = entries.logits[next];
      double dz = soft == 0 ? 0 : soft * (entries.g[next] - kd_exp(entries.lq[next]) * row.sum_g);
      if (kHard == kSharedHard) dz += hard * to_probability(row.whole, x * by.y);
      if (kHard == kOwnHard) dz += hard * to_probability(row.one, x * by.one);
      block[ids[next] - begin] = (R)dz;
    }
    if (kHard != kNoHard && label >= begin && label < begin + n) block[label - begin] -= (R)hard;
    through_post_processing(f.z, begin, n, block);
    write(out.row, out.type, begin, n, block, out.past_cache);
  }
}

// Figures of KDStats: entropies, the teacher's with its tail as one class, and the most probable classes, of the teacher's
// those that are stored.
template <class R>
void describe_stored(const Frame<R>& f, const Kept<R>& kept, const int64_t* ids, int64_t k, const double* lp, bool tail,
                     int64_t label, double* figures) {
  RowState row{};
  normalise<R, NoDivergence<R>, false, false>(f, row, kept);
  int64_t best_z, best_v = -1;
  figures[kRowEntropyZ] = entropy<R>(f.z, row.z, row.top_z, f.cz, f.classes, &best_z);
  double x = 0, top = -Real<double>::kInf;
  for (int64_t i = 0; i < (tail ? k + 1 : k); ++i) {
    const double p = kd_exp(lp[i]);
    x -= p > 0 ? p * lp[i] : p;
    if (i == k || !(lp[i] > top)) continue;
    top = lp[i];
    best_v = ids[i];
  }
  figures[kRowEntropyV] = x;
  figures[kRowAgrees] = best_z == best_v;
  figures[kRowCorrect] = label >= 0 && best_z == label;
}

template <class R, int kHard>
void do_stored_rows(int64_t first, int64_t last, void* context) {
  Job<R>& job = *(Job<R>*)context;
  const KdOptions& o = *job.o;
  const KdCall& c = *job.c;
  const int64_t k = c.stored;
  const bool tail = c.rest != nullptr, writes = c.mode != kLoss;
  Frame<R> f = frame_of<R>(o, c, o.temperature);
  const Factors<R> by(f);
  Entries entries;
  Scratch<R> scratch;
  if (!entries.allocate(k) || !scratch.allocate(c.classes, false, false, false, false, writes && o.z_noise.kind == 2, 0)) {
    __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t n = first; n < last; ++n) {
    if (skips(job, n)) continue;
    double* figures = figures_of(job, n);
    const int64_t* ids = c.ids + n * k;
    RowNoise z_noise{};
    if (o.z_noise.kind) z_noise = noise_of_row<R>(o.z_noise, c.z_seed, n, kStudentStream);
    z_noise.factors = scratch.kept.factors;
    f.z = reader_of(c, c.side[0], n, o.z_noise.kind ? &z_noise : nullptr);
    const int64_t label = job.uses_labels && is_labelled(o, c, n) ? c.labels[n] : -1;
    R one[1];
    const double at_label = label < 0 ? 0 : (double)*read(f.z, label, 1, one);

    StoredRow row{};
    // Of classes that nothing is about, nothing is read.
    if (tail || kHard != kNoHard || o.z_noise.kind)
      normalise_rest<R, kHard == kOwnHard>(f, by, ids, k, entries.logits, row.rest);
    else
      for (int64_t i = 0; i < k; ++i) entries.logits[i] = ids[i] < 0 ? 0 : (double)*read(f.z, ids[i], 1, one);
    const Side stored = stored_side(ids, k, entries.logits, by.y);
    row.whole = both(row.rest.z, stored);
    row.soft = tail ? row.whole : stored;
    row.one = kHard == kOwnHard ? both(row.rest.one, stored_side(ids, k, entries.logits, by.one)) : row.whole;

    const double log_sum = kd_log(row.soft.sum);
    for (int64_t i = 0; i < k; ++i) {
      const double y = entries.logits[i] * by.y - row.soft.ref - log_sum;
      entries.lq[i] = ids[i] < 0 || row.soft.sum == 0 ? -Real<double>::kInf : y;
      entries.lp[i] = (double)((const R*)c.log_p)[n * k + i];
    }
    if (tail) {
      entries.lq[k] = row.rest.z.sum == 0 ? -Real<double>::kInf : lse(row.rest.z) - row.soft.ref - log_sum;
      entries.lp[k] = (double)((const R*)c.rest)[n];
    }
    double soft = job.stored_terms(o.params, tail ? k + 1 : k, entries.lq, entries.lp, entries.g, &row.sum_g);
    if (c.extra) soft += (double)((const R*)c.extra)[n];
    row.g_rest = tail ? entries.g[k] : 0;

    double hard = 0;
    if (kHard != kNoHard && label >= 0) hard = kd_log(row.one.sum) - (at_label * by.one - row.one.ref);
    if (o.stats && figures) describe_stored(f, scratch.kept, ids, k, entries.lp, tail, label, figures);
    if (writes) write_stored_gradient<R, kHard>(f, by, row, entries, ids, k, tail, label, output_of(job, n));
    put_loss(job, n, soft, hard);
  }
#if defined(__x86_64__)
  if (writes && job.past_cache) _mm_sfence();
#endif
}

}  // namespace
