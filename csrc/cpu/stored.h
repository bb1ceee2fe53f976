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
using StoredTerms = double (*)(const double* params, int64_t n, const double* lq, const double* lp, double* g, double* sum_g);

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

// Calls f with what reads classes [begin, begin + n): a block of bfloat16 isn't written down first.
template <class R, class F>
KD_FN void with_block(const Reader& r, int64_t begin, int64_t n, R* block, F f) {
  if (r.type == kBFloat16 && r.column == 1 && !r.scales() && r.excluded < 0)
    f(FromBFloat16<R>{(const uint16_t*)r.row + begin});
  else
    f(InPlace<R>{read(r, begin, n, block)});
}

// Sums of e^(c x - minus) with two factors, and the largest x.
template <bool kOwn, class R, class X>
KD_FN void exponentials(X x, int64_t n, R cz, R rz, R one, R r1, Ahead next, R (&sums)[2], R& top) {
  constexpr int kLanes = 64 / sizeof(R);
  alignas(64) R at_T[kLanes] = {}, at_one[kLanes] = {}, largest[kLanes];
  for (int l = 0; l < kLanes; ++l) largest[l] = -Real<R>::kInf;
  auto each = [&](int64_t i, int l) KD_INLINE {
    const R y = x(i);
    largest[l] = y > largest[l] ? y : largest[l];
    at_T[l] += kd_exp(y * cz - rz);
    if constexpr (kOwn) at_one[l] += kd_exp(y * one - r1);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(next.at(i));
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) each(i + l, l);
  }
  for (int l = 0; i < n; ++i, ++l) each(i, l);
  top = maximum(largest, kLanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) {
      at_T[l] += at_T[l + half];
      at_one[l] += at_one[l + half];
    }
  sums[0] = at_T[0];
  sums[1] = at_one[0];
}

// The normaliser of what is not stored, at T and, with kOwn, at T = 1; the logits of what is go to `logits`. Ids rise, but
// for those below 0, which are none.
//
// Exponents are relative to the largest logit so far, so that a block is gone through once; where one is far above it, the
// block is done again relative to its own.
template <class R, bool kOwn>
void normalise_rest(const Frame<R>& f, const int64_t* ids, int64_t k, double* logits, RowState& row) {
  constexpr R kFar = 16;  // e^16 of a block's classes are far from overflowing
  alignas(64) R block[kBlock];
  const R cz = f.cz, one = f.one;
  row = RowState{};
  int64_t next = 0;
  for (int64_t begin = 0; begin < f.classes; begin += kBlock) {
    int64_t n = f.classes - begin < kBlock ? f.classes - begin : kBlock;
    bool holds = false;
    for (; next < k && ids[next] < begin + n; ++next) {
      if (ids[next] < 0) continue;
      if (!holds) {
        const R* z = read(f.z, begin, n, block);
        R* to = block;
        if (z != block) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) to[i] = z[i];  // gcc's own copy of a block takes twice as long
        }
        holds = true;
      }
      logits[next] = block[ids[next] - begin];
      block[ids[next] - begin] = -Real<R>::kInf;
    }
    const R so_far = (R)row.top_z, rz = so_far * cz, r1 = so_far * one;
    if (row.z.sum > 0 && !is_large(rz) && !is_large(r1)) {
      R sums[2], top;
      auto go = [&](auto x) KD_INLINE { exponentials<kOwn>(x, n, cz, rz, one, r1, Ahead(f.z, begin), sums, top); };
      if (holds)
        go(InPlace<R>{block});
      else
        with_block(f.z, begin, n, block, go);
      if (!((top - so_far) * (cz > one ? cz : one) > kFar)) {
        row.z.sum += sums[0];
        if (kOwn) row.one.sum += sums[1];
        continue;
      }
    }
    const R* z = holds ? block : read(f.z, begin, n, block);
    const Relative<R> of = relative(z, n, cz, one, block);
    z = of.x;
    R sums[2], top;
    exponentials<kOwn>(InPlace<R>{z}, n, cz, of.minus(cz), one, of.minus(one), Ahead(f.z, begin), sums, top);
    const Side part{of.ref(cz), sums[0]};
    merge(row.z, part);
    if (kOwn) merge(row.one, Side{of.ref(one), sums[1]});
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
void write_stored_gradient(const Frame<R>& f, const StoredRow& row, const Entries& entries, const int64_t* ids, int64_t k,
                           bool tail, int64_t label, const Output& out) {
  alignas(64) R block[kBlock];
  const double soft = out.weight * f.soft, hard = label < 0 ? 0 : out.weight * f.hard;
  const Side& rest = row.rest.z;
  double on_rest = 0;
  if (tail && soft != 0 && rest.sum != 0)
    on_rest = soft * (row.g_rest / rest.sum - row.sum_g * to_probability(row.soft, rest.ref));
  if (kHard == kSharedHard && rest.sum != 0) on_rest += hard * to_probability(row.whole, rest.ref);
  const double on_one = kHard == kOwnHard && row.rest.one.sum != 0 ? hard * to_probability(row.one, row.rest.one.ref) : 0;
  const RelativeToRow<R> of_z(rest.ref, row.rest.top_z), of_one(row.rest.one.ref, row.rest.top_z);
  const R A = (R)on_rest, C = (R)on_one, cz = f.cz, one = f.one, rz = of_z.minus, r1 = of_one.minus;
  auto gradient = [=](R z, R z1) KD_INLINE {
    R dz = A * kd_exp(z * cz - rz);
    if constexpr (kHard == kOwnHard) dz += C * kd_exp(z1 * one - r1);
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
      if (kHard == kSharedHard) dz += hard * to_probability(row.whole, x * (double)f.cz);
      if (kHard == kOwnHard) dz += hard * to_probability(row.one, x * (double)f.one);
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
      normalise_rest<R, kHard == kOwnHard>(f, ids, k, entries.logits, row.rest);
    else
      for (int64_t i = 0; i < k; ++i) entries.logits[i] = ids[i] < 0 ? 0 : (double)*read(f.z, ids[i], 1, one);
    const Side stored = stored_side(ids, k, entries.logits, (double)f.cz);
    row.whole = both(row.rest.z, stored);
    row.soft = tail ? row.whole : stored;
    row.one = kHard == kOwnHard ? both(row.rest.one, stored_side(ids, k, entries.logits, (double)f.one)) : row.whole;

    const double log_sum = kd_log(row.soft.sum);
    for (int64_t i = 0; i < k; ++i) {
      const double y = entries.logits[i] * (double)f.cz - row.soft.ref - log_sum;
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
    if (kHard != kNoHard && label >= 0) hard = kd_log(row.one.sum) - (at_label * (double)f.one - row.one.ref);
    if (o.stats && figures) describe_stored(f, scratch.kept, ids, k, entries.lp, tail, label, figures);
    if (writes) write_stored_gradient<R, kHard>(f, row, entries, ids, k, tail, label, output_of(job, n));
    put_loss(job, n, soft, hard);
  }
#if defined(__x86_64__)
  if (writes && job.past_cache) _mm_sfence();
#endif
}

}  // namespace
