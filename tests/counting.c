// What the CPU library touches, where it was built with g++'s -fsanitize=thread: every load and store outside the stack
// is then a call of one of the functions below, which stand in the place of that library and add up bytes by what the memory is.
//
// `loaded` and `stored` are what instructions ask for. `fetched` is what of the loads a first-level cache of 32 KiB doesn't
// hold: passes over memory. It is an ideal one, which forgets the line that was not touched for longest, so that no count
// depends on where memory lies. For one thread.

#include <stddef.h>
#include <stdint.h>

enum { kKinds = 8, kRanges = 64, kLine = 64, kLines = 512, kScratch = 0 };

struct Counts {
  uint64_t loaded, stored, fetched;
};

struct Range {
  uintptr_t begin, end;
  int kind;
};

static struct Counts counts[kKinds];
static struct Range ranges[kRanges];
static int used;
static uint64_t allocations, allocated;
static uintptr_t cache[kLines];  // the line of last use first
static int held;

#define KD_EXPORT __attribute__((visibility("default")))

KD_EXPORT void kd_count_from_here(void) {
  for (int k = 0; k < kKinds; ++k) counts[k] = (struct Counts){0, 0, 0};
  used = held = 0;
  allocations = allocated = 0;
}

// Memory that is still counted is the library's own.
KD_EXPORT void kd_count_other_tensors(void) {
  int kept = 0;
  for (int i = 0; i < used; ++i)
    if (ranges[i].kind == kScratch) ranges[kept++] = ranges[i];
  used = kept;
}

// 0 where there is no room.
KD_EXPORT int kd_count_range(const void* begin, uint64_t bytes, int kind) {
  if (used == kRanges || kind >= kKinds) return 0;
  ranges[used++] = (struct Range){(uintptr_t)begin, (uintptr_t)begin + bytes, kind};
  return 1;
}

KD_EXPORT void kd_counted(int kind, uint64_t* out) {
  out[0] = counts[kind].loaded;
  out[1] = counts[kind].stored;
  out[2] = counts[kind].fetched;
}

KD_EXPORT void kd_counted_allocations(uint64_t* out) {
  out[0] = allocations;
  out[1] = allocated;
}

// Whether a line was held; from now on it is.
static int touch(uintptr_t line) {
  int at = 0;
  while (at < held && cache[at] != line) ++at;
  const int hit = at < held;
  if (!hit && held < kLines) ++held;
  if (at == kLines) --at;
  for (; at > 0; --at) cache[at] = cache[at - 1];
  cache[0] = line;
  return hit;
}

static void count(const void* p, size_t bytes, int stores) {
  const uintptr_t begin = (uintptr_t)p, end = begin + bytes;
  for (uintptr_t line = begin / kLine; line * kLine < end; ++line) {
    if (touch(line) || stores) continue;
    for (int i = 0; i < used; ++i)
      if (line * kLine < ranges[i].end && (line + 1) * kLine > ranges[i].begin) counts[ranges[i].kind].fetched += kLine;
  }
  for (int i = 0; i < used; ++i) {
    const uintptr_t from = begin > ranges[i].begin ? begin : ranges[i].begin, to = end < ranges[i].end ? end : ranges[i].end;
    if (from >= to) continue;
    if (stores)
      counts[ranges[i].kind].stored += to - from;
    else
      counts[ranges[i].kind].loaded += to - from;
  }
}

#define KD_OF_SIZE(n)                                              \
  void __tsan_read##n(const void* p) { count(p, n, 0); }           \
  void __tsan_write##n(const void* p) { count(p, n, 1); }          \
  void __tsan_unaligned_read##n(const void* p) { count(p, n, 0); } \
  void __tsan_unaligned_write##n(const void* p) { count(p, n, 1); }
KD_OF_SIZE(1)
KD_OF_SIZE(2)
KD_OF_SIZE(4)
KD_OF_SIZE(8)
KD_OF_SIZE(16)
void __tsan_read_range(const void* p, size_t n) { count(p, n, 0); }
void __tsan_write_range(const void* p, size_t n) { count(p, n, 1); }
void __tsan_init(void) {}
void __tsan_func_entry(void* caller) { (void)caller; }
void __tsan_func_exit(void) {}
void __tsan_atomic8_store(volatile unsigned char* p, unsigned char x, int order) {
  (void)order;
  *p = x;
}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int order) {
  (void)order;
  return *p;
}
unsigned __tsan_atomic32_fetch_or(volatile unsigned* p, unsigned x, int order) {
  const unsigned was = *p;
  (void)order;
  *p = was | x;
  return was;
}
int64_t __tsan_atomic64_load(const volatile int64_t* p, int order) {
  (void)order;
  return *p;
}
int __tsan_atomic64_compare_exchange_strong(volatile int64_t* p, int64_t* was, int64_t x, int order, int other) {
  (void)order, (void)other;
  if (*p != *was) return *was = *p, 0;
  return *p = x, 1;
}

// What is no load or store to the compiler: the linker's --wrap sends these here.
void* __real_memcpy(void* to, const void* from, size_t n);
void* __real_memset(void* to, int value, size_t n);
void* __real_malloc(size_t n);
void __real_free(void* p);

void* __wrap_memcpy(void* to, const void* from, size_t n) {
  count(from, n, 0);
  count(to, n, 1);
  return __real_memcpy(to, from, n);
}

void* __wrap_memset(void* to, int value, size_t n) {
  count(to, n, 1);
  return __real_memset(to, value, n);
}

void* __wrap_malloc(size_t n) {
  void* p = __real_malloc(n);
  ++allocations;
  allocated += n;
  kd_count_range(p, n, kScratch);
  return p;
}

void __wrap_free(void* p) {
  for (int i = 0; i < used; ++i)
    if (ranges[i].kind == kScratch && ranges[i].begin == (uintptr_t)p) ranges[i] = ranges[--used];
  __real_free(p);
}
