// A stored teacher as a call takes it: log-probabilities at the call's temperature, ids that rise and stand there once, and
// the tail. The same arithmetic stands in kdkernels/stored.py, for other devices; a test pins the two to each other.
#pragma once

namespace {

struct Preparation {
  const KdStored* stored;
  bool failed;
};

inline double number_at(const void* x, int64_t type, int64_t i) {
  switch (type) {
    case kFloat:
      return ((const float*)x)[i];
    case kDouble:
      return ((const double*)x)[i];
    case kBFloat16:
      return from_bfloat16(((const uint16_t*)x)[i]);
    default:
      return from_half(((const uint16_t*)x)[i]);
  }
}

inline void put_number(void* to, int64_t wide, int64_t i, double x) {
  if (wide)
    ((double*)to)[i] = x;
  else
    ((float*)to)[i] = (float)x;
}

// Sorts k numbers, of which `other` has room for as many; returns where they are then. Without branches on what they are,
// since half of those would be guessed wrong.
inline int64_t* sort(int64_t* x, int64_t* other, int64_t k) {
  for (int64_t width = 1; width < k; width *= 2) {
    for (int64_t begin = 0; begin < k; begin += 2 * width) {
      int64_t middle = begin + width < k ? begin + width : k, end = begin + 2 * width < k ? begin + 2 * width : k;
      int64_t i = begin, j = middle, to = begin;
      while (i < middle && j < end) {
        const int64_t left = x[i], right = x[j], second = right < left;
        other[to++] = second ? right : left;
        i += 1 - second;
        j += second;
      }
      while (i < middle) other[to++] = x[i++];
      while (j < end) other[to++] = x[j++];
    }
    int64_t* swap = x;
    x = other;
    other = swap;
  }
  return x;
}

// log x of any x >= 0; what is not finite stays as it is.
inline double log_of(double x) {
  if (x < Real<double>::kSmallest) return -Real<double>::kInf;
  return x - x == 0 ? log_(x) : x;
}

// How far beyond 1 the stored mass may be by rounding, in nats.
constexpr double kRounding = 0.1;

inline double log_of_mass(const double* x, int64_t k) {
  double top = -Real<double>::kInf, sum = 0;
  for (int64_t i = 0; i < k; ++i)
    if (!(x[i] <= top)) top = x[i];
  if (top == -Real<double>::kInf) return top;
  for (int64_t i = 0; i < k; ++i) sum += kd_exp(x[i] - top);
  return top + log_of(sum);
}

// False where an entry is none. `keys`, `other` and `values` have room for k numbers each.
inline bool prepare_row(const KdStored& s, int64_t n, int64_t* keys, int64_t* other, double* values) {
  const int64_t k = s.k, at = n * k;
  const int64_t* ids = s.ids + at;
  int64_t* out = s.out_ids + at;
  const bool counted = !s.counted || s.counted[n];
  if (!counted) {
    for (int64_t i = 0; i < k; ++i) {
      out[i] = -1;
      put_number(s.log_p, s.wide, at + i, -Real<double>::kInf);
    }
    if (s.rest) put_number(s.rest, s.wide, n, !s.sampled && s.tail == 0 ? 0 : -Real<double>::kInf);
    if (s.extra) put_number(s.extra, s.wide, n, 0);
    return true;
  }
  // By id, and by place where those are the same.
  constexpr int kPlace = 32;
  for (int64_t i = 0; i < k; ++i) {
    if (ids[i] < -1 || ids[i] >= s.classes) return false;
    keys[i] = (int64_t)((uint64_t)(ids[i] + 1) << kPlace) | i;
  }
  if (!s.ordered) keys = sort(keys, other, k);
  const double lse = s.lse ? number_at(s.lse, s.lse_type, n) : 0;
  double extra = 0;
  int64_t there = 0, first = 0, last = -2;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t place = keys[i] & 0xffffffff, id = (keys[i] >> kPlace) - 1;
    const bool again = id == last;
    out[i] = again ? -1 : id;
    last = id;
    values[i] = s.sampled ? 0 : -Real<double>::kInf;
    if (!again) first = i;
    if (id < 0 || (again && !s.sampled)) continue;
    const double x = number_at(s.x, s.x_type, at + place);
    if (s.sampled) {
      if (x < 0) return false;
      values[first] += x;
    } else {
      values[i] = x / s.temperature - lse;
    }
    there += !again;
  }
  if (s.sampled) {
    for (int64_t i = 0; i < k; ++i) {
      const double w = values[i];
      values[i] = log_of(w);
      if (s.extra && w > 0) extra += w * (number_at(s.a, s.a_type, at + (keys[i] & 0xffffffff)) - values[i]);
    }
  }
  double rest = -Real<double>::kInf;
  if (!s.sampled && s.tail != 1) {
    const double mass = log_of_mass(values, k);
    bool whole = mass != -Real<double>::kInf;  // a NaN makes the whole row one
    if (s.tail == 0) {
      if (mass > kRounding) return false;
      whole = mass >= 0 || there == s.classes;
      if (!whole) rest = mass == -Real<double>::kInf ? 0 : log_of(-kd_expm1(mass));
    }
    if (whole)
      for (int64_t i = 0; i < k; ++i) values[i] -= mass;
  }
  for (int64_t i = 0; i < k; ++i) put_number(s.log_p, s.wide, at + i, values[i]);
  if (s.rest) put_number(s.rest, s.wide, n, rest);
  if (s.extra) put_number(s.extra, s.wide, n, extra);
  return true;
}

inline void prepare_rows(int64_t begin, int64_t end, void* context) {
  Preparation& work = *(Preparation*)context;
  const KdStored& s = *work.stored;
  int64_t* keys = (int64_t*)malloc(3 * sizeof(int64_t) * s.k);
  bool good = keys != nullptr;
  for (int64_t n = begin; good && n < end; ++n) good = prepare_row(s, n, keys, keys + s.k, (double*)(keys + 2 * s.k));
  free(keys);
  if (!good) __atomic_store_n(&work.failed, true, __ATOMIC_RELAXED);
}

}  // namespace
