// The CUDA kernels: rows that are read from memory once and kept on chip by the blocks of a cluster.
//
// A cluster takes a row, and each of its blocks a part of it. While a row is worked on, the next one's logits are copied to
// shared memory. Phase 1 reads them there and keeps the exponentials of both sides in registers, each thread relative to
// the largest logits of its own; phase 2, for divergences without a closed form, turns the teacher's into g; phase 3
// writes the gradient, a linear combination of what was kept. Between the phases the threads of all blocks add up what
// they have: a warp by shuffles, a cluster by messages from every warp to every block.
//
// kdkernels/backends/cuda.py writes the few lines that say what is built: a Config, and a kernel that calls rows<Config>.
// divergence.h, row.h and philox.h have the formulas, which the CPU library compiles, too.

#ifdef KD_DEVICE
#include KD_DEVICE
#else
#include "device.h"
#endif

#include "fastmath.h"
#include "../divergence.h"
#include "../philox.h"
#include "../row.h"

namespace {

// ---------------------------------------------------------------------------------------------- the interface
// Records of fields of 8 bytes, or of pairs of 4; kdkernels/backends/cuda.py packs them in this order.

// What logits are multiplied by to be exponents: natural, and of two. Instructions read it where it is, in constant memory.
struct KdFactor {
  float c, k;
};

// One tensor of rows, [..., V], whose classes lie side by side.
struct KdSide {
  const char* data;
  long long stride[3];  // of the leading dimensions, in bytes
  KdFactor by;            // of logits that are capped or noised by then, to exponents at T
  float cap, slope;       // cap tanh(slope x); slope x where there is noise alone
  const long long* seed;
  long long row_offset;
  double sigma, probability;
};

struct KdRows {
  KdSide z, v;
  long long rows, shape[2];  // rows = n0 * shape[0] * shape[1]
  long long classes, width;  // width: the gradient's classes; those from `classes` on get 0
  long long part;            // vectors of a row that a block takes
  const long long* labels;   // [rows] or null
  const unsigned char* mask;  // [rows] or null
  const float* weights;       // [rows] or null
  long long ignore_index;
  const char* targets;        // labels of a binary divergence, [..., V], or null
  long long target_type, target_stride[4];  // in bytes; the last of the columns
  const long long* counted;   // how many rows count, or null where all do
  const double* given;        // what a mean divides by, or null
  double number;              // the same where no device has to be asked; < 0: the count
  const float* upstream;      // of mode kScaledGradient, [rows] or one
  long long upstream_stride;
  char* gradient;             // [rows, width]
  float* figures;             // [1 or kFigures, rows]
  KdFactor one;               // of the student's logits, to exponents at T = 1
  double z_scale, soft_gain, hard_gain;  // of the derivative of a cap; factors of the gradient
  double t_factor, soft_weight, hard_weight;
  float params[4];
};

struct KdTotals {
  const float* figures;  // [1 or kFigures, rows]
  float *loss, *stats;   // one or null, [7] or null
  const long long* counted;
  const double* given;
  double number;
  long long rows, loss_mean, stats_mean;
};

struct KdScale {
  const char* in;
  char* out;
  long long rows, width, type;
  const float* upstream;
  long long upstream_stride, in_place;
};

enum Type { kFloat = 0, kBFloat16 = 2, kHalf = 3 };
enum Mode { kLoss, kGradient, kScaledGradient };
enum Hard { kNoHard, kSharedHard, kOwnHard };  // no hard term; one at T = 1 that shares q; one with its own softmax
enum Noise { kNoNoise, kAdditive, kMultiplicative };
// A row's loss, soft term, hard term, two entropies, agreement, accuracy, and whether it is labelled.
enum { kRowLoss, kRowSoft, kRowHard, kRowEntropyZ, kRowEntropyV, kRowAgrees, kRowCorrect, kRowLabelled, kFigures };

// What a kernel is built for, unless its Config says otherwise.
struct Defaults {
  static constexpr int kType = kBFloat16;        // of both sides and the gradient
  static constexpr int kCluster = 1;             // blocks of a cluster
  static constexpr int kVectors = 4;             // of 16 bytes, that a thread has of each side
  static constexpr int kStages = 2;              // rows in shared memory: 2, or 1 where two don't fit
  static constexpr bool kShifted = false;        // whether sides and gradient may lie differently within 16 bytes
  static constexpr int kMode = kGradient;
  static constexpr int kHard = kNoHard;
  static constexpr bool kStats = false, kZCapped = false, kVCapped = false;
  static constexpr int kZNoise = kNoNoise, kVNoise = kNoNoise;
  static constexpr bool kZPerRow = false, kVPerRow = false;
};

// ---------------------------------------------------------------------------------------------- small things

KD_FN float from_bfloat(unsigned bits) { return as_float(bits << 16); }

// A vector as numbers, and back.
template <int kType>
KD_FN void unpack(Quad q, float* x) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == kFloat) {
      x[i] = as_float(q.w[i]);
    } else if constexpr (kType == kBFloat16) {
      x[2 * i] = from_bfloat(q.w[i]);
      x[2 * i + 1] = as_float(q.w[i] & 0xFFFF0000u);
    } else {
      x[2 * i] = from_half((unsigned short)q.w[i]);
      x[2 * i + 1] = from_half((unsigned short)(q.w[i] >> 16));
    }
  }
}
template <int kType>
KD_FN Quad pack(const float* x) {
  Quad q;
  KD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == kFloat)
      q.w[i] = as_bits(x[i]);
    else if constexpr (kType == kBFloat16)
      q.w[i] = to_bfloats(x[2 * i], x[2 * i + 1]);
    else
      q.w[i] = to_halves(x[2 * i], x[2 * i + 1]);
  }
  return q;
}

KD_FN constexpr int size_of(int type) { return type == kFloat ? 4 : type == 1 ? 8 : 2; }

KD_FN float read_one(const char* p, int type) {
  if (type == kFloat) return *(const float*)p;
  if (type == 1) return (float)*(const double*)p;
  unsigned short bits = *(const unsigned short*)p;
  return type == kBFloat16 ? from_bfloat(bits) : from_half(bits);
}
KD_FN void write_one(char* p, int type, float x) {
  if (type == kFloat)
    *(float*)p = x;
  else
    *(unsigned short*)p = (unsigned short)(type == kBFloat16 ? to_bfloats(x, 0) : to_halves(x, 0));
}

// What a mean divides by; 1 where no row counts, so that 0 stays 0.
KD_FN double divisor(const long long* counted, const double* given, double number) {
  double items = given ? *given : number;
  if (counted) {
    if (items < 0) items = (double)*counted;
    if (*counted == 0) items = 1;
  }
  return items;
}

// ---------------------------------------------------------------------------------------------- parts of a row

// What a thread, a warp or all of a cluster have of a row after phase 1. Exponents are powers of two.
struct Part {
  RowState row;
  float xz, xv;             // for the stats: sums of e^y y
  unsigned best_z, best_v;  // and the first of the largest logits
};

struct Mean {
  float sum, count;
};

KD_FN float sum_of_warp(float x) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += from_other(x, mask);
  return x;
}
KD_FN float largest_of_warp(float x) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, from_other(x, mask));
  return x;
}
KD_FN unsigned first_of_warp(unsigned x) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    unsigned y = from_other(x, mask);
    x = y < x ? y : x;
  }
  return x;
}

// ---------------------------------------------------------------------------------------------- the row kernel

template <class C>
struct Rows {
  using D = typename C::template Divergence<float>;
  using Reads = typename D::Reads;

  static constexpr int kType = C::kType, kSize = size_of(kType), kEach = 16 / kSize;  // classes of a vector
  static constexpr int kVectors = C::kVectors, kClasses = kVectors * kEach;           // of a thread
  static constexpr bool kTeacher = kReadsTeacher<D>;
  static constexpr bool kPlain = D::kNormaliser != kSoftmax;  // a divergence of logits
  static constexpr bool kPair = kTeacher && !D::kCross && !kPlain;
  static constexpr bool kWrites = C::kMode != kLoss, kTells = C::kMode != kScaledGradient;
  // A divergence of logits has no softmax that its hard term could share.
  static constexpr bool kHasHard = C::kHard != kNoHard && !D::kBinary;
  static constexpr bool kOwn = kHasHard && (C::kHard == kOwnHard || kPlain);
  static constexpr bool kTeacherSums = kTeacher && (!kPlain || C::kStats);
  // Whether the logits are looked at again when the gradient is written.
  static constexpr bool kSlopes = kWrites && (C::kZCapped || C::kZNoise == kMultiplicative);
  static constexpr bool kRawAtEnd = kPlain || kOwn || kSlopes;
  static constexpr int kBoxes = 3;  // quads of a message, at most
  static constexpr float kNever = -kInf;

  // A row, and where this thread's classes of it are.
  struct Row {
    long long n, label;
    const char *z, *v;
    char* out;
    float weight;
    bool counts, labelled;
  };

  const KdRows& a;
  const int thread, threads, lane, warp, warps, rank;
  Barrier* const barriers;
  Quad* const boxes;
  Quad* const sides;
  const int slots;
  int exchanges;  // so far
  long long next;  // row
  bool next_counts;
  D d;
  RowNoise z_noise, v_noise;

  KD_FN explicit Rows(const KdRows& a)
      : a(a), thread(thread_index()), threads(block_threads()), lane(thread & 31), warp(thread >> 5), warps(threads >> 5),
        rank(C::kCluster == 1 ? 0 : (int)(block_index() % C::kCluster)), barriers((Barrier*)shared_memory()),
        boxes((Quad*)shared_memory() + 1), sides(boxes + 2 * kBoxes * C::kCluster * warps),
        slots(threads * kVectors + (C::kShifted ? 2 : 0)), exchanges(0), next(0), next_counts(false) {
    KD_UNROLL
    for (int i = 0; i < 4; ++i) ((float*)&d)[i] = a.params[i];
  }

  // Without a teacher there is no other temperature than 1.
  KD_FN const KdFactor& of_z() const { return kTeacher ? a.z.by : a.one; }

  // -------------------------------------------------------------------------------------------- rows

  // Where row n of a tensor begins.
  KD_FN long long offset(const long long* stride, long long n) const {
    if (a.shape[0] == 1 && a.shape[1] == 1) return n * stride[0];
    const long long others = n / a.shape[1];
    return others / a.shape[0] * stride[0] + others % a.shape[0] * stride[1] + n % a.shape[1] * stride[2];
  }

  KD_FN Row row_at(long long n) const {
    Row r{};
    r.n = n;
    if (n >= a.rows) return r;
    r.label = a.labels ? a.labels[n] : a.ignore_index;
    r.labelled = r.label != a.ignore_index;
    r.counts = a.mask ? a.mask[n] != 0 : a.labels ? r.labelled : true;
    r.weight = a.weights ? a.weights[n] : 1.0f;
    r.z = a.z.data + offset(a.z.stride, n);
    r.v = a.v.data + offset(a.v.stride, n);
    r.out = a.gradient + n * a.width * kSize;
    return r;
  }

  // By how many classes a tensor's row is off 16 bytes, and the one that this thread's vectors are counted from.
  static KD_FN int off(const char* row) { return (int)((unsigned long long)row & 15) / kSize; }
  KD_FN const char* owner(const Row& r) const { return kWrites ? r.out : r.z; }

  // The k-th of this thread's vectors, counted in the block's part, and its first class.
  KD_FN int local(int k) const { return k * threads + thread; }
  KD_FN int first_class(const Row& r, int k) const {
    return (rank * (int)a.part + local(k)) * kEach - off(owner(r));
  }

  // -------------------------------------------------------------------------------------------- reading

  // Copies one vector of a side, or what of it lies in the row.
  KD_FN void fetch_vector(const char* row, int from, Quad* to) const {
    if (from >= 0 && from + kEach <= (int)a.classes) {
      copy_later(to, row + (long long)from * kSize);
    } else {
#pragma unroll 1
      for (int j = 0; j < kEach; ++j) {
        bool inside = from + j >= 0 && from + j < (int)a.classes;
        const char* p = row + (long long)(from + j) * kSize;
        if constexpr (kSize == 4)
          to->w[j] = inside ? *(const unsigned*)p : 0xFF800000u;
        else
          ((unsigned short*)to)[j] = inside ? *(const unsigned short*)p : kType == kBFloat16 ? 0xFF80 : 0xFC00;
      }
    }
  }
  // Copies what this block works on of row n to shared memory, if the row counts.
  KD_FN bool fetch(long long n, int stage) const {
    const Row r = row_at(n);
    if (!r.counts) return false;
    Quad* to = sides + stage * 2 * slots;
    if constexpr (C::kShifted) {
      // Each side in vectors of its own, of which one more at either end has classes of this part.
      int first = rank * (int)a.part - 1;
      for (int s = thread; s < (int)a.part + 2; s += threads) {
        fetch_vector(r.z, (first + s) * kEach - off(r.z), to + s);
        if (kTeacher) fetch_vector(r.v, (first + s) * kEach - off(r.v), to + slots + s);
      }
    } else {
      KD_UNROLL
      for (int k = 0; k < kVectors; ++k) {
        if (local(k) >= (int)a.part) continue;
        fetch_vector(r.z, first_class(r, k), to + local(k));
        if (kTeacher) fetch_vector(r.v, first_class(r, k), to + slots + local(k));
      }
    }
    return true;
  }

  // The raw logits of the k-th vector; -inf beyond the row.
  KD_FN void raw(const Row& r, int stage, bool teacher, int k, float* x) const {
    if (local(k) >= (int)a.part) {
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) x[j] = kNever;
      return;
    }
    const Quad* from = sides + (2 * stage + teacher) * slots;
    if constexpr (C::kShifted) {
      int at = (local(k) + 1) * kEach + off(teacher ? r.v : r.z) - off(owner(r));
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) x[j] = read_one((const char*)from + (at + j) * kSize, kType);
    } else {
      unpack<kType>(from[local(k)], x);
    }
  }

  // The same as terms use them: capped, with noise. With `factor`, what multiplicative noise has put on them.
  template <bool kOfTeacher>
  KD_FN void logits(const Row& r, int stage, int k, float* x, float* factor = nullptr) const {
    constexpr bool kCapped = kOfTeacher ? C::kVCapped : C::kZCapped;
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    const KdSide& side = kOfTeacher ? a.v : a.z;
    raw(r, stage, kOfTeacher, k, x);
    if constexpr (kCapped || kNoise != kNoNoise) {
      // What a softcap makes of -inf is finite: classes of no row, and of other blocks, are left alone.
      if (local(k) >= (int)a.part) {
        KD_UNROLL
        for (int j = 0; j < kEach && factor; ++j) factor[j] = 1;
        return;
      }
      const RowNoise& noise = kOfTeacher ? v_noise : z_noise;
      int first = first_class(r, k);
      const float cap = side.cap, slope = side.slope;
      float sample[kEach];
      if constexpr (kNoise != kNoNoise) samples<kOfTeacher>(noise, first, sample);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        bool inside = first + j >= 0 && first + j < (int)a.classes;
        x[j] = inside ? processed<kCapped, kNoise>(x[j], cap, slope, kNoise == kNoNoise ? 0 : sample[j]) : kNever;
        if constexpr (kNoise == kMultiplicative)
          if (factor) factor[j] = x[j] == kNever ? 1 : 1 + sample[j];
      }
    }
  }
  template <bool kCapped, int kNoise>
  static KD_FN float processed(float x, float cap, float slope, float sample) {
    if constexpr (kCapped)
      x = cap * tanhf(x * slope);
    else if constexpr (kNoise != kNoNoise)
      x *= slope;
    if constexpr (kNoise == kAdditive) x += sample;
    if constexpr (kNoise == kMultiplicative) x = x == kNever ? x : x * (1 + sample);
    return x;
  }
  // b sigma epsilon of the classes from `first` on.
  template <bool kOfTeacher>
  KD_FN void samples(const RowNoise& noise, int first, float* x) const {
    KD_UNROLL
    for (int j = 0; j < kEach; ++j) x[j] = 0;
    if (!noise.active) return;
    if constexpr (kOfTeacher ? C::kVPerRow : C::kZPerRow) {
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) x[j] = (float)noise.shared;
    } else {
      float sigma = (float)noise.sigma;
      if ((first & 3) == 0) {
        KD_UNROLL
        for (int j = 0; j < kEach; j += 4) {
          Words w = noise.words((kd_u32)(first + j) / 4);
          box_muller(w.w0, w.w1, sigma, x[j], x[j + 1]);
          box_muller(w.w2, w.w3, sigma, x[j + 2], x[j + 3]);
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < kEach; ++j) x[j] = first + j < 0 ? 0 : normal_at(noise, first + j, sigma);
      }
    }
  }
  template <bool kOfTeacher>
  KD_FN RowNoise row_noise(long long n) const {
    const KdSide& side = kOfTeacher ? a.v : a.z;
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    constexpr bool kPerRow = kOfTeacher ? C::kVPerRow : C::kZPerRow;
    return noise_of_row<float>(side.sigma, side.probability, kNoise == kMultiplicative, kPerRow, (kd_u64)*side.seed,
                               (kd_u64)(n + side.row_offset), kOfTeacher ? 0 : kStudentStream);
  }

  // One logit of a row, from memory.
  template <bool kOfTeacher>
  KD_FN float logit_at(const Row& r, long long c) const {
    constexpr bool kCapped = kOfTeacher ? C::kVCapped : C::kZCapped;
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    const KdSide& side = kOfTeacher ? a.v : a.z;
    const RowNoise& noise = kOfTeacher ? v_noise : z_noise;
    float x = read_one((kOfTeacher ? r.v : r.z) + c * kSize, kType), sample = 0;
    if constexpr (kNoise != kNoNoise)
      if (noise.active) sample = noise.per_row ? (float)noise.shared : normal_at(noise, c, (float)noise.sigma);
    return processed<kCapped, kNoise>(x, side.cap, side.slope, sample);
  }

  // -------------------------------------------------------------------------------------------- sums over the cluster

  // Hands this warp's message to every warp of every block; read(i) then is the i-th of `warps * kCluster`.
  template <int kQuads, class Read>
  KD_FN void exchange(const Quad* message, Read read) {
    const int count = C::kCluster * warps, side = exchanges & 1;
    Quad* box = boxes + side * kBoxes * count;
    if constexpr (C::kCluster == 1) {
      if (lane == 0) {
        KD_UNROLL
        for (int q = 0; q < kQuads; ++q) box[q * count + warp] = message[q];
      }
      // One barrier is enough: what is written next lies on the other side.
      block_barrier();
    } else {
      if (thread == 0) barrier_expect(barriers + side, kQuads * count * (unsigned)sizeof(Quad));
      if (lane < C::kCluster) {
        KD_UNROLL
        for (int q = 0; q < kQuads; ++q)
          send(box + q * count + rank * warps + warp, message[q], barriers + side, (unsigned)lane);
      }
      barrier_wait(barriers + side, (unsigned)(exchanges >> 1) & 1);
    }
    for (int i = lane; i < count; i += 32) {
      Quad got[kQuads];
      KD_UNROLL
      for (int q = 0; q < kQuads; ++q) got[q] = box[q * count + i];
      read(got);
    }
    ++exchanges;
  }

  // Sums of up to four numbers.
  KD_FN void add_up(float (&x)[4], int n) {
    Quad message{};
    KD_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < n) message.w[i] = as_bits(sum_of_warp(x[i]));
    float total[4] = {};
    exchange<1>(&message, [&](const Quad(&got)[1]) {
      KD_UNROLL
      for (int i = 0; i < 4; ++i)
        if (i < n) total[i] += as_float(got[0].w[i]);
    });
    KD_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < n) x[i] = sum_of_warp(total[i]);
  }

  // What the references of a part are of, given its largest logit: 0 where no exponent is finite.
  KD_FN float base_z(float top) const {
    return top * of_z().k == kNever || (kOwn && top * a.one.k == kNever) ? 0 : top;
  }
  KD_FN float base_v(float top) const { return top * a.v.by.k == kNever ? 0 : top; }
  KD_FN bool large_z(float base) const { return is_large(base * of_z().k) || (kOwn && is_large(base * a.one.k)); }
  KD_FN bool large_v(float base) const { return is_large(base * a.v.by.k); }
  KD_FN static Reference reference(float base, float k, bool large) {
    float hi = base * k;
    return {hi, large && hi - hi == 0 ? fmaf(base, k, -hi) : 0.0f};
  }
  KD_FN void refer(RowState& row) const {
    const float z = base_z(row.top_z), v = base_v(row.top_v);
    const bool large = large_z(z);
    row.z.ref = reference(z, of_z().k, large);
    row.one.ref = reference(z, a.one.k, large);
    row.v.ref = reference(v, a.v.by.k, large_v(v));
  }

  // Takes a part relative to larger logits than its own.
  KD_FN void raise(Part& p, float top_z, float top_v) const {
    RowState to{};
    to.top_z = top_z;
    to.top_v = top_v;
    refer(to);
    if constexpr (C::kStats) {
      p.xz = moved(p.xz, p.row.z, to.z.ref);
      p.xv = moved(p.xv, p.row.v, to.v.ref);
    }
    move(p.row, to.z.ref, to.v.ref, to.one.ref, Reads::kTeacherWeighs, Reads::kA, Reads::kB);
    p.row.top_z = top_z;
    p.row.top_v = top_v;
  }
  static KD_FN float moved(float x, const Side& side, Reference to) {
    float by = side.sum == 0 ? 0 : kd_apart(side.ref, to), factor = factor_of(by);
    return side.sum == 0 || factor == 0 ? 0 : factor * (x + side.sum * by);
  }
  static KD_FN void add(Part& p, const Part& other) {
    p.row.z.sum += other.row.z.sum;
    p.row.v.sum += other.row.v.sum;
    p.row.cross += other.row.cross;
    p.row.one.sum += other.row.one.sum;
    p.xz += other.xz;
    p.xv += other.xv;
  }
  // The sum of a warp's parts, for each of its threads.
  KD_FN void merge_warp(Part& p) const {
    float top_z = largest_of_warp(p.row.top_z), top_v = kTeacherSums ? largest_of_warp(p.row.top_v) : kNever;
    if constexpr (C::kStats) {
      p.best_z = first_of_warp(p.row.top_z == top_z ? p.best_z : ~0u);
      p.best_v = first_of_warp(p.row.top_v == top_v ? p.best_v : ~0u);
    }
    raise(p, top_z, top_v);
    p.row.z.sum = sum_of_warp(p.row.z.sum);
    if constexpr (kTeacherSums) p.row.v.sum = sum_of_warp(p.row.v.sum);
    if constexpr (kTeacherSums && Reads::kCross) p.row.cross = sum_of_warp(p.row.cross);
    if constexpr (kOwn) p.row.one.sum = sum_of_warp(p.row.one.sum);
    if constexpr (C::kStats) {
      p.xz = sum_of_warp(p.xz);
      p.xv = sum_of_warp(p.xv);
    }
  }
  // The same of a cluster.
  KD_FN void merge_all(Part& p) {
    constexpr int kQuads = C::kStats ? 3 : kOwn || (kTeacherSums && Reads::kCross) ? 2 : 1;
    merge_warp(p);
    Quad message[3];
    message[0] = {as_bits(p.row.top_z), as_bits(p.row.top_v), as_bits(p.row.z.sum), as_bits(p.row.v.sum)};
    message[1] = {as_bits(p.row.cross), as_bits(p.row.one.sum), as_bits(p.xz), as_bits(p.xv)};
    message[2] = {p.best_z, p.best_v, 0, 0};
    Part total{};
    total.row.top_z = total.row.top_v = kNever;
    total.best_z = total.best_v = ~0u;
    refer(total.row);
    exchange<kQuads>(message, [&](const Quad(&got)[kQuads]) {
      Part part{};
      part.row.top_z = as_float(got[0].w[0]);
      part.row.top_v = as_float(got[0].w[1]);
      part.row.z.sum = as_float(got[0].w[2]);
      part.row.v.sum = as_float(got[0].w[3]);
      if constexpr (kQuads > 1) {
        part.row.cross = as_float(got[1].w[0]);
        part.row.one.sum = as_float(got[1].w[1]);
        part.xz = as_float(got[1].w[2]);
        part.xv = as_float(got[1].w[3]);
      }
      refer(part.row);
      float top_z = fmaxf(part.row.top_z, total.row.top_z), top_v = fmaxf(part.row.top_v, total.row.top_v);
      if constexpr (kQuads > 2) {
        total.best_z = better(total.best_z, total.row.top_z, got[2].w[0], part.row.top_z);
        total.best_v = better(total.best_v, total.row.top_v, got[2].w[1], part.row.top_v);
      }
      raise(total, top_z, top_v);
      raise(part, top_z, top_v);
      add(total, part);
    });
    merge_warp(total);
    p = total;
  }
  static KD_FN unsigned better(unsigned first, float top, unsigned second, float other) {
    return other > top ? second : other == top && second < first ? second : first;
  }

  // -------------------------------------------------------------------------------------------- phase 1

  // What phase 1 leaves of a thread's classes, relative to the references of the thread's own part: the student's
  // exponentials and the teacher's, or, where the student weighs, the terms of the cross sum.
  struct Kept {
    float z[kClasses], other[kClasses];
    Reference z_ref, v_ref;
  };

  KD_FN static void relate(float* x, float top) {
    KD_UNROLL
    for (int i = 0; i < kClasses; ++i) x[i] -= top;
  }

  KD_FN void normalise(const Row& r, int stage, int excluded, Kept& kept, Part& p) {
    p = Part{};
    float top_z = kNever, top_v = kNever;
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float *z = kept.z + k * kEach, *v = kept.other + k * kEach;
      logits<false>(r, stage, k, z);
      if constexpr (kTeacherSums) logits<true>(r, stage, k, v);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        if constexpr (D::kTarget) {
          if (first_class(r, k) + j == excluded) {
            z[j] = kNever;
            v[j] = kNever;
          }
        }
        if constexpr (C::kStats) {
          if (z[j] > top_z) p.best_z = (unsigned)(first_class(r, k) + j);
          if (v[j] > top_v) p.best_v = (unsigned)(first_class(r, k) + j);
        }
        top_z = fmaxf(top_z, z[j]);
        if constexpr (kTeacherSums) top_v = fmaxf(top_v, v[j]);
      }
    }
    p.row.top_z = top_z;
    p.row.top_v = top_v;
    refer(p.row);
    float minus_z = p.row.z.ref.hi, minus_1 = p.row.one.ref.hi, minus_v = p.row.v.ref.hi;
    if (large_z(base_z(top_z))) {
      relate(kept.z, base_z(top_z));
      minus_z = minus_1 = 0;
    }
    if (kTeacherSums && large_v(base_v(top_v))) {
      relate(kept.other, base_v(top_v));
      minus_v = 0;
    }
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      // A vector's sums first: shorter chains of additions, and smaller errors.
      float sz = 0, sv = 0, cross = 0, s1 = 0, xz = 0, xv = 0;
      KD_UNROLL
      for (int j = k * kEach; j < (k + 1) * kEach; ++j) {
        float x = kept.z[j], y = fmaf(x, of_z().k, -minus_z), ey = exp2_fast(y);
        sz += ey;
        kept.z[j] = ey;
        if constexpr (kOwn) s1 += exp2_fast(fmaf(x, a.one.k, -minus_1));
        if constexpr (kTeacherSums) {
          float u = fmaf(kept.other[j], a.v.by.k, -minus_v), eu = exp2_fast(u);
          sv += eu;
          kept.other[j] = eu;
          if constexpr (Reads::kCross) {
            float own = Reads::kTeacherWeighs ? u : y, there = Reads::kTeacherWeighs ? y : u;
            float weighs = Reads::kTeacherWeighs ? eu : ey;
            float term = Reads::kA == 0 ? Reads::kB * there : Reads::kA * own + Reads::kB * there;
            // A class that the weighing side can't produce contributes nothing, also where a or b is infinite. A NaN is
            // in the sums already.
            term = weighs > 0 ? weighs * term : 0;
            cross += term;
            if constexpr (!Reads::kTeacherWeighs) kept.other[j] = term;
          }
          if constexpr (C::kStats) xv += eu > 0 ? eu * u : 0;
        }
        if constexpr (C::kStats) xz += ey > 0 ? ey * y : 0;
      }
      p.row.z.sum += sz;
      p.row.v.sum += sv;
      p.row.cross += cross;
      p.row.one.sum += s1;
      p.xz += xz;
      p.xv += xv;
    }
    kept.z_ref = p.row.z.ref;
    kept.v_ref = p.row.v.ref;
  }

  // -------------------------------------------------------------------------------------------- phase 2

  // Natural logs of a side from its logits: c x - minus - lse, of logits relative to `top` where they are large.
  struct Logs {
    float c, top, minus, lse;
    bool large;
    KD_FN void prepare(float* x, int n) const {
      if (!large) return;
      KD_UNROLL
      for (int i = 0; i < n; ++i) x[i] -= top;
    }
    KD_FN float operator()(float x) const { return fmaf(x, c, -minus) - lse; }
  };
  KD_FN static Logs logs_of(const Side& side, float top, KdFactor by, bool large) {
    const auto [c, k] = by;
    // The sum is relative to a power of two, which the logs' own reference misses by the difference of two roundings.
    float minus = large ? 0 : top * c, missing = large ? 0 : fmaf(top, c, -minus) - fmaf(top, k, -side.ref.hi) * kLn2;
    return {c, top, minus, kd_log(side.sum) + missing, large};
  }

  // Sums phi and g, and keeps g where the teacher's exponentials were.
  KD_FN void sum_pairs(const Row& r, int stage, const RowState& row, Kept& kept, float& phi_sum, float& g_sum) const {
    const float to_q = to_probability(row.z, kept.z_ref), to_p = to_probability(row.v, kept.v_ref);
    const Logs z_logs = logs_of(row.z, base_z(row.top_z), of_z(), large_z(base_z(row.top_z)));
    const Logs v_logs = logs_of(row.v, base_v(row.top_v), a.v.by, large_v(base_v(row.top_v)));
    phi_sum = g_sum = 0;
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float z[kEach], v[kEach], phis = 0, gs = 0;
      if constexpr (D::kLogs) {
        logits<false>(r, stage, k, z);
        logits<true>(r, stage, k, v);
        z_logs.prepare(z, kEach);
        v_logs.prepare(v, kEach);
      }
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        float lq = 0, lp = 0;
        if constexpr (D::kLogs) {
          lq = z_logs(z[j]);
          lp = v_logs(v[j]);
        }
        float &ez = kept.z[k * kEach + j], &ev_then_g = kept.other[k * kEach + j];
        Terms<float> t = terms_of(d, lq, lp, ez * to_q, ev_then_g * to_p);
        phis += t.phi;
        gs += t.g;
        ev_then_g = t.g;
      }
      phi_sum += phis;
      g_sum += gs;
    }
  }

  // -------------------------------------------------------------------------------------------- phase 3

  // The target against all others: the margins of both sides, and their binary KL.
  struct Target {
    float z, v, phi, g;  // its logits, D of the margins and the derivative
  };
  KD_FN Target target_of(const Row& r, const RowState& others) const {
    Target t;
    t.z = logit_at<false>(r, r.label);
    t.v = logit_at<true>(r, r.label);
    Terms<float> margins = binary_kl(margin(others.z, base_z(others.top_z), t.z, of_z(), large_z(base_z(others.top_z))),
                                     margin(others.v, base_v(others.top_v), t.v, a.v.by, large_v(base_v(others.top_v))));
    t.phi = margins.phi;
    t.g = margins.g;
    return t;
  }
  KD_FN static float margin(const Side& others, float top, float x, KdFactor by, bool large) {
    const Logs logs = logs_of(others, top, by, large);
    logs.prepare(&x, 1);
    return others.sum == 0 ? x + kInf : logs(x);  // of nobody against nobody NaN
  }
  static KD_FN Reference lone(float x, float k) { return reference(x, k, is_large(x * k)); }
  // Puts a single logit back among those of a side.
  KD_FN static void include(Side& side, float x, float k) {
    if (x != kNever) merge(side, Side{lone(x, k), 1});
  }
  // The same of both sides and their figures.
  KD_FN void add_target(Part& p, const Target& t, int label) const {
    Part one{};
    one.row.top_z = t.z;
    one.row.top_v = t.v;
    refer(one.row);
    one.row.z.sum = t.z == kNever ? 0 : 1;
    one.row.v.sum = t.v == kNever ? 0 : 1;
    float top_z = fmaxf(t.z, p.row.top_z), top_v = fmaxf(t.v, p.row.top_v);
    p.best_z = better(p.best_z, p.row.top_z, (unsigned)label, t.z);
    p.best_v = better(p.best_v, p.row.top_v, (unsigned)label, t.v);
    raise(p, top_z, top_v);
    raise(one, top_z, top_v);
    add(p, one);
  }

  // Multiplies by the derivative of the logits with respect to the raw ones, rounds and writes the k-th vector.
  KD_FN void write(const Row& r, int stage, int k, float* dz) const {
    if (local(k) >= (int)a.part) return;
    const int first = first_class(r, k);
    if constexpr (C::kZNoise == kMultiplicative) {
      float x[kEach], factor[kEach];
      logits<false>(r, stage, k, x, factor);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) dz[j] *= factor[j];
    }
    if constexpr (C::kZCapped) {  // d (c tanh(s z / c)) / d z, without a subtraction
      float x[kEach];
      raw(r, stage, false, k, x);
      float slope = a.z.slope, scale = (float)a.z_scale;
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        float e = kd_exp(-2 * fabsf(x[j] * slope));
        dz[j] *= scale * 4 * e / ((1 + e) * (1 + e));
      }
    }
    if (first + kEach > (int)a.classes) {  // beyond both softmaxes
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) dz[j] = first + j < (int)a.classes ? dz[j] : 0;
    }
    store(r, first, dz);
  }
  KD_FN void store(const Row& r, int first, const float* x) const {
    if (first >= 0 && first + kEach <= (int)a.width) {
      store_past_cache(r.out + (long long)first * kSize, pack<kType>(x));
    } else {
      KD_UNROLL
      for (int j = 0; j < kEach; ++j)
        if (first + j >= 0 && first + j < (int)a.width) write_one(r.out + (long long)(first + j) * kSize, kType, x[j]);
    }
  }
  KD_FN void write_nothing(const Row& r) const {
    float nothing[kEach] = {};
    for (int k = 0; k < kVectors; ++k)
      if (local(k) < (int)a.part) store(r, first_class(r, k), nothing);
  }

  // e^z at T = 1, relative to the row's reference there.
  KD_FN float at_one(const RowState& row, float x) const {
    const float base = base_z(row.top_z);
    return exp2_fast(large_z(base) ? (x - base) * a.one.k : fmaf(x, a.one.k, -row.one.ref.hi));
  }

  // Every gradient is W (A ez + B other) + Z ez + C e1, minus the hard term's one-hot. `all` is the softmax that a shared
  // hard term has: the row's own, or where that leaves the target out, the one with it.
  KD_FN void write_gradient(const Row& r, int stage, const RowState& row, const Side& all, const Target& target, float D_of_row,
                            const Kept& kept, int label, float on_soft, float on_hard) const {
    float W = 0, A = 0, B = 0;
    const float to_q = to_probability(row.z, kept.z_ref);
    if constexpr (kTeacher) {
      const float to_p = to_probability(row.v, kept.v_ref);
      if constexpr (!D::kCross) {  // g - q sum g
        W = on_soft;
        A = -row.sum_g * to_q;
        B = 1;
      } else if constexpr (D::kTeacherWeighs) {  // q - p
        float on_student = 1, on_teacher = 1;
        if constexpr (D::kTarget) {
          on_teacher = row.v.sum == 0 ? 0 : d.beta;
          on_student = on_teacher - d.alpha * target.g;
        }
        // The larger factor in front: where p = q, both others are 1 and the difference is exactly 0. Where the others are
        // impossible there is nothing to share.
        float of_q = D::kTarget && (on_student == 0 || row.z.sum == 0) ? 0 : on_student * to_q;
        float of_p = D::kTarget && on_teacher == 0 ? 0 : on_teacher * to_p;
        float larger = fabsf(of_q) > fabsf(of_p) ? fabsf(of_q) : fabsf(of_p);
        if (of_q != of_q || of_p != of_p) larger = of_q + of_p;  // what is NaN stays so
        W = on_soft * larger;
        A = larger == 0 ? 0 : of_q / larger;
        B = larger == 0 ? 0 : -of_p / larger;
      } else {  // q (l - D), l = log(q / p); the kept terms are ez (y - u), relative to the thread's references
        float shift = (kd_apart(kept.z_ref, row.z.ref) - kd_apart(kept.v_ref, row.v.ref)) * kLn2;
        W = on_soft * to_q;
        A = shift - (kd_log(row.z.sum) - kd_log(row.v.sum)) - D_of_row;
        B = kLn2;
      }
    }
    const float hard = on_hard, Z = C::kHard == kSharedHard ? hard * to_probability(all, kept.z_ref) : 0;
    const float over_sum = hard / row.one.sum;
    const bool soft = kTeacher && on_soft != 0;  // a term of weight 0 is absent, also where it is infinite
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float dz[kEach], x[kEach];
      if constexpr (kOwn) logits<false>(r, stage, k, x);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        float ez = kept.z[k * kEach + j], other = kept.other[k * kEach + j];
        dz[j] = soft ? W * (A * ez + B * other) : 0;
        if constexpr (C::kHard == kSharedHard) dz[j] += Z * ez;
        if constexpr (kOwn) dz[j] += hard == 0 ? 0 : over_sum * at_one(row, x[j]);
      }
      if (kHasHard || D::kTarget) {
        const int at = label - first_class(r, k);
        if (label >= 0 && at >= 0 && at < kEach) {
          KD_UNROLL
          for (int j = 0; j < kEach; ++j) {
            if (j != at) continue;
            if constexpr (D::kTarget) {
              float likely = 0;
              if constexpr (C::kHard == kSharedHard) likely = to_probability(all, lone(target.z, of_z().k));
              if constexpr (kOwn) likely = to_probability(row.one, lone(target.z, a.one.k));
              dz[j] = (soft ? on_soft * d.alpha * target.g : 0) + (kHasHard ? hard * likely : 0);
            }
            if constexpr (kHasHard) dz[j] -= hard;
          }
        }
      }
      write(r, stage, k, dz);
    }
  }

  // -------------------------------------------------------------------------------------------- divergences of logits

  struct Sums {
    float phi, hard, entropy_z, entropy_v, agrees, correct;
  };
  // Loss and gradient of logits in one go. `mean` is what is taken off the student's over T.
  KD_FN Sums plain(const Row& r, int stage, float mean, const RowState& row, int label, float on_soft, float on_hard) const {
    Sums total{};
    const float hard = on_hard, over_sum = hard / row.one.sum;
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float z[kEach], v[kEach], dz[kEach];
      const int first = first_class(r, k);
      logits<false>(r, stage, k, z);
      logits<true>(r, stage, k, v);
      Sums part{};
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const bool inside = first + j >= 0 && first + j < (int)a.classes && local(k) < (int)a.part;
        const float y = z[j] * of_z().c, u = v[j] * a.v.by.c;
        Terms<float> t = terms_of(d, y - mean, u, 0.0f, 0.0f);
        part.phi += inside ? t.phi : 0;
        dz[j] = on_soft == 0 ? 0 : on_soft * t.g;
        if constexpr (kHasHard) dz[j] += hard == 0 ? 0 : over_sum * at_one(row, z[j]);
        if constexpr (D::kBinary && C::kHard != kNoHard) {
          float y1 = 0;
          if (inside) y1 = read_one(a.targets + offset(a.target_stride, r.n) + (long long)(first + j) * a.target_stride[3], (int)a.target_type);
          const bool right = (y > 0) == (y1 > 0.5f);
          // What is no probability makes its class NaN, and the loss.
          if (!(y1 >= 0 && y1 <= 1)) y1 = kNaN;
          Terms<float> h = binary_cross_entropy(z[j] * a.one.c, y1);
          part.hard += inside ? h.phi : 0;
          dz[j] += hard * h.g;
          if constexpr (C::kStats) part.correct += inside && right ? 1 : 0;
        }
        if constexpr (D::kBinary && C::kStats) {
          part.entropy_z += inside ? binary_entropy(y) : 0;
          part.entropy_v += inside ? binary_entropy(u) : 0;
          part.agrees += inside && (y > 0) == (u > 0) ? 1 : 0;
        }
      }
      total.phi += part.phi;
      total.hard += part.hard;
      total.entropy_z += part.entropy_z;
      total.entropy_v += part.entropy_v;
      total.agrees += part.agrees;
      total.correct += part.correct;
      if constexpr (kWrites) {
        if constexpr (kHasHard) {
          const int at = label - first;
          KD_UNROLL
          for (int j = 0; j < kEach; ++j)
            if (label >= 0 && j == at) dz[j] -= hard;
        }
        write(r, stage, k, dz);
      }
    }
    return total;
  }
  // What is taken off so that differences sum to 0 where both sides are finite.
  KD_FN float mean_difference(const Row& r, int stage) {
    float sums[4] = {};
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      float z[kEach], v[kEach];
      logits<false>(r, stage, k, z);
      logits<true>(r, stage, k, v);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        float difference = z[j] * of_z().c - v[j] * a.v.by.c;
        bool finite = difference - difference == 0;
        sums[0] += finite ? difference : 0;
        sums[1] += finite ? 1 : 0;
      }
    }
    add_up(sums, 2);
    return sums[1] == 0 ? 0 : sums[0] / sums[1];
  }

  // -------------------------------------------------------------------------------------------- a row

  KD_FN void tell(const Row& r, float soft, float hard, const float* described) const {
    if (!kTells || rank != 0 || thread != 0) return;
    // A term of weight 0 is absent, also where it is infinite.
    double loss = a.soft_weight == 0 ? 0 : a.soft_weight * a.t_factor * (double)soft;
    if (a.hard_weight != 0) loss += a.hard_weight * (double)hard;
    a.figures[r.n] = (float)((double)r.weight * loss);
    if constexpr (C::kStats) {
      a.figures[kRowSoft * a.rows + r.n] = (float)(a.t_factor * (double)soft);
      a.figures[kRowHard * a.rows + r.n] = hard;
      KD_UNROLL
      for (int i = kRowEntropyZ; i <= kRowLabelled; ++i) a.figures[i * a.rows + r.n] = described[i - kRowEntropyZ];
    }
  }

  // A row that counts. Where there is one stage, the next row is fetched as soon as this one's logits aren't needed any more.
  KD_FN void work(const Row& r, int stage) {
    // A label out of range makes its row NaN: looking at it on the host would wait for the device.
    const bool valid = r.labelled && r.label >= 0 && r.label < a.classes;
    const float poison = (kHasHard || D::kTarget) && r.labelled && !valid ? kNaN : 0;
    const int label = valid ? (int)r.label : -1;
    float on_soft = 0, on_hard = 0;
    if constexpr (kWrites) {
      double factor = (double)r.weight / divisor(a.counted, a.given, a.number);
      if constexpr (C::kMode == kScaledGradient) factor *= (double)a.upstream[r.n * a.upstream_stride];
      on_soft = (float)(factor * a.soft_gain);
      on_hard = D::kBinary || r.labelled ? (float)(factor * a.hard_gain) + poison : 0;
    }
    if constexpr (C::kZNoise != kNoNoise) z_noise = row_noise<false>(r.n);
    if constexpr (C::kVNoise != kNoNoise && kTeacher) v_noise = row_noise<true>(r.n);

    Kept kept;
    Part part{};
    float described[5] = {};
    float soft = 0, hard = 0;
    constexpr bool kNorms = !kPlain || kHasHard || (C::kStats && !D::kBinary);
    if constexpr (kNorms) {
      normalise(r, stage, label, kept, part);
      if constexpr (C::kStages == 1 && !kRawAtEnd && !(kPair && D::kLogs)) again();
      merge_all(part);
    }
    RowState& row = part.row;
    row.cross *= kLn2;
    float at_label = 0;
    if ((kHasHard || C::kStats) && label >= 0) at_label = logit_at<false>(r, label);

    if constexpr (kPlain) {
      if constexpr (C::kStats && !D::kBinary) describe(part, label, described);
      float mean = D::kNormaliser == kCentered ? mean_difference(r, stage) : 0;
      Sums sums = plain(r, stage, mean, row, label, on_soft, on_hard);
      if constexpr (C::kStages == 1) again();
      if constexpr (kTells) {
        float totals[4] = {sums.phi, sums.hard, sums.entropy_z, sums.entropy_v};
        add_up(totals, D::kBinary ? 4 : 1);
        soft = totals[0];
        hard = totals[1];
        if constexpr (D::kBinary && C::kStats) {
          float counts[4] = {sums.agrees, sums.correct, 0, 0};
          add_up(counts, 2);
          described[0] = totals[2];
          described[1] = totals[3];
          described[2] = counts[0] / (float)a.classes;
          described[3] = counts[1] / (float)a.classes;
          described[4] = C::kHard != kNoHard;
        }
        if constexpr (kHasHard)
          if (label >= 0) hard = kd_log(row.one.sum) - exponent(at_label, a.one.k, row.one.ref);
      }
    } else {
      Target target{};
      Side all = row.z;
      float D_of_row = 0;
      if constexpr (D::kTarget) {
        if (label >= 0) {
          target = target_of(r, row);
          include(all, target.z, of_z().k);
          if constexpr (kOwn) include(row.one, target.z, a.one.k);
        }
      }
      if constexpr (!kOwn) row.one = all;
      if constexpr (kPair) {
        float sums[4] = {};
        sum_pairs(r, stage, row, kept, sums[0], sums[1]);
        if constexpr (C::kStages == 1 && !kRawAtEnd && D::kLogs) again();
        add_up(sums, 2);
        soft = sums[0];
        row.sum_g = sums[1];
      } else if constexpr (kTeacher) {
        soft = D_of_row = closed_form<float, D>(d, row);
      }
      if constexpr (D::kTarget) {
        soft += d.alpha == 0 ? 0 : d.alpha * target.phi;
        // A counted row needs a label.
        if (label < 0) soft = on_soft = kNaN;
      }
      if constexpr (C::kStats) {
        Part whole = part;
        if constexpr (D::kTarget)
          if (label >= 0) add_target(whole, target, label);
        describe(whole, label, described);
      }
      if constexpr (kHasHard)
        if (label >= 0) hard = kd_log(row.one.sum) - exponent(at_label, (kOwn ? a.one : of_z()).k, row.one.ref);
      if constexpr (kWrites)
        write_gradient(r, stage, row, all, target, D_of_row, kept, label, on_soft, on_hard);
      if constexpr (C::kStages == 1 && kRawAtEnd) again();
    }
    if constexpr (kHasHard) hard = r.labelled ? hard + poison : 0;
    tell(r, soft, hard, described);
  }

  // The natural exponent of a logit relative to a reference.
  KD_FN static float exponent(float x, float k, Reference ref) {
    return ref.lo == 0 ? fmaf(x, k, -ref.hi) * kLn2 : ((x * k - ref.hi) + (fmaf(x, k, -(x * k)) - ref.lo)) * kLn2;
  }

  KD_FN void again() {
    if constexpr (C::kShifted) block_barrier();
    next_counts = fetch(next, 0);
  }

  KD_FN void describe(const Part& p, int label, float* to) const {
    to[0] = kd_log(p.row.z.sum) - p.xz / p.row.z.sum * kLn2;
    to[1] = kd_log(p.row.v.sum) - p.xv / p.row.v.sum * kLn2;
    to[2] = p.best_z == p.best_v;
    to[3] = label >= 0 && (int)p.best_z == label;
    to[4] = label >= 0;
  }

  KD_FN void run() {
    if constexpr (C::kCluster > 1) {
      if (thread == 0) {
        barrier_init(barriers, 1);
        barrier_init(barriers + 1, 1);
      }
      cluster_barrier();
    }
    const long long step = block_count() / C::kCluster;
    int stage = 0;
    bool counts = fetch(block_index() / C::kCluster, stage);
    for (long long n = block_index() / C::kCluster; n < a.rows; n = next) {
      next = n + step;
      copies_done();
      if constexpr (C::kShifted) block_barrier();
      if constexpr (C::kStages == 2) next_counts = fetch(next, stage ^ 1);
      if (counts) {
        work(row_at(n), stage);
      } else {
        // The row may hold anything, NaN too: it isn't read.
        if constexpr (kWrites) write_nothing(row_at(n));
        if constexpr (C::kStages == 1) again();
        if (kTells && rank == 0 && thread == 0)
          for (int i = 0; i < (C::kStats ? kFigures : 1); ++i) a.figures[i * a.rows + n] = 0;
      }
      if constexpr (C::kStages == 2) stage ^= 1;
      counts = next_counts;
    }
  }
};

template <class C>
KD_FN void rows(const KdRows& a) {
  Rows<C>(a).run();
}

// ---------------------------------------------------------------------------------------------- totals and scaling

// Block k adds up figure k of the rows, in one fixed order, and divides: the loss, and the stats. A power of two threads.
KD_FN void total(const KdTotals& a) {
  double* sums = (double*)shared_memory();
  const int k = (int)block_index(), t = thread_index(), threads = block_threads();
  double sum = 0, labelled = 0;
  for (long long n = t; n < a.rows; n += threads) {
    sum += (double)a.figures[k * a.rows + n];
    if (k == kRowCorrect) labelled += (double)a.figures[kRowLabelled * a.rows + n];
  }
  sums[t] = sum;
  sums[threads + t] = labelled;
  for (int half = threads / 2; half > 0; half /= 2) {
    block_barrier();
    if (t < half) {
      sums[t] += sums[t + half];
      sums[threads + t] += sums[threads + t + half];
    }
  }
  if (t != 0) return;
  sum = sums[0];
  if (k == kRowLoss) {
    if (a.loss) *a.loss = (float)(a.loss_mean ? sum / divisor(a.counted, a.given, a.number) : sum);
    return;
  }
  const double counted = a.counted ? (double)*a.counted : (double)a.rows;
  double by = counted > 1 ? counted : 1;
  if (k == kRowSoft || k == kRowHard) by = a.stats_mean ? divisor(a.counted, a.given, a.number) : 1;
  if (k == kRowCorrect) {
    by = sums[threads] > 1 ? sums[threads] : 1;
    a.stats[kRowCorrect] = (float)counted;
  }
  a.stats[k - 1] = (float)(sum / by);
}

// out = in * upstream, a block a row; in place and times 1 it returns at once.
template <int kType>
KD_FN void scale(const KdScale& a) {
  constexpr int kSize = size_of(kType), kEach = 16 / kSize;
  const long long n = block_index();
  const float upstream = a.upstream[n * a.upstream_stride];
  if (a.in_place && upstream == 1) return;
  const char* in = a.in + n * a.width * kSize;
  char* out = a.out + n * a.width * kSize;
  // Rows that don't count stay 0.
  auto scaled = [=](float x) { return x == 0 ? 0.0f : x * upstream; };
  long long begin = 0;
  if ((((unsigned long long)in | (unsigned long long)out) & 15) == 0) {
    begin = a.width / kEach * kEach;
    for (long long i = (long long)thread_index() * kEach; i < begin; i += (long long)block_threads() * kEach) {
      float x[kEach];
      unpack<kType>(*(const Quad*)(in + i * kSize), x);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) x[j] = scaled(x[j]);
      store_past_cache(out + i * kSize, pack<kType>(x));
    }
  }
  for (long long i = begin + thread_index(); i < a.width; i += block_threads())
    write_one(out + i * kSize, kType, scaled(read_one(in + i * kSize, kType)));
}

}  // namespace
