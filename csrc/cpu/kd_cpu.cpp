// The CPU library: one generic row kernel behind a plain C interface, loaded by kdkernels/backends/cpu.py with ctypes.
//
// A row goes through at most three phases: (1) the normalisers of both sides and, where the divergence has a closed
// form, its cross sum; (2) for the others, the sums of phi and g; (3) the gradient. Divergences of the logits themselves
// need one. All work on blocks of kBlock classes in the working precision R (float, or double for double logits): a reader
// turns any dtype, stride, scale, softcap or noise into such a block, and a writer rounds the finished gradient once.
// blocks.h has those, phases.h the phases, this file what surrounds them.
//
// Phase 1 reads the row from memory and keeps the exponentials in a buffer that stays in the second-level cache, so that
// each is computed once: the gradient of every divergence here is then a linear combination of what was kept.
//
// This file is compiled once per instruction set (KD_ISA names the variant), and once with KD_DISPATCH for the entry
// points that pick a variant at load. No torch, no libstdc++, no libm, no -ffast-math.

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define KD_ABI 9
#define KD_MAX_DIMS 8

// ---------------------------------------------------------------------------------------------- the C interface
// Both records are arrays of 8-byte fields; backends/cpu.py packs them in this order.

// The noise of one side.
struct KdNoise {
  int64_t kind;  // 0 none, 1 additive, 2 multiplicative
  int64_t per_row, row_offset;
  double sigma, probability;
};

// What a call computes, the same for every call of a LossSpec.
struct KdOptions {
  int64_t divergence;  // a number of KD_DIVERGENCES
  double params[4];
  double temperature, soft_weight, t_factor, hard_weight;
  int64_t ignore_index, reduction;  // 0 mean, 1 sum, 2 none
  double z_scale, z_cap;            // a cap of 0 is none
  KdNoise z_noise, v_noise;
  int64_t stats;
  int64_t stream_bytes;  // gradients of at least this many bytes bypass the cache
  int64_t grain;         // elements below which work is not split
  int64_t huge_bytes;    // gradients of at least this many bytes are asked for in huge pages
};

// One tensor of rows, [..., V]: the student, a teacher, or the labels of a binary divergence.
struct KdSide {
  const void* data;
  int64_t type;                  // 0 float, 1 double, 2 bfloat16, 3 half
  int64_t column;                // stride of the last dimension, in elements
  int64_t stride[KD_MAX_DIMS];   // of the leading dimensions
  double scale, cap;
};

// One call. Leading dimensions are common to all sides.
struct KdCall {
  int64_t mode;  // 0: loss; 1: loss and gradient; 2: gradient times upstream; 3 and 4: of shards, see Mode
  int64_t rows, classes, width;  // width: the gradient's classes; those from `classes` on get 0
  int64_t dims, shape[KD_MAX_DIMS];
  const int64_t* labels;   // [rows] or null
  const uint8_t* mask;     // [rows] or null
  const double* weights;   // [rows] or null
  double num_items;        // < 0: none given
  const void* upstream;    // mode 2: [rows] or one, of the loss's type
  int64_t upstream_stride;
  void* gradient;          // [rows, width], of z's type
  void* loss;              // one, or [rows]; float, or double where any side is double
  double* stats;           // [7]
  void (*parallel_for)();  // torch_parallel_for, or null for serial
  int64_t z_seed, v_seed;
  const double* mixture;   // [rows or one, teachers], or null for one teacher
  int64_t mixture_stride;
  int64_t targets;         // whether the labels of a binary divergence are given: then they are the last of the sides
  int64_t teachers;
  const int64_t* ids;      // [rows, stored] of a stored teacher, which has no side, or null
  int64_t stored;
  const void* log_p;       // [rows, stored], of the loss's type, like the next two
  const void* rest;        // [rows], or null: nothing is said of the other classes
  const void* extra;       // [rows] or null
  double* shard;           // [rows, kShardNumbers] where these are some of the classes of every row, or null
  KdSide side[];           // the student, the teachers, the targets
};

// A stored teacher as it was handed in, and where the form goes that a call takes. Fields of 8 bytes, as above.
struct KdStored {
  int64_t rows, k, classes;
  int64_t sampled;           // weights, and no log-probabilities
  int64_t tail;              // 0 ghost, 1 zero, 2 renormalize
  int64_t ordered;           // whether ids rise and each is there once
  double temperature;
  const int64_t* ids;        // [rows, k]
  const void *x, *a, *lse;   // log-probabilities or weights [rows, k]; of a sample, log-probabilities, or null; [rows] or null
  int64_t x_type, a_type, lse_type;
  const uint8_t* counted;    // [rows] or null
  int64_t wide;              // whether what is written is double
  int64_t* out_ids;          // [rows, k]
  void *log_p, *rest, *extra;  // [rows, k]; [rows] or null, twice
  int64_t grain;
  void (*parallel_for)();
};

typedef void (*KdRange)(int64_t, int64_t, void*);
typedef int32_t (*KdParallelFor)(int64_t, int64_t, int64_t, KdRange, void*);

// Results of kd_run: kd_ok, or one of these.
// A value >= 0 is the first counted row whose label is out of range, or missing where the divergence is about it.
enum { kd_ok = -1, kd_no_memory = -2 };

struct KdTable {
  int64_t (*run)(const KdOptions*, const KdCall*);
  void (*scale)(const void* in, void* out, int64_t rows, int64_t classes, int64_t type, const void* upstream,
                int64_t upstream_type, int64_t upstream_stride, int64_t grain, void (*parallel_for)());
  void (*pointwise)(int64_t divergence, const double* params, int64_t n, const double* lq, const double* lp,
                    double* phi, double* g);
  void (*words)(int64_t seed, int64_t row, int64_t stream, int64_t groups, uint32_t* out);
  int64_t (*store)(const KdStored*);
};

// Advice that fresh memory be given in pages of 2 MiB: most of the time of a first write is page faults. Memory that has
// its pages already stays as it is, and so does everything where the system has no such pages.
static inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 16;  // the largest ordinary page of any machine: a partial one isn't ours
  uintptr_t begin = ((uintptr_t)memory + kPage - 1) & -kPage, end = ((uintptr_t)memory + bytes) & -kPage;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

#ifndef KD_DISPATCH
// ---------------------------------------------------------------------------------------------- one variant
#define KD_FN inline __attribute__((always_inline))
#define KD_INFINITY __builtin_huge_val()
#define KD_INLINE __attribute__((always_inline))  // of a lambda: one that stays a function is not vectorised
#define KD_PASTE_(a, b) a##b
#define KD_PASTE(a, b) KD_PASTE_(a, b)

#include "vecmath.h"

#include "../divergence.h"
#include "../philox.h"

namespace {

// Blocks are merged in double.
using kd_sum = double;
using kd_ref = double;
KD_FN double kd_apart(double a, double b) { return a - b; }
KD_FN double kd_raise(double x) { return kd_exp(x); }

}  // namespace

#include "../row.h"
#include "blocks.h"
#include "phases.h"

namespace {

// Of rows whose classes are shared out over processes: kShardSums finds the sums of these classes, and kShardTerms, from the
// sums of all, phi and the sum of g: of these classes for a Pair, of all for a Cross. The gradient takes all of them.
enum Mode { kLoss, kLossAndGradient, kScaledGradient, kShardSums, kShardTerms };

KD_FN bool writes_gradient(int64_t mode) { return mode == kLossAndGradient || mode == kScaledGradient; }

// What processes tell each other of a row: three sides, the cross sum, and raw logits of the label, 0 where another has
// it. A label that another process has is >= classes.
enum {
  kShardZRef, kShardZSum, kShardVRef, kShardVSum, kShardOneRef, kShardOneSum, kShardCross, kShardSumG, kShardZLabel,
  kShardVLabel, kShardPhi, kShardNumbers
};

KD_FN void put_sums(const RowState& row, double* to) {
  to[kShardZRef] = row.z.ref;
  to[kShardZSum] = row.z.sum;
  to[kShardVRef] = row.v.ref;
  to[kShardVSum] = row.v.sum;
  to[kShardOneRef] = row.one.ref;
  to[kShardOneSum] = row.one.sum;
  to[kShardCross] = row.cross;
}

KD_FN void take_sums(const double* from, RowState& row) {
  row.z = {from[kShardZRef], from[kShardZSum]};
  row.v = {from[kShardVRef], from[kShardVSum]};
  row.one = {from[kShardOneRef], from[kShardOneSum]};
  row.cross = from[kShardCross];
}

// ------------------------------------------------------------------------------------------ a call

enum { kRowLoss, kRowSoft, kRowHard, kRowEntropyZ, kRowEntropyV, kRowAgrees, kRowCorrect, kRowFigures };

// The sum of phi, and that of g, over n stored classes, whose g it fills.
using StoredTerms = double (*)(const double* params, int64_t n, const double* lq, const double* lp, double* g, double* sum_g);

template <class R>
struct Job {
  const KdOptions* o;
  const KdCall* c;
  double denominator;  // what `mean` divides by; 1 otherwise
  double* rows;        // [rows, kRowFigures or 1]
  int64_t figures;
  bool past_cache, failed;
  bool uses_labels;  // which then are classes, and not only what chooses rows
  int64_t bad_row;  // the first whose target is no probability, or `rows`
  StoredTerms stored_terms;  // of a stored teacher
};

KD_FN bool counts(const KdOptions& o, const KdCall& c, int64_t n) {
  if (c.mask) return c.mask[n] != 0;
  return c.labels ? c.labels[n] != o.ignore_index : true;
}

KD_FN bool is_labelled(const KdOptions& o, const KdCall& c, int64_t n) {
  return c.labels && c.labels[n] != o.ignore_index;
}

// A side of row n.
Reader reader_of(const KdCall& c, const KdSide& side, int64_t n, const RowNoise* noise) {
  int64_t offset = 0;
  for (int64_t d = c.dims - 1; d >= 0; --d) {
    offset += (d == 0 ? n : n % c.shape[d]) * side.stride[d];
    n /= c.shape[d];
  }
  const char* row = (const char*)side.data + offset * type_size(side.type);
  return {row, side.type, side.column, side.scale, side.cap, noise, -1};
}

template <class R>
RowNoise noise_of_row(const KdNoise& noise, int64_t seed, int64_t n, kd_u32 stream) {
  return noise_of_row<R>(noise.sigma, noise.probability, noise.kind == 2, noise.per_row != 0, (kd_u64)seed,
                         (kd_u64)(n + noise.row_offset), stream);
}

void keep_first(int64_t* least, int64_t n) {
  int64_t so_far = __atomic_load_n(least, __ATOMIC_RELAXED);
  while (n < so_far && !__atomic_compare_exchange_n(least, &so_far, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Memory of one thread: rows of the working precision, and references of blocks.
template <class R>
struct Scratch {
  void* memory = nullptr;
  Reader* teachers = nullptr;
  RowNoise* noises = nullptr;
  double* to_exponent = nullptr;
  Kept<R> kept{};

  bool allocate(int64_t classes, bool keeps, bool own, bool mixes, bool binary, bool multiplies, int64_t count) {
    int64_t blocks = (classes + kBlock - 1) / kBlock, row = blocks * kBlock;
    int64_t rows = (keeps ? own ? 4 : 3 : 0) + (mixes ? binary ? 2 : 1 : 0) + (multiplies ? 1 : 0);
    int64_t records = count * (int64_t)(sizeof(Reader) + sizeof(RowNoise) + sizeof(double));
    // Aligned by hand: glibc's aligned_alloc asks for more than it keeps, so that what was freed is too small for
    // the next call, and a heap that has something above it grows with every call.
    memory = malloc(sizeof(R) * row * rows + records + 63);
    if (!memory) return false;
    R* p = (R*)(((uintptr_t)memory + 63) / 64 * 64);
    if (keeps) {
      kept.z = p;
      kept.other = p + row;
      p += 2 * row;
      if (own) kept.one = p, p += row;
      kept.z_ref = (double*)p;
      kept.v_ref = kept.z_ref + blocks;
      kept.one_ref = kept.v_ref + blocks;
      p += row;
    }
    if (mixes) kept.mixed = p, p += row;
    if (mixes && binary) kept.mixed_no = p, p += row;
    if (multiplies) kept.factors = p, p += row;
    to_exponent = (double*)p;
    teachers = (Reader*)(to_exponent + count);
    noises = (RowNoise*)(teachers + count);
    return true;
  }
  ~Scratch() { free(memory); }
};

// What all rows share, at temperature T of the soft term.
template <class R>
Frame<R> frame_of(const KdOptions& o, const KdCall& c, double T) {
  Frame<R> f{};
  f.classes = c.classes;
  // A scale that stands alone is put on with the temperature, for nothing.
  const KdSide& student = c.side[0];
  double z_scale = student.cap != 0 ? 1 : student.scale, z_unread = o.z_noise.kind ? 1 : z_scale;
  f.cz = (R)(z_unread / T);
  f.one = (R)z_unread;
  f.soft = (R)(o.soft_weight * o.t_factor * z_scale / T);
  f.hard = (R)(o.hard_weight * z_scale);
  return f;
}

template <class R>
double* figures_of(const Job<R>& job, int64_t n) {
  return job.rows ? job.rows + n * job.figures : nullptr;
}

template <class R>
char* gradient_of(const Job<R>& job, int64_t n) {
  const KdCall& c = *job.c;
  return writes_gradient(c.mode) ? (char*)c.gradient + n * c.width * type_size(c.side[0].type) : nullptr;
}

// Whether a row doesn't count: then all of it is 0.
template <class R>
bool skips(const Job<R>& job, int64_t n) {
  const KdCall& c = *job.c;
  if (counts(*job.o, c, n)) return false;
  if (double* figures = figures_of(job, n)) memset(figures, 0, job.figures * sizeof(double));
  if (char* out = gradient_of(job, n)) memset(out, 0, c.width * type_size(c.side[0].type));
  return true;
}

KD_FN double weight_of(const KdCall& c, int64_t n) { return c.weights ? c.weights[n] : 1; }

template <class R>
Output output_of(const Job<R>& job, int64_t n) {
  const KdCall& c = *job.c;
  double upstream = c.mode == kScaledGradient ? (double)((const R*)c.upstream)[n * c.upstream_stride] : 1;
  return {gradient_of(job, n), c.side[0].type, upstream * weight_of(c, n) / job.denominator, job.past_cache};
}

// The loss of a row, and its terms where they are wanted.
template <class R>
void put_loss(const Job<R>& job, int64_t n, double soft, double hard) {
  const KdOptions& o = *job.o;
  double* figures = figures_of(job, n);
  if (!figures) return;
  // A term of weight 0 is absent, also where it is infinite.
  double loss = o.soft_weight == 0 ? 0 : o.soft_weight * o.t_factor * soft;
  if (o.hard_weight != 0) loss += o.hard_weight * hard;
  figures[kRowLoss] = weight_of(*job.c, n) * loss;
  if (!o.stats) return;
  figures[kRowSoft] = o.t_factor * soft;
  figures[kRowHard] = hard;
}

}  // namespace

#include "prepare.h"
#include "stored.h"

namespace {

template <class R, class D, int kHard>
void do_rows(int64_t first, int64_t last, void* context) {
  Job<R>& job = *(Job<R>*)context;
  const KdOptions& o = *job.o;
  const KdCall& c = *job.c;
  constexpr bool reads_teacher = kReadsTeacher<D>, plain = D::kNormaliser != kSoftmax, pair = !D::kCross && !plain;
  // The hard term of a divergence of logits has the only softmax there is.
  constexpr bool own = kHard == kOwnHard && !plain;
  const KdSide &student = c.side[0], *teachers = c.side + 1;
  const KdSide* targets = c.targets ? teachers + c.teachers : nullptr;

  D d;
  for (int i = 0; i < 4; ++i) ((R*)&d)[i] = (R)o.params[i];

  const double T = reads_teacher ? o.temperature : 1;
  Frame<R> f = frame_of<R>(o, c, T);

  bool writes = writes_gradient(c.mode), mixes = reads_teacher && c.mixture;
  bool keeps = plain ? kHard != kNoHard && !D::kBinary : writes || (pair && c.mode != kShardSums);
  Scratch<R> scratch;
  if (!scratch.allocate(c.classes, keeps, own, mixes, D::kBinary, writes && o.z_noise.kind == 2, c.teachers)) {
    __atomic_store_n(&job.failed, true, __ATOMIC_RELAXED);
    return;
  }
  const Kept<R>& kept = scratch.kept;
  for (int64_t m = 0; m < c.teachers; ++m) {
    bool put_on_by_reader = teachers[m].cap != 0 || o.v_noise.kind;
    scratch.to_exponent[m] = (put_on_by_reader ? 1 : teachers[m].scale) / T;
  }
  if constexpr (reads_teacher) f.cv = mixes ? R(1) : (R)scratch.to_exponent[0];

  int64_t z_size = type_size(student.type);
  for (int64_t n = first; n < last; ++n) {
    if (skips(job, n)) continue;
    double* figures = figures_of(job, n);
    char* out = gradient_of(job, n);
    RowNoise z_noise{};
    if (o.z_noise.kind) z_noise = noise_of_row<R>(o.z_noise, c.z_seed, n, kStudentStream);
    z_noise.factors = kept.factors;
    f.z = reader_of(c, student, n, o.z_noise.kind ? &z_noise : nullptr);
    if constexpr (reads_teacher) {
      for (int64_t m = 0; m < c.teachers; ++m) {
        RowNoise* noise = o.v_noise.kind ? scratch.noises + m : nullptr;
        if (noise) *noise = noise_of_row<R>(o.v_noise, c.v_seed, n, (kd_u32)(2 * m));
        scratch.teachers[m] = reader_of(c, teachers[m], n, noise);
      }
      f.v = scratch.teachers[0];
      if (mixes) {
        mix(scratch.teachers, scratch.to_exponent, c.mixture + n * c.mixture_stride, c.teachers, c.classes, D::kBinary, kept);
        f.v = plain_reader(kept.mixed, sizeof(R) == 8 ? kDouble : kFloat, 1);
      }
    }
    int64_t label = job.uses_labels && is_labelled(o, c, n) ? c.labels[n] : -1;
    const Output output = output_of(job, n);
    // The student's logit of the label, and both sides with it.
    double at_label = 0;
    const Frame<R> whole = f;
    if (label >= 0 && label < c.classes) {
      R one[1];
      at_label = (double)*read(f.z, label, 1, one);
    }

    RowState row{};
    double soft = 0, hard = 0;
    // What the logits of a row say beside its loss is read before the gradient is written, maybe over them.
    auto describe = [&](const RowState& of) KD_INLINE {
      if constexpr (D::kBinary) {
        Reader target{};
        if (targets) target = reader_of(c, *targets, n, nullptr);
        BinaryFigures b = binary_figures(whole, targets ? &target : nullptr);
        figures[kRowEntropyZ] = b.entropy_z;
        figures[kRowEntropyV] = b.entropy_v;
        figures[kRowAgrees] = b.agrees;
        figures[kRowCorrect] = targets ? b.correct : 0;
      } else {
        int64_t best_z, best_v;
        figures[kRowEntropyZ] = entropy<R>(whole.z, of.z, of.top_z, f.cz, c.classes, &best_z);
        figures[kRowEntropyV] = entropy<R>(whole.v, of.v, of.top_v, f.cv, c.classes, &best_v);
        figures[kRowAgrees] = best_z == best_v;
        figures[kRowCorrect] = label >= 0 && best_z == label;
      }
    };
    if constexpr (plain) {
      if (o.stats && figures) {
        RowState softmax{};
        if constexpr (!D::kBinary) normalise<R, ForwardKL<R>, false, false>(whole, softmax, kept);
        describe(softmax);
      }
      Reader target{};
      if (D::kBinary && targets) target = reader_of(c, *targets, n, nullptr);
      if (kHard != kNoHard && !D::kBinary) {
        Frame<R> at_one = f;
        at_one.cz = f.one;
        normalise<R, NoDivergence<R>, false, true>(at_one, row, kept);
        row.one = row.z;
      }
      double mean = D::kNormaliser == kCentered ? mean_difference(f) : 0;
      Plain sums = plain_row<R, D, kHard>(f, d, mean, &target, row.one, kept, label, writes ? &output : nullptr);
      soft = sums.soft;
      hard = sums.hard;
      if (sums.bad) keep_first(&job.bad_row, n);
    } else {
      Target about{};
      if constexpr (D::kTarget) f.z.excluded = f.v.excluded = label;
      double* shard = c.shard ? c.shard + n * kShardNumbers : nullptr;
      if (keeps)
        normalise<R, typename D::Reads, own, true>(f, row, kept);
      else if (c.mode != kShardTerms)
        normalise<R, typename D::Reads, own, false>(f, row, kept);
      double v_at_label = 0;
      if constexpr (D::kTarget) {
        R one[1];
        if (label < c.classes) v_at_label = (double)*read(whole.v, label, 1, one);
      }
      if (c.mode == kShardSums) {
        put_sums(row, shard);
        shard[kShardZLabel] = at_label;
        shard[kShardVLabel] = v_at_label;
        continue;
      }
      if (shard) {
        take_sums(shard, row);
        at_label = shard[kShardZLabel];
        v_at_label = shard[kShardVLabel];
      }
      Side all = row.z;
      if constexpr (D::kTarget) {
        about = target_of(row, at_label * (double)f.cz, v_at_label * (double)f.cv);
        include(all, about.y);
        if (own) include(row.one, at_label * (double)f.one);
      }
      if (!own) row.one = all;
      if constexpr (pair)
        soft = sum_pairs<R, D>(f, d, row, kept);
      else if constexpr (reads_teacher)
        soft = closed_form<R, D>(d, row);
      if constexpr (D::kTarget) soft += d.alpha == 0 ? 0 : d.alpha * about.phi;
      f.z.excluded = -1;
      if (c.mode == kShardTerms) {
        shard[kShardPhi] = soft;
        shard[kShardSumG] = row.sum_g;
        continue;
      }
      if (shard) row.sum_g = shard[kShardSumG];
      if (o.stats && figures) {
        RowState softmax = row;
        if constexpr (D::kTarget) {
          softmax.z = all;
          include(softmax.v, about.u);
        }
        describe(softmax);
      }
      typename D::Writes writer{};
      if constexpr (D::kTarget) writer = d;
      if (writes) write_gradient<R, typename D::Writes, kHard>(f, writer, row, all, about, kept, label, output);
    }
    if (writes && c.width > c.classes) memset(out + c.classes * z_size, 0, (c.width - c.classes) * z_size);
    if (!figures) continue;

    if (kHard != kNoHard && !D::kBinary && label >= 0)
      hard = kd_log(row.one.sum) - (at_label * (double)f.one - row.one.ref);
    put_loss(job, n, soft, hard);
  }
#if defined(__x86_64__)
  if (writes && job.past_cache) _mm_sfence();
#endif
}

// Sums x[0], x[step], ... by halves: the same tree for the same n, whatever ran in parallel before.
double tree_sum(const double* x, int64_t n, int64_t step) {
  if (n <= 8) {
    double s = 0;
    for (int64_t i = 0; i < n; ++i) s += x[i * step];
    return s;
  }
  int64_t half = n / 2;
  return tree_sum(x, half, step) + tree_sum(x + half * step, n - half, step);
}

// Rows that make up `grain` elements, so that small calls are not split.
KD_FN int64_t rows_per_task(int64_t grain, int64_t classes) {
  int64_t rows = grain / (classes > 0 ? classes : 1);
  return rows > 1 ? rows : 1;
}

void parallel(void (*parallel_for)(), int64_t n, int64_t grain, KdRange work, void* context) {
  if (n == 0) return;
  if (parallel_for && n > grain)
    ((KdParallelFor)parallel_for)(0, n, grain, work, context);
  else
    work(0, n, context);
}

// A stored teacher in the form that a call takes: see prepare_row.
int64_t store(const KdStored* stored) {
  Preparation work{stored, false};
  // A stored class takes about as long as so many of a dense row.
  constexpr int64_t kTimes = 64;
  parallel(stored->parallel_for, stored->rows, rows_per_task(stored->grain, kTimes * stored->k), prepare_rows, &work);
  return work.failed ? -1 : 0;
}

bool is_about_target(int64_t divergence) {
#define KD_TARGET(number, D, name) \
  if (divergence == number) return D<float>::kTarget;
  KD_DIVERGENCES(KD_TARGET)
#undef KD_TARGET
  return false;
}

template <class R, class D>
KdRange choose_hard(Hard hard) {
  // Without a softmax of the soft term there is none to share.
  constexpr bool plain = D::kNormaliser != kSoftmax;
  if (hard == kOwnHard || (plain && hard == kSharedHard)) return do_rows<R, D, kOwnHard>;
  // With a softmax, no hard term is one of weight 0: a build less.
  return do_rows<R, D, plain ? kNoHard : kSharedHard>;
}

template <class R>
KdRange choose_rows(const KdOptions& o, const KdCall& c) {
  int divergence = with_parameters((int)o.divergence, o.params);
  bool soft = o.soft_weight != 0 || o.stats;
  bool wants_hard = (c.labels || c.targets) && (o.hard_weight != 0 || o.stats);
  if (!soft && !c.targets) return do_rows<R, NoDivergence<R>, kSharedHard>;
  Hard hard = !wants_hard ? kNoHard : o.temperature == 1 ? kSharedHard : kOwnHard;
  if (c.ids)
    return hard == kNoHard       ? do_stored_rows<R, kNoHard>
           : hard == kSharedHard ? do_stored_rows<R, kSharedHard>
                                 : do_stored_rows<R, kOwnHard>;
#define KD_CHOOSE(number, D, name) \
  if (divergence == number) return choose_hard<R, D<R>>(hard);
  KD_DIVERGENCES(KD_CHOOSE)
#undef KD_CHOOSE
  return nullptr;
}

template <class R>
int64_t run(const KdOptions& o, const KdCall& c) {
  int64_t counted = 0, labelled = 0;
  bool soft = o.soft_weight != 0 || o.stats, needs_label = soft && is_about_target(o.divergence);
  bool uses_labels = c.labels && (o.hard_weight != 0 || o.stats || needs_label);
  for (int64_t n = 0; n < c.rows; ++n) {
    if (!counts(o, c, n)) continue;
    ++counted;
    if (needs_label && !is_labelled(o, c, n)) return n;
    if (!is_labelled(o, c, n)) continue;
    ++labelled;
    if (uses_labels && !c.shard && (c.labels[n] < 0 || c.labels[n] >= c.classes)) return n;
  }
  if (c.targets) labelled = counted;
  Job<R> job{&o, &c, 1, nullptr, o.stats ? kRowFigures : 1, false, false, uses_labels, c.rows, nullptr};
  if (c.ids) job.stored_terms = stored_terms_of(with_parameters((int)o.divergence, o.params));
  double items = counted == 0 ? 1 : c.num_items >= 0 ? c.num_items : (double)counted;
  if (o.reduction == 0) job.denominator = items;
  int64_t gradient_bytes = writes_gradient(c.mode) ? c.rows * c.width * type_size(c.side[0].type) : 0;
  job.past_cache = gradient_bytes >= o.stream_bytes;
  if (gradient_bytes >= o.huge_bytes) ask_for_huge_pages(c.gradient, gradient_bytes);
  if (c.mode == kLoss || c.mode == kLossAndGradient) {
    job.rows = (double*)malloc(sizeof(double) * (c.rows * job.figures + 1));
    if (!job.rows) return kd_no_memory;
  }
  parallel(c.parallel_for, c.rows, rows_per_task(o.grain, c.classes), choose_rows<R>(o, c), &job);
  if (job.rows && !job.failed) {
    if (o.reduction == 2)
      for (int64_t n = 0; n < c.rows; ++n) ((R*)c.loss)[n] = (R)job.rows[n * job.figures];
    else
      *(R*)c.loss = (R)(tree_sum(job.rows, c.rows, job.figures) / job.denominator);
    if (o.stats) {
      double over_rows = counted ? 1.0 / counted : 0, over_labelled = labelled ? 1.0 / labelled : 0;
      double over_terms = o.reduction == 1 ? 1 : 1 / items;
      double by[] = {0, over_terms, over_terms, over_rows, over_rows, over_rows, over_labelled};
      for (int k = 1; k < kRowFigures; ++k)
        c.stats[k - 1] = tree_sum(job.rows + k, c.rows, kRowFigures) * by[k];
      c.stats[kRowFigures - 1] = (double)counted;
    }
  }
  free(job.rows);
  return job.failed ? kd_no_memory : job.bad_row < c.rows ? job.bad_row : kd_ok;
}

int64_t run_any(const KdOptions* o, const KdCall* c) {
  for (int64_t i = 0; i <= c->teachers; ++i)
    if (c->side[i].type == kDouble) return run<double>(*o, *c);
  return run<float>(*o, *c);
}

// ------------------------------------------------------------------------------------------ backward's scaling

struct Scaling {
  const char* in;
  char* out;
  int64_t classes, type;
  const void* upstream;
  int64_t upstream_type, stride;
};

KD_FN double upstream_of(const Scaling& s, int64_t n) {
  int64_t i = n * s.stride;
  return s.upstream_type == kDouble ? ((const double*)s.upstream)[i] : (double)((const float*)s.upstream)[i];
}

template <class R>
void scale_rows(int64_t begin, int64_t end, void* context) {
  const Scaling& s = *(const Scaling*)context;
  alignas(64) R block[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    int64_t size = type_size(s.type);
    R factor = (R)upstream_of(s, n);
    Reader row = plain_reader(s.in + n * s.classes * size, s.type, 1);
    for (int64_t i = 0; i < s.classes; i += kBlock) {
      int64_t m = s.classes - i < kBlock ? s.classes - i : kBlock;
      const R* x = read(row, i, m, block);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) block[j] = x[j] == 0 ? R(0) : x[j] * factor;  // rows that don't count stay 0
      write(s.out + n * s.classes * size, s.type, i, m, block, false);
    }
  }
}

// out = in * upstream, row by row; in place it returns at once where every factor is 1.
void scale(const void* in, void* out, int64_t rows, int64_t classes, int64_t type, const void* upstream,
           int64_t upstream_type, int64_t stride, int64_t grain, void (*parallel_for)()) {
  Scaling s{(const char*)in, (char*)out, classes, type, upstream, upstream_type, stride};
  bool ones = in == out;
  for (int64_t n = 0; ones && n < (stride == 0 && rows > 1 ? 1 : rows); ++n)
    ones = upstream_of(s, n) == 1;
  if (ones) return;
  parallel(parallel_for, rows, rows_per_task(grain, classes), type == kDouble ? scale_rows<double> : scale_rows<float>, &s);
}

void pointwise(int64_t divergence, const double* params, int64_t n, const double* lq, const double* lp, double* phi,
               double* g) {
  divergence = with_parameters((int)divergence, params);
#define KD_POINTWISE(number, D, name)                             \
  if (divergence == number) {                                     \
    D<double> d;                                                  \
    memcpy((void*)&d, params, sizeof d);                          \
    for (int64_t i = 0; i < n; ++i) {                             \
      Terms<double> t = terms_of(d, lq[i], lp[i], kd_exp(lq[i]), kd_exp(lp[i]));                    \
      phi[i] = t.phi;                                             \
      g[i] = t.g;                                                 \
    }                                                             \
  }
  KD_DIVERGENCES(KD_POINTWISE)
#undef KD_POINTWISE
}

// The words of a row's first groups, [groups, 4].
void words(int64_t seed, int64_t row, int64_t stream, int64_t groups, uint32_t* out) {
  KdNoise noise{1, 0, 0, 1, 1};
  RowNoise r = noise_of_row<float>(noise, seed, row, (kd_u32)stream);
  alignas(64) uint32_t block[4][kGroups];
  for (int64_t i = 0; i < groups; ++i) {
    if (i % kGroups == 0) block_words(r, (kd_u32)i, kGroups, Later{}, block);
    for (int k = 0; k < 4; ++k) out[4 * i + k] = block[k][i % kGroups];
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const KdTable KD_PASTE(kd_table_, KD_ISA);
extern "C" const KdTable KD_PASTE(kd_table_, KD_ISA) = {run_any, scale, pointwise, words, store};

#else
// ---------------------------------------------------------------------------------------------- the entry points
#define KD_FN inline
#define KD_INFINITY __builtin_huge_val()
#define KD_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_baseline;
#ifdef KD_HAVE_AVX2
extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_avx2;
#endif
#ifdef KD_HAVE_AVX512
extern "C" __attribute__((visibility("hidden"))) const KdTable kd_table_avx512;
#endif

namespace {

double kd_exp(double x);
double kd_expm1(double x);
double kd_log1p(double x);
template <class R>
R kd_power(R x);
template <class R>
constexpr R kd_unit = 1;
template <class R>
R kd_exp_of_units(R x);
template <class R>
R kd_log1p_in_units(R x);
template <class R>
R kd_at_least(R x, R low);
template <class R>
R kd_min(R x, R y);
template <class R>
R kd_max(R x, R y);
#include "../divergence.h"

struct Variant {
  const char* name;
  const KdTable* table;
};

// The variants that this processor can run, best first.
int variants(Variant* out) {
  int n = 0;
#ifdef KD_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    out[n++] = {"avx512", &kd_table_avx512};
#endif
#ifdef KD_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out[n++] = {"avx2", &kd_table_avx2};
#endif
  out[n++] = {"baseline", &kd_table_baseline};
  return n;
}


// Tests run every variant that the processor has; everyone else runs the best.
const KdTable* table_of(int64_t variant) {
  Variant all[3];
  int n = variants(all);
  return all[variant < n ? variant : 0].table;
}

}  // namespace

KD_EXPORT int64_t kd_abi() { return KD_ABI; }

// The name of a variant this processor can run, best first; null past the last.
KD_EXPORT const char* kd_variant(int64_t i) {
  Variant all[3];
  return i < variants(all) ? all[i].name : nullptr;
}

// The number of a divergence in this library, or -1.
KD_EXPORT int64_t kd_divergence(const char* name) {
#define KD_NAME(number, D, text) \
  if (strcmp(name, text) == 0) return number;
  KD_DIVERGENCES(KD_NAME)
#undef KD_NAME
  return -1;
}

KD_EXPORT int64_t kd_run(int64_t variant, const KdOptions* options, const KdCall* call) {
  return table_of(variant)->run(options, call);
}

// For memory that nobody has touched yet.
KD_EXPORT void kd_huge_pages(void* memory, int64_t bytes) { ask_for_huge_pages(memory, bytes); }

KD_EXPORT void kd_scale(int64_t variant, const void* in, void* out, int64_t rows, int64_t classes, int64_t type,
                        const void* upstream, int64_t upstream_type, int64_t upstream_stride, int64_t grain,
                        void (*parallel_for)()) {
  table_of(variant)->scale(in, out, rows, classes, type, upstream, upstream_type, upstream_stride, grain, parallel_for);
}

KD_EXPORT void kd_pointwise(int64_t variant, int64_t divergence, const double* params, int64_t n, const double* lq,
                            const double* lp, double* phi, double* g) {
  table_of(variant)->pointwise(divergence, params, n, lq, lp, phi, g);
}

// 0, or -1 where an entry is none, which is told elsewhere.
KD_EXPORT int64_t kd_store(int64_t variant, const KdStored* stored) { return table_of(variant)->store(stored); }

KD_EXPORT void kd_words(int64_t variant, int64_t seed, int64_t row, int64_t stream, int64_t groups, uint32_t* out) {
  table_of(variant)->words(seed, row, stream, groups, out);
}
#endif
