// The CUDA kernels: rows that are read from memory once and kept on chip by the blocks of a cluster.
//
// A cluster takes a row, and each of its blocks a part of it, which is copied to shared memory once and read there by every
// phase: (1) the normalisers of both sides and, where the divergence has a closed form, its cross sum; (2) for the others,
// the sums of phi and g, of which g is kept; (3) the gradient. Phase 3 gives up a vector after the other, in whose place
// the next row is copied. Of narrow rows a multiprocessor has several blocks, so that one computes while others wait.
//
// Between the phases the threads of a row add up what they have, each relative to the largest logits of its own: a warp by
// shuffles, a block in shared memory, a cluster by a message from every block to every other.
//
// kdkernels/backends/cuda_build.py writes the few lines that say what is built: a Config, and a kernel that calls rows<Config>.
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
  static constexpr bool kShifted = false;        // whether sides and gradient may lie differently within 16 bytes
  static constexpr int kMode = kGradient;
  static constexpr int kHard = kNoHard;
  static constexpr bool kStats = false, kZCapped = false, kVCapped = false;
  static constexpr int kZNoise = kNoNoise, kVNoise = kNoNoise;
  static constexpr bool kZPerRow = false, kVPerRow = false;
  static constexpr bool kStored = false;  // whether the teacher is a list of classes: kd_sparse.cu
};

// ---------------------------------------------------------------------------------------------- small things

KD_FN float from_bfloat(unsigned bits) { return as_float(bits << 16); }

// Two 16-bit numbers of a register.
template <int kType>
KD_FN float low_half(unsigned w) {
  return kType == kBFloat16 ? from_bfloat(w) : from_half((unsigned short)w);
}
template <int kType>
KD_FN float high_half(unsigned w) {
  return kType == kBFloat16 ? as_float(w & 0xFFFF0000u) : from_half((unsigned short)(w >> 16));
}
template <int kType>
KD_FN unsigned larger_pair(unsigned a, unsigned b) {
  return kType == kBFloat16 ? larger_bfloats(a, b) : larger_halves(a, b);
}

// A vector as numbers, and back.
template <int kType>
KD_FN void unpack(Quad q, float* x) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == kFloat) {
      x[i] = as_float(q.w[i]);
    } else {
      x[2 * i] = low_half<kType>(q.w[i]);
      x[2 * i + 1] = high_half<kType>(q.w[i]);
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

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
// f of a flag that is compiled in, so that a loop has nothing of what is hardly ever needed.
template <class F>
KD_FN void either(bool flag, F f) {
  if (flag)
    f(Flag<true>{});
  else
    f(Flag<false>{});
}

// ---------------------------------------------------------------------------------------------- parts of a row

// What a thread, a warp or all of a cluster have of a row after phase 1. Exponents are powers of two.
struct Part {
  RowState row;
  float xz, xv;             // for the stats: sums of e^y y
  unsigned best_z, best_v;  // and the first of the largest logits
};

// Of the first n threads of a warp, a power of two, for these; the others get something.
KD_FN float sum_of_warp(float x, int n = 32) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < n) x += from_other(x, mask);
  return x;
}
KD_FN float largest_of_warp(float x, int n = 32) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < n) x = fmaxf(x, from_other(x, mask));
  return x;
}
KD_FN unsigned first_of_warp(unsigned x, int n = 32) {
  KD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    if (mask >= n) continue;
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
  static constexpr bool kSoft = kReadsTeacher<D>, kTeacher = kSoft && !C::kStored;  // a soft term; a teacher's rows
  static constexpr bool kPlain = D::kNormaliser != kSoftmax;  // a divergence of logits
  static constexpr bool kPair = kTeacher && !D::kCross && !kPlain;
  static constexpr bool kWrites = C::kMode != kLoss, kTells = C::kMode != kScaledGradient;
  // A divergence of logits has no softmax that its hard term could share.
  static constexpr bool kHasHard = C::kHard != kNoHard && !D::kBinary;
  static constexpr bool kOwn = kHasHard && (C::kHard == kOwnHard || kPlain);
  static constexpr bool kTeacherSums = kTeacher && (!kPlain || C::kStats);
  // Whether largest logits are found two at a time, as they are.
  static constexpr bool kPacked = kSize == 2 && !C::kZCapped && !C::kVCapped && C::kZNoise == kNoNoise &&
                                  C::kVNoise == kNoNoise && !C::kStats && !D::kTarget;
  static constexpr int kOfG = kEach * (int)sizeof(float) / (int)sizeof(Quad);  // quads that a vector's g takes
  // Of these, how many don't fit where the teacher's vector was, which other threads may still read if rows are shifted.
  static constexpr int kMore = !kPair || !kWrites ? 0 : C::kShifted ? kOfG : kOfG - 1;
  static constexpr bool kReverse = kTeacher && !kPlain && D::kCross && !D::kTeacherWeighs;
  static constexpr int kBoxes = 3;  // quads of a message, at most
  static constexpr float kNever = -kInf;

  // A row, and where this thread's classes of it are.
  struct Row {
    long long n, label;
    const char *z, *v;
    char* out;
    float weight;
    int first;           // class of the block's first vector; below 0 where the row begins within it
    int whole, partial;  // the vectors from `whole` on lie in the row, up to `partial`
    bool counts, labelled;
  };

  const KdRows& a;
  const int thread, threads, lane, warp, warps, rank;
  Barrier* const barriers;
  Quad *const answer, *const warp_boxes, *const boxes;  // what all threads wait for; messages of warps, and of blocks
  const unsigned z_slots, v_slots, more_slots;  // where in shared memory a side's vectors are, and what is kept of them
  int exchanges;  // so far
  D d;
  RowNoise z_noise, v_noise;

  KD_FN explicit Rows(const KdRows& a)
      : a(a), thread(thread_index()), threads(block_threads()), lane(thread & 31), warp(thread >> 5), warps(threads >> 5),
        rank(C::kCluster == 1 ? 0 : (int)(block_index() % C::kCluster)), barriers((Barrier*)shared_memory()),
        answer((Quad*)shared_memory() + 1), warp_boxes(answer + kBoxes), boxes(warp_boxes + kBoxes * warps),
        z_slots(shared_begin() + 16u * (1 + kBoxes + kBoxes * warps + (C::kCluster == 1 ? 0 : 2 * kBoxes * C::kCluster))),
        v_slots(z_slots + 16u * slots()), more_slots(v_slots + (kTeacher ? 16u * slots() : 0)), exchanges(0) {
    KD_UNROLL
    for (int i = 0; i < 4; ++i) ((float*)&d)[i] = a.params[i];
  }

  // Vectors of a side in shared memory: of rows that lie differently within 16 bytes, one more at either end.
  KD_FN int slots() const { return (int)a.part + (C::kShifted ? 2 : 0); }

  // Without a soft term there is no other temperature than 1.
  KD_FN const KdFactor& z_factor() const { return kSoft ? a.z.by : a.one; }

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
    r.first = rank * (int)a.part * kEach - off(owner(r));
    r.whole = r.first < 0 ? 1 : 0;
    r.partial = ((int)a.classes - r.first) >> (kEach == 4 ? 2 : 3);
    return r;
  }

  // By how many classes a tensor's row is off 16 bytes, and the one that this thread's vectors are counted from.
  static KD_FN int off(const char* row) { return (int)((unsigned long long)row & 15) / kSize; }
  KD_FN const char* owner(const Row& r) const { return kWrites ? r.out : r.z; }

  // The first class of the i-th vector of this block's part. A thread's are thread, thread + threads, ...
  KD_FN static int first_class(const Row& r, int i) { return r.first + i * kEach; }
  KD_FN static bool is_whole(const Row& r, int i) { return i >= r.whole && i < r.partial; }

  // -------------------------------------------------------------------------------------------- reading

  // Copies one vector of a side, or what of it lies in the row.
  KD_FN void fetch_vector(const char* row, int from, unsigned to) const {
    if (from >= 0 && from + kEach <= (int)a.classes) {
      copy_later(to, row + (long long)from * kSize);
    } else {
#pragma unroll 1
      for (int j = 0; j < kEach; ++j) {
        bool inside = from + j >= 0 && from + j < (int)a.classes;
        const char* p = row + (long long)(from + j) * kSize;
        void* there = shared_pointer(to + j * kSize);
        if constexpr (kSize == 4)
          *(unsigned*)there = inside ? *(const unsigned*)p : 0xFF800000u;
        else
          *(unsigned short*)there = inside ? *(const unsigned short*)p : kType == kBFloat16 ? 0xFF80 : 0xFC00;
      }
    }
  }
  // Of rows that lie alike, the vector that this thread alone will read.
  KD_FN void fetch_one(const Row& r, int i) const {
    if (is_whole(r, i)) {
      const long long at = (long long)first_class(r, i) * kSize;
      copy_later(z_slots + 16u * i, r.z + at);
      if constexpr (kTeacher) copy_later(v_slots + 16u * i, r.v + at);
    } else {
      fetch_vector(r.z, first_class(r, i), z_slots + 16u * i);
      if constexpr (kTeacher) fetch_vector(r.v, first_class(r, i), v_slots + 16u * i);
    }
  }
  // Copies the block's part of a row to shared memory.
  KD_FN void fetch(const Row& r) const {
    if constexpr (C::kShifted) {
      // Each side in vectors of its own, of which one more at either end has classes of this part.
      const int first = rank * (int)a.part - 1;
      for (int s = thread; s < slots(); s += threads) {
        fetch_vector(r.z, (first + s) * kEach - off(r.z), z_slots + 16u * s);
        if constexpr (kTeacher) fetch_vector(r.v, (first + s) * kEach - off(r.v), v_slots + 16u * s);
      }
    } else {
      for (int i = thread; i < (int)a.part; i += threads) fetch_one(r, i);
    }
  }

  // The raw logits of the i-th vector; -inf beyond the row.
  template <bool kOfTeacher>
  KD_FN void raw(const Row& r, int i, float* x) const {
    const unsigned from = kOfTeacher ? v_slots : z_slots;
    if constexpr (C::kShifted) {
      const int at = (i + 1) * kEach + off(kOfTeacher ? r.v : r.z) - off(owner(r));
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) x[j] = read_one((const char*)shared_pointer(from + (at + j) * kSize), kType);
    } else {
      unpack<kType>(load_shared(from + 16u * i), x);
    }
  }

  // The same as terms use them: capped, with noise. With `factor`, what multiplicative noise has put on them.
  template <bool kOfTeacher>
  KD_FN void logits(const Row& r, int i, float* x, float* factor = nullptr) const {
    constexpr bool kCapped = kOfTeacher ? C::kVCapped : C::kZCapped;
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    const KdSide& side = kOfTeacher ? a.v : a.z;
    raw<kOfTeacher>(r, i, x);
    if constexpr (kCapped || kNoise != kNoNoise) {
      const RowNoise& noise = kOfTeacher ? v_noise : z_noise;
      const int first = first_class(r, i);
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
        for (int j = 0; j < kEach; ++j) {
          const float sample = first + j < 0 ? 0 : normal_at(noise, first + j, sigma);
          KD_UNROLL
          for (int k = 0; k < kEach; ++k) x[k] = k == j ? sample : x[k];  // never by a number that varies: registers have none
        }
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

  // The same of one class.
  template <bool kOfTeacher>
  KD_FN float sample_at(long long c) const {
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    const RowNoise& noise = kOfTeacher ? v_noise : z_noise;
    float sample = 0;
    if constexpr (kNoise != kNoNoise)
      if (noise.active) sample = noise.per_row ? (float)noise.shared : normal_at(noise, c, (float)noise.sigma);
    return sample;
  }

  // One logit of a row, from memory.
  template <bool kOfTeacher>
  KD_FN float logit_at(const Row& r, long long c) const {
    constexpr bool kCapped = kOfTeacher ? C::kVCapped : C::kZCapped;
    constexpr int kNoise = kOfTeacher ? C::kVNoise : C::kZNoise;
    const KdSide& side = kOfTeacher ? a.v : a.z;
    const float x = read_one((kOfTeacher ? r.v : r.z) + c * kSize, kType);
    return processed<kCapped, kNoise>(x, side.cap, side.slope, sample_at<kOfTeacher>(c));
  }

  // -------------------------------------------------------------------------------------------- sums over the cluster

  // Leaves in all threads of the cluster what is made of the messages of all warps: of those of a block by its first warp,
  // and of what that makes by the first warp of every block, which all make the same. merge(got, there, n) is called by all
  // threads of a warp, the first n of them with a message, and leaves that of all in each.
  template <int kQuads, class Merge>
  KD_FN void exchange(Quad (&message)[kQuads], Merge merge) {
    if (lane == 0) {
      KD_UNROLL
      for (int q = 0; q < kQuads; ++q) warp_boxes[q * warps + warp] = message[q];
    }
    block_barrier();
    if (warp == 0) {
      KD_UNROLL
      for (int q = 0; q < kQuads; ++q) message[q] = warp_boxes[q * warps + (lane < warps ? lane : 0)];
      merge(message, lane < warps, 32);
      if constexpr (C::kCluster > 1) {
        // What is sent next goes to the other side, and to this one only when everybody has read it.
        const int side = exchanges & 1;
        Quad* box = boxes + side * kBoxes * C::kCluster;
        if (lane == 0) barrier_expect(barriers + side, kQuads * C::kCluster * (unsigned)sizeof(Quad));
        if (lane < C::kCluster) {
          KD_UNROLL
          for (int q = 0; q < kQuads; ++q) send(box + q * C::kCluster + rank, message[q], barriers + side, (unsigned)lane);
        }
        barrier_wait(barriers + side, (unsigned)(exchanges >> 1) & 1);
        KD_UNROLL
        for (int q = 0; q < kQuads; ++q) message[q] = box[q * C::kCluster + (lane < C::kCluster ? lane : 0)];
        merge(message, lane < C::kCluster, C::kCluster);
      }
      if (lane == 0) {
        KD_UNROLL
        for (int q = 0; q < kQuads; ++q) answer[q] = message[q];
      }
    }
    block_barrier();
    KD_UNROLL
    for (int q = 0; q < kQuads; ++q) message[q] = answer[q];
    ++exchanges;
  }

  // Sums of up to four numbers.
  template <int kN>
  KD_FN void add_up(float (&x)[4]) {
    Quad message[1] = {};
    KD_UNROLL
    for (int i = 0; i < kN; ++i) message[0].w[i] = as_bits(sum_of_warp(x[i]));
    exchange<1>(message, [](Quad(&got)[1], bool there, int n) {
      KD_UNROLL
      for (int i = 0; i < kN; ++i) got[0].w[i] = as_bits(sum_of_warp(there ? as_float(got[0].w[i]) : 0, n));
    });
    KD_UNROLL
    for (int i = 0; i < kN; ++i) x[i] = as_float(message[0].w[i]);
  }

  // What the references of a part are of, given its largest logit: 0 where no exponent is finite.
  KD_FN float base_z(float top) const {
    return top * z_factor().k == kNever || (kOwn && top * a.one.k == kNever) ? 0 : top;
  }
  KD_FN float base_v(float top) const { return top * a.v.by.k == kNever ? 0 : top; }
  KD_FN bool large_z(float base) const { return is_large(base * z_factor().k) || (kOwn && is_large(base * a.one.k)); }
  KD_FN bool large_v(float base) const { return is_large(base * a.v.by.k); }
  KD_FN static Reference reference(float base, float k, bool large) {
    float hi = product(base, k);
    return {hi, large && hi - hi == 0 ? fmaf(base, k, -hi) : 0.0f};
  }
  KD_FN void refer(RowState& row) const {
    const float z = base_z(row.top_z), v = base_v(row.top_v);
    const bool large = large_z(z);
    row.z.ref = reference(z, z_factor().k, large);
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
  KD_FN void merge_warp(Part& p, int n = 32) const {
    float top_z = largest_of_warp(p.row.top_z, n), top_v = kTeacherSums ? largest_of_warp(p.row.top_v, n) : kNever;
    if constexpr (C::kStats) {
      p.best_z = first_of_warp(p.row.top_z == top_z ? p.best_z : ~0u, n);
      p.best_v = first_of_warp(p.row.top_v == top_v ? p.best_v : ~0u, n);
    }
    raise(p, top_z, top_v);
    p.row.z.sum = sum_of_warp(p.row.z.sum, n);
    if constexpr (kTeacherSums) p.row.v.sum = sum_of_warp(p.row.v.sum, n);
    if constexpr (kTeacherSums && Reads::kCross) p.row.cross = sum_of_warp(p.row.cross, n);
    if constexpr (kOwn) p.row.one.sum = sum_of_warp(p.row.one.sum, n);
    if constexpr (C::kStats) {
      p.xz = sum_of_warp(p.xz, n);
      p.xv = sum_of_warp(p.xv, n);
    }
  }
  // The same of a cluster.
  KD_FN void merge_all(Part& p) {
    constexpr int kQuads = C::kStats ? 3 : kOwn || (kTeacherSums && Reads::kCross) ? 2 : 1;
    merge_warp(p);
    Quad message[kQuads];
    write_message(message, p);
    exchange<kQuads>(message, [&](Quad(&got)[kQuads], bool there, int n) {
      Part part = read_message(got, there);
      merge_warp(part, n);
      write_message(got, part);
    });
    p = read_message(message, true);
  }
  template <int kQuads>
  static KD_FN void write_message(Quad (&to)[kQuads], const Part& p) {
    to[0] = {as_bits(p.row.top_z), as_bits(p.row.top_v), as_bits(p.row.z.sum), as_bits(p.row.v.sum)};
    if constexpr (kQuads > 1) to[1] = {as_bits(p.row.cross), as_bits(p.row.one.sum), as_bits(p.xz), as_bits(p.xv)};
    if constexpr (kQuads > 2) to[2] = {p.best_z, p.best_v, 0, 0};
  }
  template <int kQuads>
  KD_FN Part read_message(const Quad (&from)[kQuads], bool there) const {
    Part p{};
    p.row.top_z = there ? as_float(from[0].w[0]) : kNever;
    p.row.top_v = there ? as_float(from[0].w[1]) : kNever;
    p.row.z.sum = there ? as_float(from[0].w[2]) : 0;
    p.row.v.sum = there ? as_float(from[0].w[3]) : 0;
    if constexpr (kQuads > 1) {
      p.row.cross = there ? as_float(from[1].w[0]) : 0;
      p.row.one.sum = there ? as_float(from[1].w[1]) : 0;
      p.xz = there ? as_float(from[1].w[2]) : 0;
      p.xv = there ? as_float(from[1].w[3]) : 0;
    }
    if constexpr (kQuads > 2) {
      p.best_z = there ? from[2].w[0] : ~0u;
      p.best_v = there ? from[2].w[1] : ~0u;
    }
    refer(p.row);
    return p;
  }
  static KD_FN unsigned better(unsigned first, float top, unsigned second, float other) {
    return other > top ? second : other == top && second < first ? second : first;
  }

  // -------------------------------------------------------------------------------------------- phase 1

  // The largest logits of this thread's classes.
  KD_FN void find_tops(const Row& r, int excluded, Part& p) const {
    p.row.top_z = p.row.top_v = kNever;
    if constexpr (kPacked && !C::kShifted) {
      constexpr unsigned kLowest = kType == kBFloat16 ? 0xFF80FF80u : 0xFC00FC00u;
      unsigned z = kLowest, v = kLowest;
      for (int i = thread; i < (int)a.part; i += threads) {
        const Quad of_z = load_shared(z_slots + 16u * i), of_v = kTeacherSums ? load_shared(v_slots + 16u * i) : of_z;
        KD_UNROLL
        for (int w = 0; w < 4; ++w) {
          z = larger_pair<kType>(z, of_z.w[w]);
          if constexpr (kTeacherSums) v = larger_pair<kType>(v, of_v.w[w]);
        }
      }
      p.row.top_z = fmaxf(low_half<kType>(z), high_half<kType>(z));
      if constexpr (kTeacherSums) p.row.top_v = fmaxf(low_half<kType>(v), high_half<kType>(v));
    } else {
      for (int i = thread; i < (int)a.part; i += threads) {
        float z[kEach], v[kEach];
        of_phase_1(r, i, excluded, z, v);
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          if constexpr (C::kStats) {
            if (z[j] > p.row.top_z) p.best_z = (unsigned)(first_class(r, i) + j);
            if (v[j] > p.row.top_v) p.best_v = (unsigned)(first_class(r, i) + j);
          }
          p.row.top_z = fmaxf(p.row.top_z, z[j]);
          if constexpr (kTeacherSums) p.row.top_v = fmaxf(p.row.top_v, v[j]);
        }
      }
    }
  }
  KD_FN void of_phase_1(const Row& r, int i, int excluded, float* z, float* v) const {
    logits<false>(r, i, z);
    if constexpr (kTeacherSums) logits<true>(r, i, v);
    if constexpr (D::kTarget) {
      const int at = excluded - first_class(r, i);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        z[j] = j == at ? kNever : z[j];
        v[j] = j == at ? kNever : v[j];
      }
    }
  }

  KD_FN void normalise(const Row& r, int excluded, Part& p) const {
    p = Part{};
    find_tops(r, excluded, p);
    refer(p.row);
    const Exponents of_z = powers(p.row.z.ref, base_z(p.row.top_z), large_z(base_z(p.row.top_z)), z_factor().k);
    const Exponents of_1 = powers(p.row.one.ref, of_z.base, of_z.large, a.one.k);
    const Exponents of_v = powers(p.row.v.ref, base_v(p.row.top_v), large_v(base_v(p.row.top_v)), a.v.by.k);
    either(of_z.large || of_v.large, [&](auto large) {
      for (int i = thread; i < (int)a.part; i += threads) {
        float z[kEach], v[kEach];
        of_phase_1(r, i, excluded, z, v);
        of_z.prepare(z, kEach, large);
        if constexpr (kTeacherSums) of_v.prepare(v, kEach, large);
        // A vector's sums first: shorter chains of additions, and smaller errors.
        float sz = 0, sv = 0, cross = 0, s1 = 0, xz = 0, xv = 0;
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          const float y = of_z(z[j]), ey = exp2_fast(y);
          sz += ey;
          if constexpr (kOwn) s1 += exp2_fast(of_1(z[j]));
          if constexpr (kTeacherSums) {
            const float u = of_v(v[j]), eu = exp2_fast(u);
            sv += eu;
            if constexpr (Reads::kCross) {
              const float own = Reads::kTeacherWeighs ? u : y, there = Reads::kTeacherWeighs ? y : u;
              const float weighs = Reads::kTeacherWeighs ? eu : ey;
              const float term = Reads::kA == 0 ? Reads::kB * there : Reads::kA * own + Reads::kB * there;
              // A class that the weighing side can't produce contributes nothing, also where a or b is infinite. A NaN is
              // in the sums already.
              if (weighs > 0) cross = fmaf(weighs, term, cross);
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
    });
  }

  // Exponents of a side from its logits, or logs: c x - minus, of logits relative to `base` where they are large.
  struct Exponents {
    float c, base, minus;
    bool large;
    template <class Large>
    KD_FN void prepare(float* x, int n, Large) const {
      if constexpr (Large::value) {
        if (!large) return;
        KD_UNROLL
        for (int i = 0; i < n; ++i) x[i] -= base;
      }
    }
    KD_FN float operator()(float x) const { return fmaf(x, c, -minus); }
  };
  static KD_FN Exponents powers(Reference ref, float base, bool large, float k) {
    return {k, base, large ? 0 : ref.hi, large};
  }

  // -------------------------------------------------------------------------------------------- phase 2

  // Natural logs of a side: minus has its log-sum-exp in it, rounded as the logits' products with c are.
  KD_FN static Exponents logs_of(const Side& side, float base, KdFactor by, bool large) {
    const auto [c, k] = by;
    // The sum is relative to a power of two, which the logs' own reference misses by the difference of two roundings.
    const float minus = large ? 0 : product(base, c);
    const float missing = large ? 0 : fmaf(base, c, -minus) - fmaf(base, k, -side.ref.hi) * kLn2;
    return {c, base, minus + (kd_log(side.sum) + missing), large};
  }
  // The same in powers of two.
  KD_FN static Exponents bits_of(const Side& side, float base, float k, bool large) {
    return {k, base, (large ? 0 : side.ref.hi) + kd_log(side.sum) * kLog2e, large};
  }
  KD_FN Exponents z_logs_of(const RowState& row) const {
    const float base = base_z(row.top_z);
    return logs_of(row.z, base, z_factor(), large_z(base));
  }
  KD_FN Exponents v_logs_of(const RowState& row) const {
    const float base = base_v(row.top_v);
    return logs_of(row.v, base, a.v.by, large_v(base));
  }

  // Where g of the i-th vector is kept: in the place of the teacher's logits, as far as it fits.
  KD_FN unsigned of_g(int i, int part) const {
    if constexpr (!C::kShifted)
      if (part == 0) return v_slots + 16u * i;
    return more_slots + 16u * ((part - (C::kShifted ? 0 : 1)) * (int)a.part + i);
  }

  // Sums phi and g, and keeps g.
  KD_FN void sum_pairs(const Row& r, const RowState& row, float& phi_sum, float& g_sum) const {
    // Of a divergence of probabilities alone powers of two are all that is needed.
    constexpr bool kBits = D::kInUnits || !D::kLogs;
    const float z_base = base_z(row.top_z), v_base = base_v(row.top_v);
    const Exponents z_logs = kBits ? bits_of(row.z, z_base, z_factor().k, large_z(z_base)) : z_logs_of(row);
    const Exponents v_logs = kBits ? bits_of(row.v, v_base, a.v.by.k, large_v(v_base)) : v_logs_of(row);
    phi_sum = g_sum = 0;
    either(z_logs.large || v_logs.large, [&](auto large) {
      for (int i = thread; i < (int)a.part; i += threads) {
        float z[kEach], v[kEach], phis = 0, gs = 0;
        logits<false>(r, i, z);
        logits<true>(r, i, v);
        z_logs.prepare(z, kEach, large);
        v_logs.prepare(v, kEach, large);
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          const float lq = z_logs(z[j]), lp = v_logs(v[j]);
          const Terms<float> t = kBits ? terms_of(d, lq, lp, exp2_fast(lq), exp2_fast(lp))
                                       : terms_of(d, lq, lp, kd_exp(lq), kd_exp(lp));
          phis += t.phi;
          gs += t.g;
          v[j] = t.g;
        }
        phi_sum += phis;
        g_sum += gs;
        if constexpr (kWrites) {
          KD_UNROLL
          for (int part = 0; part < kOfG; ++part) store_shared(of_g(i, part), pack<kFloat>(v + 4 * part));
        }
      }
    });
  }

  // -------------------------------------------------------------------------------------------- phase 3

  // The target against all others: the margins of both sides, and their binary KL.
  struct Target {
    float z, v, phi, g;  // its logits, D of the margins and the derivative
  };
  KD_FN Target target_of(float z, float v, const RowState& others) const {
    Target t;
    t.z = z;
    t.v = v;
    // Once a row, and so in double, whose functions are no approximations.
    const double of_z = margin(others.z, z_logs_of(others), t.z), of_v = margin(others.v, v_logs_of(others), t.v);
    const Terms<double> margins = binary_kl(of_z, of_v);
    t.phi = (float)margins.phi;
    t.g = (float)margins.g;
    return t;
  }
  KD_FN static float margin(const Side& others, const Exponents& logs, float x) {
    logs.prepare(&x, 1, Flag<true>{});
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

  // Multiplies by the derivative of the logits with respect to the raw ones.
  KD_FN void chain(const Row& r, int i, float* dz) const {
    if constexpr (C::kZNoise == kMultiplicative) {
      float x[kEach], factor[kEach];
      logits<false>(r, i, x, factor);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) dz[j] *= factor[j];
    }
    if constexpr (C::kZCapped) {
      float x[kEach];
      raw<false>(r, i, x);
      float slope = a.z.slope, scale = (float)a.z_scale;
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) dz[j] *= slope_of_cap(x[j], slope, scale);
    }
  }
  // d (c tanh(s z / c)) / d z, without a subtraction.
  static KD_FN float slope_of_cap(float x, float slope, float scale) {
    float e = kd_exp(-2 * fabsf(x * slope));
    return scale * 4 * e / ((1 + e) * (1 + e));
  }
  // The same, rounded and written, of the i-th vector.
  KD_FN void write(const Row& r, int i, float* dz) const {
    chain(r, i, dz);
    store(r, i, dz);
  }
  // What lies beyond both softmaxes gets 0.
  KD_FN void store(const Row& r, int i, const float* x) const {
    const int first = first_class(r, i);
    if (is_whole(r, i)) {
      store_past_cache(r.out + (long long)first * kSize, pack<kType>(x));
    } else {
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const int c = first + j;
        if (c >= 0 && c < (int)a.width) write_one(r.out + (long long)c * kSize, kType, c < (int)a.classes ? x[j] : 0);
      }
    }
  }
  KD_FN void write_nothing(const Row& r) const {
    const float nothing[kEach] = {};
    for (int i = thread; i < (int)a.part; i += threads) store(r, i, nothing);
  }

  // The gradient: q - p and the like, or g - q sum g, plus the hard term's softmax minus its one-hot. `all` is the softmax
  // that a shared hard term has: the row's own, or where that leaves the target out, the one with it.
  KD_FN void write_gradient(const Row& r, const Row& after, const RowState& row, const Side& all, const Target& target,
                            float D_of_row, int label, float on_soft, float on_hard) const {
    const float base = base_z(row.top_z);
    const Exponents of_z = powers(row.z.ref, base, large_z(base), z_factor().k);
    const Exponents of_1 = powers(row.one.ref, base, of_z.large, a.one.k);
    const float over_v = base_v(row.top_v);
    const Exponents of_v = powers(row.v.ref, over_v, large_v(over_v), a.v.by.k);
    const Exponents z_logs = z_logs_of(row), v_logs = v_logs_of(row);
    float W = on_soft, A = 1, B = 1;  // W (A ez + B ev), or W (g - A ez)
    if constexpr (kPair) A = row.sum_g / row.z.sum;
    if constexpr (kTeacher && D::kCross && D::kTeacherWeighs) {
      float on_student = 1, on_teacher = 1;
      if constexpr (D::kTarget) {
        on_teacher = row.v.sum == 0 ? 0 : d.beta;
        on_student = on_teacher - d.alpha * target.g;
      }
      // The larger factor in front: where p = q, both others are 1 and the difference is exactly 0. Where the others are
      // impossible there is nothing to share.
      float of_q = D::kTarget && (on_student == 0 || row.z.sum == 0) ? 0 : on_student / row.z.sum;
      float of_p = D::kTarget && on_teacher == 0 ? 0 : on_teacher / row.v.sum;
      float larger = fabsf(of_q) > fabsf(of_p) ? fabsf(of_q) : fabsf(of_p);
      if (of_q != of_q || of_p != of_p) larger = of_q + of_p;  // what is NaN stays so
      W = on_soft * larger;
      A = larger == 0 ? 0 : of_q / larger;
      B = larger == 0 ? 0 : -of_p / larger;
    }
    const float Z = C::kHard == kSharedHard ? on_hard * to_probability(all, row.z.ref) : 0;
    const float over_one = on_hard / row.one.sum;
    // A term of weight 0 is absent, also where it is infinite. Without stats it is so for the weight of its row.
    const bool soft = kTeacher && (!C::kStats || on_soft != 0);
    if (on_soft == 0 && on_hard == 0) {
      write_nothing(r);
      if constexpr (!C::kShifted)
        if (after.counts) fetch(after);
      return;
    }
    either(of_z.large || (kTeacher && of_v.large), [&](auto large) {
      for (int i = thread; i < (int)a.part; i += threads) {
        float dz[kEach], z[kEach], v[kEach];
        logits<false>(r, i, z);
        if constexpr (kPair) {
          KD_UNROLL
          for (int part = 0; part < kOfG; ++part) unpack<kFloat>(load_shared(of_g(i, part)), v + 4 * part);
        } else if constexpr (kTeacher) {
          logits<true>(r, i, v);
          of_v.prepare(v, kEach, large);
        }
        of_z.prepare(z, kEach, large);
        KD_UNROLL
        for (int j = 0; j < kEach; ++j) {
          [[maybe_unused]] float ez = 0;
          dz[j] = 0;
          if constexpr (!kReverse || C::kHard == kSharedHard) ez = exp2_fast(of_z(z[j]));
          if constexpr (kPair) {
            dz[j] = W * (v[j] - A * ez);
          } else if constexpr (kReverse) {  // q (l - D), l = log(q / p)
            const float lq = z_logs(z[j]), lp = v_logs(v[j]), q = kd_exp(lq);
            float centred = q > 0 ? lq - lp - D_of_row : 0;
            // Of exponents as large as those the last digit of l or D is a number of nats: where one class has all of the
            // mass, they are the same.
            if constexpr (decltype(large)::value) centred = q == 1 ? 0 : centred;
            dz[j] = W * q * centred;
          } else if constexpr (kTeacher) {
            dz[j] = W * (A * ez + B * exp2_fast(of_v(v[j])));
          }
          if constexpr (!kTeacher || C::kStats)
            if (!soft) dz[j] = 0;
          if constexpr (C::kHard == kSharedHard) dz[j] += Z * ez;
          if constexpr (kOwn) dz[j] += on_hard == 0 ? 0 : over_one * exp2_fast(of_1(z[j]));
        }
        if constexpr (kHasHard || D::kTarget) {
          const int at = label - first_class(r, i);
          if (label >= 0 && at >= 0 && at < kEach) {
            KD_UNROLL
            for (int j = 0; j < kEach; ++j) {
              if (j != at) continue;
              if constexpr (D::kTarget) {
                float likely = 0;
                if constexpr (C::kHard == kSharedHard) likely = to_probability(all, lone(target.z, z_factor().k));
                if constexpr (kOwn) likely = to_probability(row.one, lone(target.z, a.one.k));
                dz[j] = (soft ? on_soft * d.alpha * target.g : 0) + (kHasHard ? on_hard * likely : 0);
              }
              if constexpr (kHasHard) dz[j] -= on_hard;
            }
          }
        }
        write(r, i, dz);
        if constexpr (!C::kShifted)
          if (after.counts) fetch_one(after, i);
      }
    });
  }

  // -------------------------------------------------------------------------------------------- divergences of logits

  struct Sums {
    float phi, hard, entropy_z, entropy_v, agrees, correct;
  };
  // Loss and gradient of logits in one go. `mean` is what is taken off the student's over T.
  KD_FN Sums plain(const Row& r, const Row& after, float mean, const RowState& row, int label, float on_soft,
                   float on_hard) const {
    Sums total{};
    const float base = base_z(row.top_z), over_one = on_hard / row.one.sum;
    const Exponents of_1 = powers(row.one.ref, base, large_z(base), a.one.k);
    for (int i = thread; i < (int)a.part; i += threads) {
      float z[kEach], v[kEach], dz[kEach];
      const int first = first_class(r, i);
      logits<false>(r, i, z);
      logits<true>(r, i, v);
      Sums part{};
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const bool inside = first + j >= 0 && first + j < (int)a.classes;
        const float y = z[j] * z_factor().c, u = v[j] * a.v.by.c;
        Terms<float> t = terms_of(d, y - mean, u, 0.0f, 0.0f);
        part.phi += inside ? t.phi : 0;
        dz[j] = on_soft == 0 ? 0 : on_soft * t.g;
        if constexpr (kHasHard) {
          float x = z[j];
          of_1.prepare(&x, 1, Flag<true>{});
          dz[j] += on_hard == 0 ? 0 : over_one * exp2_fast(of_1(x));
        }
        if constexpr (D::kBinary && C::kHard != kNoHard) {
          float y1 = 0;
          const char* at = a.targets + offset(a.target_stride, r.n) + (long long)(first + j) * a.target_stride[3];
          if (inside) y1 = read_one(at, (int)a.target_type);
          const bool right = (y > 0) == (y1 > 0.5f);
          // What is no probability makes its class NaN, and the loss.
          if (!(y1 >= 0 && y1 <= 1)) y1 = kNaN;
          Terms<float> h = binary_cross_entropy(z[j] * a.one.c, y1);
          part.hard += inside ? h.phi : 0;
          dz[j] += on_hard * h.g;
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
            if (label >= 0 && j == at) dz[j] -= on_hard;
        }
        write(r, i, dz);
      }
      if constexpr (!C::kShifted && kWrites)
        if (after.counts) fetch_one(after, i);
    }
    return total;
  }
  // What is taken off so that differences sum to 0 where both sides are finite.
  KD_FN float mean_difference(const Row& r) {
    float sums[4] = {};
    for (int i = thread; i < (int)a.part; i += threads) {
      float z[kEach], v[kEach];
      logits<false>(r, i, z);
      logits<true>(r, i, v);
      KD_UNROLL
      for (int j = 0; j < kEach; ++j) {
        float difference = z[j] * z_factor().c - v[j] * a.v.by.c;
        bool finite = difference - difference == 0;
        sums[0] += finite ? difference : 0;
        sums[1] += finite ? 1 : 0;
      }
    }
    add_up<2>(sums);
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

  // A row's label, or -1 where it is none, and what its terms weigh in the gradient.
  struct Weights {
    int label;
    float poison, on_soft, on_hard;
  };
  KD_FN Weights weights_of(const Row& r) const {
    // A label out of range makes its row NaN: looking at it on the host would wait for the device.
    const bool valid = r.labelled && r.label >= 0 && r.label < a.classes;
    Weights w{};
    w.poison = (kHasHard || D::kTarget) && r.labelled && !valid ? kNaN : 0;
    w.label = valid ? (int)r.label : -1;
    if constexpr (kWrites) {
      float factor = r.weight / (float)divisor(a.counted, a.given, a.number);
      if constexpr (C::kMode == kScaledGradient) factor *= a.upstream[r.n * a.upstream_stride];
      w.on_soft = factor * (float)a.soft_gain;
      w.on_hard = D::kBinary || r.labelled ? factor * (float)a.hard_gain + w.poison : 0;
    }
    return w;
  }

  // A row that counts, and the one after it, which takes its place.
  KD_FN void work(const Row& r, const Row& after) {
    auto [label, poison, on_soft, on_hard] = weights_of(r);
    if constexpr (C::kZNoise != kNoNoise) z_noise = row_noise<false>(r.n);
    if constexpr (C::kVNoise != kNoNoise && kTeacher) v_noise = row_noise<true>(r.n);

    Part part{};
    float described[5] = {};
    float soft = 0, hard = 0;
    constexpr bool kNorms = !kPlain || kHasHard || (C::kStats && !D::kBinary);
    // Before the first exchange: after it other blocks may write the gradient in the place of the logits.
    float at_label = 0, v_at_label = 0;
    if constexpr (kHasHard || C::kStats || D::kTarget)
      if (label >= 0) at_label = logit_at<false>(r, label);
    if constexpr (D::kTarget)
      if (label >= 0) v_at_label = logit_at<true>(r, label);
    if constexpr (kNorms) {
      normalise(r, label, part);
      merge_all(part);
    }
    RowState& row = part.row;
    row.cross *= kLn2;
    if constexpr (kPlain) {
      if constexpr (C::kStats && !D::kBinary) describe(part, label, described);
      float mean = D::kNormaliser == kCentered ? mean_difference(r) : 0;
      Sums sums = plain(r, after, mean, row, label, on_soft, on_hard);
      if constexpr (kTells) {
        float totals[4] = {sums.phi, sums.hard, sums.entropy_z, sums.entropy_v};
        add_up<(D::kBinary ? 4 : 1)>(totals);
        soft = totals[0];
        hard = totals[1];
        if constexpr (D::kBinary && C::kStats) {
          float counts[4] = {sums.agrees, sums.correct, 0, 0};
          add_up<2>(counts);
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
          target = target_of(at_label, v_at_label, row);
          include(all, target.z, z_factor().k);
          if constexpr (kOwn) include(row.one, target.z, a.one.k);
        }
      }
      if constexpr (!kOwn) row.one = all;
      if constexpr (kPair) {
        float sums[4] = {};
        sum_pairs(r, row, sums[0], sums[1]);
        add_up<2>(sums);
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
        if (label >= 0) hard = kd_log(row.one.sum) - exponent(at_label, (kOwn ? a.one : z_factor()).k, row.one.ref);
      if constexpr (kWrites)
        write_gradient(r, after, row, all, target, D_of_row, label, on_soft, on_hard);
    }
    if constexpr (kHasHard) hard = r.labelled ? hard + poison : 0;
    tell(r, soft, hard, described);
  }

  // The natural exponent of a logit relative to a reference.
  KD_FN static float exponent(float x, float k, Reference ref) {
    const float xk = product(x, k);
    return ref.lo == 0 ? fmaf(x, k, -ref.hi) * kLn2 : ((xk - ref.hi) + (fmaf(x, k, -xk) - ref.lo)) * kLn2;
  }

  KD_FN void describe(const Part& p, int label, float* to) const {
    to[0] = kd_log(p.row.z.sum) - p.xz / p.row.z.sum * kLn2;
    to[1] = kd_log(p.row.v.sum) - p.xv / p.row.v.sum * kLn2;
    to[2] = p.best_z == p.best_v;
    to[3] = label >= 0 && (int)p.best_z == label;
    to[4] = label >= 0;
  }

  // All rows of this cluster, one after another; `self` is this as what it is, whose rows may know more.
  template <class Self>
  KD_FN void run(Self& self) {
    if constexpr (C::kCluster > 1) {
      if (thread == 0) {
        barrier_init(barriers, 1);
        barrier_init(barriers + 1, 1);
      }
      cluster_barrier();
    }
    const long long step = block_count() / C::kCluster;
    auto r = self.row_at(block_index() / C::kCluster);
    if (r.counts) fetch(r);
    for (long long n = block_index() / C::kCluster; n < a.rows; n += step) {
      const auto after = self.row_at(n + step);
      copies_done();
      if constexpr (C::kShifted) block_barrier();
      if (r.counts) {
        self.work(r, after);
      } else {
        // The row may hold anything, NaN too: it isn't read.
        if constexpr (kWrites) write_nothing(r);
        if (kTells && rank == 0 && thread == 0)
          for (int i = 0; i < (C::kStats ? kFigures : 1); ++i) a.figures[i * a.rows + n] = 0;
      }
      // What wasn't copied vector by vector in the place of this row.
      if (after.counts && (C::kShifted || !kWrites || !r.counts)) {
        if constexpr (C::kShifted) block_barrier();
        fetch(after);
      }
      r = after;
    }
  }
};

template <class C>
KD_FN void rows(const KdRows& a) {
  Rows<C> self(a);
  self.run(self);
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
