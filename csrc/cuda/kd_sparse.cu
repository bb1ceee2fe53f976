// The row kernel for a stored teacher: of each row a list of classes with their log-probabilities, and of all others together
// one number, the tail. kdkernels/reference.py (`stored_term`) says what is computed, kd_cuda.cu has what both kernels share.
//
// The student's row alone is on chip, half of what two logits take, and next to it a bit for every class that is stored.
// (1) Two softmaxes, of the classes that are stored and of the rest, each relative to its own largest logit, so that neither
// mass is ever 1 minus the other. (2) The terms of the stored classes, each by a thread of the block that has the class, and
// that of the tail. (3) Their gradients are put in the place of their logits, where the last pass over the row finds them:
// of all other classes the gradient is a number of the row times e^y.
#include "kd_cuda.cu"

namespace {

// What a stored teacher adds to the record, in the same units.
struct KdStored {
  KdRows rows;
  const long long* ids;  // [rows, k]; those below 0 are none, all others are there once
  const float* log_p;    // [rows, k]
  const float* rest;     // [rows], log of the tail's mass; or null: both sides are over the stored classes alone
  const float* extra;    // [rows] or null; added to D
  long long k;
};

template <class C>
struct StoredRows : Rows<C> {
  using Base = Rows<C>;
  using D = typename Base::D;
  using Exponents = typename Base::Exponents;
  using Base::kEach, Base::kSize, Base::kType, Base::kWrites, Base::kTells, Base::kHasHard, Base::kOwn, Base::kPacked;
  using Base::kNever;
  using Base::a, Base::d, Base::thread, Base::threads, Base::rank, Base::z_slots, Base::z_noise;
  static_assert(C::kStored && Base::kSoft && D::kNormaliser == kSoftmax && !D::kTarget && !D::kBinary);
  static constexpr bool kBits = D::kInUnits || !D::kLogs;  // whether powers of two are all that is needed
  // Whether the terms' sums follow from those of p and p (a lp - y), which need no exchange of their own.
  static constexpr bool kOnce = D::kCross && D::kTeacherWeighs && !C::kStats;

  // A row, and the first of its stored classes that this thread looks at: read a row ahead, as the logits are.
  struct Row : Base::Row {
    int id;
    float lp, rest, extra;
  };

  const KdStored& s;
  const unsigned bits;  // where in shared memory: a byte of every vector

  KD_FN explicit StoredRows(const KdStored& s) : Base(s.rows), s(s), bits(Base::v_slots) {
    for (int i = thread; i < ((int)a.part + 15) / 16; i += threads) store_shared(bits + 16u * i, Quad{});
  }

  KD_FN Row row_at(long long n) const {
    Row r{};
    (typename Base::Row&)r = Base::row_at(n);
    r.id = -1;
    r.lp = kNever;
    if (!r.counts) return r;
    if (thread < (int)s.k) {
      r.id = (int)s.ids[n * s.k + thread];
      r.lp = s.log_p[n * s.k + thread];
    }
    r.rest = s.rest ? s.rest[n] : kNever;
    r.extra = s.extra ? s.extra[n] : 0;
    return r;
  }

  // f(number, class, log-probability) of every stored class that this thread looks at. Those of a row are shared out among the
  // threads of each block alike: whose the class is looks at its logit.
  template <class F>
  KD_FN void each(const Row& r, F f) const {
    int id = r.id;
    float lp = r.lp;
#pragma unroll 1
    for (int j = thread; j < (int)s.k;) {
      f(j, id, lp);
      j += threads;
      if (j < (int)s.k) {
        id = (int)s.ids[r.n * s.k + j];
        lp = s.log_p[r.n * s.k + j];
      }
    }
  }
  // The number of a class within this block's part, and whether it has one.
  KD_FN static int within(const Row& r, int id) { return id - r.first; }
  KD_FN bool is_here(const Row& r, int id) const {
    return id >= 0 && (unsigned)within(r, id) < (unsigned)((int)a.part * kEach);
  }
  KD_FN char* place(const Row& r, int id) const {
    const int at = within(r, id) + (C::kShifted ? kEach + Base::off(r.z) - Base::off(Base::owner(r)) : 0);
    return (char*)shared_pointer(z_slots + (unsigned)(at * kSize));
  }
  KD_FN float logit_of(const Row& r, int id) const {
    const float x = read_one(place(r, id), kType);
    return Base::template processed<C::kZCapped, C::kZNoise>(x, a.z.cap, a.z.slope, Base::template sample_at<false>(id));
  }

  KD_FN void mark(const Row& r) const {
    each(r, [&](int, int id, float) {
      if (!is_here(r, id)) return;
      const unsigned at = (unsigned)within(r, id), vector = at / kEach;
      or_shared(bits + (vector & ~3u), 1u << ((vector & 3) * 8 + at % kEach));
    });
  }
  KD_FN void clear() const {
    for (int i = thread; i < (int)a.part; i += threads) store_byte(bits + i, 0);
  }

  // -------------------------------------------------------------------------------------------- phase 1

  // Some classes of a row: their largest logit, and relative to that sums of e^y, of the same at T = 1, and of e^y y.
  // Exponents are powers of two.
  struct Portion {
    float top, sum, one, x;
    unsigned best;      // the first of the largest
    float cross, mass;  // kOnce: sums of p (a lp - y) and p
  };
  struct Parts {
    Portion rest, kept;
    float top_p;    // the largest log-probability, and the number
    unsigned at_p;  // of the first that is as large
  };
  KD_FN static Portion nothing() { return {kNever, 0, 0, 0, 0, 0, 0}; }

  KD_FN Reference at_T(float top) const {
    const float base = Base::base_z(top);
    return Base::reference(base, Base::z_factor().k, Base::large_z(base));
  }
  KD_FN Reference at_1(float top) const {
    const float base = Base::base_z(top);
    return Base::reference(base, a.one.k, Base::large_z(base));
  }
  KD_FN Side side_of(const Portion& p) const { return {at_T(p.top), p.sum}; }
  KD_FN Side one_of(const Portion& p) const { return {at_1(p.top), p.one}; }

  // The exponent of a logit relative to a reference.
  KD_FN static float exponent(float x, float k, Reference ref) {
    const float xk = product(x, k);
    if (x == kNever) return kNever;
    return ref.lo == 0 ? fmaf(x, k, -ref.hi) : (xk - ref.hi) + (fmaf(x, k, -xk) - ref.lo);
  }

  // Takes a portion relative to a larger logit than its own.
  KD_FN void raise(Portion& p, float top) const {
    Side side = side_of(p);
    const Reference to = at_T(top);
    if constexpr (C::kStats) p.x = Base::moved(p.x, side, to);
    const Shift shift = move(side, to);
    if constexpr (kOnce) p.cross -= p.mass == 0 ? 0 : p.mass * shift.by * kLn2;
    p.sum = side.sum;
    if constexpr (kOwn) {
      Side one = one_of(p);
      move(one, at_1(top));
      p.one = one.sum;
    }
    p.top = top;
  }
  KD_FN void merge_warp(Portion& p, int n) const {
    const float top = largest_of_warp(p.top, n);
    if constexpr (C::kStats) p.best = first_of_warp(p.top == top ? p.best : ~0u, n);
    raise(p, top);
    p.sum = sum_of_warp(p.sum, n);
    if constexpr (kOwn) p.one = sum_of_warp(p.one, n);
    if constexpr (C::kStats) p.x = sum_of_warp(p.x, n);
  }
  KD_FN void merge_warp(Parts& p, int n = 32) const {
    merge_warp(p.rest, n);
    merge_warp(p.kept, n);
    if constexpr (kOnce) {
      p.kept.cross = sum_of_warp(p.kept.cross, n);
      p.kept.mass = sum_of_warp(p.kept.mass, n);
    }
    if constexpr (C::kStats) {
      const float top = largest_of_warp(p.top_p, n);
      p.at_p = first_of_warp(p.top_p == top ? p.at_p : ~0u, n);
      p.top_p = top;
    }
  }
  KD_FN void merge_all(Parts& p) {
    constexpr int kQuads = kOnce || C::kStats ? 3 : 2;
    merge_warp(p);
    Quad message[kQuads];
    write_message(message, p);
    Base::exchange(message, [&](Quad(&got)[kQuads], bool there, int n) {
      Parts parts = read_message(got, there);
      merge_warp(parts, n);
      write_message(got, parts);
    });
    p = read_message(message, true);
  }
  static KD_FN Quad message(const Portion& p) { return {as_bits(p.top), as_bits(p.sum), as_bits(p.one), as_bits(p.x)}; }
  static KD_FN Portion portion(Quad q) {
    return {as_float(q.w[0]), as_float(q.w[1]), as_float(q.w[2]), as_float(q.w[3]), 0, 0, 0};
  }
  template <int kQuads>
  static KD_FN void write_message(Quad (&to)[kQuads], const Parts& p) {
    to[0] = message(p.rest);
    to[1] = message(p.kept);
    if constexpr (kOnce) to[2] = {as_bits(p.kept.cross), as_bits(p.kept.mass), 0, 0};
    if constexpr (C::kStats) to[2] = {p.rest.best, p.kept.best, as_bits(p.top_p), p.at_p};
  }
  template <int kQuads>
  static KD_FN Parts read_message(const Quad (&from)[kQuads], bool there) {
    Parts p{nothing(), nothing(), kNever, ~0u};
    if (!there) return p;
    p.rest = portion(from[0]);
    p.kept = portion(from[1]);
    if constexpr (kOnce) {
      p.kept.cross = as_float(from[2].w[0]);
      p.kept.mass = as_float(from[2].w[1]);
    }
    if constexpr (C::kStats) {
      p.rest.best = from[2].w[0];
      p.kept.best = from[2].w[1];
      p.top_p = as_float(from[2].w[2]);
      p.at_p = from[2].w[3];
    }
    return p;
  }

  // The logits of a vector's classes that aren't stored.
  KD_FN void others(const Row& r, int i, unsigned stored, float* z) const {
    Base::template logits<false>(r, i, z);
    if (stored != 0) {
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) z[j] = stored >> j & 1 ? kNever : z[j];
    }
  }

  KD_FN void sum_rest(const Row& r, Portion& p) const {
    if constexpr (kPacked && !C::kShifted) {
      constexpr unsigned kLowest = kType == kBFloat16 ? 0xFF80FF80u : 0xFC00FC00u;
      unsigned largest = kLowest;
      for (int i = thread; i < (int)a.part; i += threads) {
        Quad q = load_shared(z_slots + 16u * i);
        const unsigned stored = load_byte(bits + i);
        if (stored != 0) {
          KD_UNROLL
          for (int w = 0; w < 4; ++w) {
            const unsigned mask = (stored >> (2 * w) & 1 ? 0xFFFFu : 0) | (stored >> (2 * w) & 2 ? 0xFFFF0000u : 0);
            q.w[w] = (q.w[w] & ~mask) | (kLowest & mask);
          }
        }
        KD_UNROLL
        for (int w = 0; w < 4; ++w) largest = larger_pair<kType>(largest, q.w[w]);
      }
      p.top = fmaxf(low_half<kType>(largest), high_half<kType>(largest));
    } else {
      for (int i = thread; i < (int)a.part; i += threads) {
        float z[kEach];
        others(r, i, load_byte(bits + i), z);
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          if constexpr (C::kStats)
            if (z[j] > p.top) p.best = (unsigned)(Base::first_class(r, i) + j);
          p.top = fmaxf(p.top, z[j]);
        }
      }
    }
    const float base = Base::base_z(p.top);
    const Exponents of_z = Base::powers(at_T(p.top), base, Base::large_z(base), Base::z_factor().k);
    const Exponents of_1 = Base::powers(at_1(p.top), base, of_z.large, a.one.k);
    either(of_z.large, [&](auto large) {
      for (int i = thread; i < (int)a.part; i += threads) {
        float z[kEach];
        const unsigned stored = load_byte(bits + i);
        others(r, i, stored, z);
        // Nobody asks again, and nobody else has this vector.
        if constexpr (!kWrites)
          if (stored != 0) store_byte(bits + i, 0);
        of_z.prepare(z, kEach, large);
        float sum = 0, one = 0, x = 0;
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          const float y = of_z(z[j]), e = exp2_fast(y);
          sum += e;
          if constexpr (kOwn) one += exp2_fast(of_1(z[j]));
          if constexpr (C::kStats) x += e > 0 ? e * y : 0;
        }
        p.sum += sum;
        p.one += one;
        p.x += x;
      }
    });
  }

  KD_FN void sum_kept(const Row& r, Parts& p) const {
    each(r, [&](int j, int id, float lp) {
      if constexpr (C::kStats) {
        if (p.at_p == ~0u || lp > p.top_p) {
          p.at_p = (unsigned)j;
          p.top_p = lp;
        }
      }
      Portion& kept = p.kept;
      // What is no number makes its row none, also where there is no class.
      if constexpr (kOnce) kept.mass += lp != lp ? lp : 0;
      if (!is_here(r, id)) return;
      const float z = logit_of(r, id);
      if constexpr (C::kStats)
        if (z > kept.top || (z == kept.top && (unsigned)id < kept.best)) kept.best = (unsigned)id;
      const float top = fmaxf(kept.top, z);
      if (top > kept.top) raise(kept, top);
      const Reference ref = at_T(top);
      const float y = exponent(z, Base::z_factor().k, ref), e = exp2_fast(y);
      kept.sum += e;
      if constexpr (kOwn) kept.one += exp2_fast(exponent(z, a.one.k, at_1(top)));
      if constexpr (C::kStats) kept.x += e > 0 ? e * y : 0;
      if constexpr (kOnce) {
        const float p_j = kd_exp(lp);
        kept.mass += p_j;
        if (p_j > 0) kept.cross += p_j * ((D::kA == 0 ? 0 : lp) - y * kLn2);
      }
    });
  }

  // -------------------------------------------------------------------------------------------- phases 2 and 3

  // The log-probability of a logit among those of a side, as a power of two.
  KD_FN static float log_of(float z, float k, const Side& side) {
    return exponent(z, k, side.ref) - kd_log(side.sum) * kLog2e;
  }
  KD_FN Terms<float> terms(float lq, float lp) const {
    const float lp_bits = lp * kLog2e;
    return kBits ? terms_of(d, lq, lp_bits, exp2_fast(lq), exp2_fast(lp_bits))
                 : terms_of(d, lq * kLn2, lp, exp2_fast(lq), exp2_fast(lp_bits));
  }
  KD_FN static float entropy(float lp) {
    const float p = kd_exp(lp);
    return p > 0 ? -p * lp : lp != lp ? lp : 0;
  }

  KD_FN void work(const Row& r, const Row& after) {
    const auto w = Base::weights_of(r);
    if constexpr (C::kZNoise != kNoNoise) z_noise = Base::template row_noise<false>(r.n);
    const bool tail = s.rest != nullptr, whole = kHasHard || C::kStats || tail;  // whether other classes matter

    // Bits of the row before are read and cleared by now; those of this one, and all of its logits, are there after both.
    if constexpr (!C::kShifted) block_barrier();
    if (kWrites || whole) mark(r);
    block_barrier();

    // Before the first exchange: after it other blocks may write the gradient in the place of the logits.
    float at_label = 0;
    if constexpr (kHasHard || C::kStats)
      if (w.label >= 0) at_label = Base::template logit_at<false>(r, w.label);
    Parts p{nothing(), nothing(), kNever, ~0u};
    if (whole) sum_rest(r, p.rest);
    sum_kept(r, p);
    merge_all(p);

    const Side rest = side_of(p.rest), kept = side_of(p.kept);
    Side all = rest, one = rest;
    merge(all, kept);
    if constexpr (kOwn) {
      one = one_of(p.rest);
      merge(one, one_of(p.kept));
    } else {
      one = all;
    }
    // What a stored class has its share of. Number by number: registers have no addresses to choose from.
    const Side among{{tail ? all.ref.hi : kept.ref.hi, tail ? all.ref.lo : kept.ref.lo}, tail ? all.sum : kept.sum};
    const float k = Base::z_factor().k, k_one = kOwn ? a.one.k : k;
    // Of two sums relative to the same: no difference of logarithms.
    const float lq_rest =
        rest.sum == 0 && all.sum != 0 ? kNever : kd_apart(rest.ref, all.ref) + kd_log(rest.sum / all.sum) * kLog2e;

    float soft, G, g_rest = 0, entropy_p = 0;
    if constexpr (kOnce) {
      const float lse = (kd_apart(among.ref, kept.ref) + kd_log(among.sum) * kLog2e) * kLn2;
      soft = p.kept.mass == 0 ? 0 : p.kept.cross + p.kept.mass * lse;
      G = -p.kept.mass;
      if (tail) {
        const Terms<float> t = terms(lq_rest, r.rest);
        soft += t.phi;
        G += g_rest = t.g;
      }
    } else {
      float sums[4] = {};  // of phi, g, g of the tail, and of the entropy
      each(r, [&](int, int id, float lp) {
        if (is_here(r, id)) {
          const Terms<float> t = terms(log_of(logit_of(r, id), k, among), lp);
          sums[0] += t.phi;
          sums[1] += t.g;
          if constexpr (C::kStats) sums[3] += entropy(lp);
        }
        if (lp != lp) sums[0] = sums[1] = lp;
      });
      // One thread of the cluster, so that the others needn't.
      if (tail && rank == 0 && thread == 0) {
        const Terms<float> t = terms(lq_rest, r.rest);
        sums[0] += t.phi;
        sums[1] += t.g;
        sums[2] = t.g;
        if constexpr (C::kStats) sums[3] += entropy(r.rest);
      }
      Base::template add_up<(C::kStats ? 4 : kWrites ? 3 : 1)>(sums);
      soft = sums[0];
      G = sums[1];
      g_rest = sums[2];
      entropy_p = sums[3];
    }

    if constexpr (kWrites) put_stored(r, w, one, among, G);
    // Before the last pass, which so has the registers for itself.
    if (kTells && rank == 0 && thread == 0) {
      float described[5] = {}, hard = 0;
      if constexpr (C::kStats) {
        const float x = Base::moved(p.rest.x, rest, all.ref) + Base::moved(p.kept.x, kept, all.ref);
        const unsigned best = Base::better(p.rest.best, p.rest.top, p.kept.best, p.kept.top);
        const long long number = p.at_p < (unsigned)s.k ? p.at_p : 0;
        described[0] = kd_log(all.sum) - x / all.sum * kLn2;
        described[1] = entropy_p;
        described[2] = (long long)best == s.ids[r.n * s.k + number];
        described[3] = w.label >= 0 && (int)best == w.label;
        described[4] = w.label >= 0;
      }
      if constexpr (kHasHard) {
        if (w.label >= 0) hard = -log_of(at_label, k_one, one) * kLn2;
        hard = r.labelled ? hard + w.poison : 0;
      }
      Base::tell(r, soft + r.extra, hard, described);
    }
    if constexpr (kWrites) write_gradient(r, after, w, p.rest.top, rest, all, one, tail, G, g_rest);
  }

  // Puts what is written of the stored classes in the end in the place of their logits.
  template <class Weights>
  KD_FN void put_stored(const Row& r, const Weights& w, const Side& one, const Side& among, float G) const {
    const float on_soft = w.on_soft, on_hard = w.on_hard, k = Base::z_factor().k;
    each(r, [&](int, int id, float lp) {
      if (!is_here(r, id)) return;
      const float z = logit_of(r, id);
      float dz = 0;
      // A term of weight 0 is absent, also where it is infinite.
      if (on_soft != 0) {
        const float lq = log_of(z, k, among);
        dz = on_soft * (terms(lq, lp).g - exp2_fast(lq) * G);
      }
      if constexpr (kHasHard) {
        if (on_hard != 0) dz += on_hard * exp2_fast(log_of(z, kOwn ? a.one.k : k, one));
        if (id == w.label) dz -= on_hard;
      }
      char* const to = place(r, id);
      if constexpr (C::kZNoise == kMultiplicative)
        dz *= z == kNever ? 1 : 1 + Base::template sample_at<false>(id);
      if constexpr (C::kZCapped) dz *= Base::slope_of_cap(read_one(to, kType), a.z.slope, (float)a.z_scale);
      write_one(to, kType, dz);
    });
    block_barrier();
  }

  // The gradient: of all other classes e^y times what the soft term and a hard term that shares it give.
  template <class Weights>
  KD_FN void write_gradient(const Row& r, const Row& after, const Weights& w, float top, const Side& rest, const Side& all,
                            const Side& one, bool tail, float G, float g_rest) const {
    const float on_soft = w.on_soft, on_hard = w.on_hard, k = Base::z_factor().k;
    if (on_soft == 0 && on_hard == 0) {
      clear();
      Base::write_nothing(r);
      if constexpr (!C::kShifted)
        if (after.counts) Base::fetch(after);
      return;
    }
    const float base = Base::base_z(top);
    const Exponents of_z = Base::powers(rest.ref, base, Base::large_z(base), k);
    const Exponents of_1 = Base::powers(at_1(top), base, of_z.large, a.one.k);
    float M = 0, own = 0;  // where there is nobody
    if (rest.sum != 0) {
      const float probability = to_probability(all, rest.ref);
      if (tail && on_soft != 0) M = on_soft * (g_rest / rest.sum - G * probability);
      if constexpr (C::kHard == kSharedHard) M += on_hard * probability;
      if constexpr (kOwn) own = on_hard * to_probability(one, at_1(top));
    }
    either(of_z.large, [&](auto large) {
      for (int i = thread; i < (int)a.part; i += threads) {
        float dz[kEach], z[kEach];
        const unsigned stored = load_byte(bits + i);
        Base::template logits<false>(r, i, z);
        of_z.prepare(z, kEach, large);
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          dz[j] = M == 0 ? 0 : M * exp2_fast(of_z(z[j]));
          if constexpr (kOwn) dz[j] += own == 0 ? 0 : own * exp2_fast(of_1(z[j]));
        }
        if constexpr (kHasHard) {
          const int at = w.label - Base::first_class(r, i);
          if (w.label >= 0 && at >= 0 && at < kEach) {
            KD_UNROLL
            for (int j = 0; j < kEach; ++j)
              if (j == at) dz[j] -= on_hard;
          }
        }
        Base::chain(r, i, dz);
        if (stored != 0) {
          float put[kEach];
          Base::template raw<false>(r, i, put);
          KD_UNROLL
          for (int j = 0; j < kEach; ++j) dz[j] = stored >> j & 1 ? put[j] : dz[j];
          store_byte(bits + i, 0);
        }
        Base::store(r, i, dz);
        if constexpr (!C::kShifted)
          if (after.counts) Base::fetch_one(after, i);
      }
    });
  }
};

template <class C>
KD_FN void stored_rows(const KdStored& a) {
  StoredRows<C> self(a);
  self.run(self);
}

}  // namespace
