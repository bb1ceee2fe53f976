// Runs kernels: each thread of a cluster is a fiber, and clusters run one after another, since nothing of one is another's.
//
// Who goes on is a matter of the seed: in turn (0), whoever chance picks (odd), or as far ahead as it gets, a warp before
// another (even). A message that `send` writes is under way for as long, and what has not arrived yet is NaN. Where
// everybody waits, or what a GPU would not do is asked of it, the launch ends with a reason.
//
// This file is compiled without ThreadSanitizer, which is told who runs, what orders what, and what is read and written.
// Barriers order memory. So does an exchange within a warp, though all that a GPU's does is end what was read before it.
// Having run before orders nothing, and so clusters may not share what one of them writes. AddressSanitizer has to know
// the stacks.
#include "grid.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// ---------------------------------------------------------------------------------------------- what sanitizers are told

#ifdef KD_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
void __tsan_read_range(void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
}
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace {

// What one thread did before `release` comes before what another does after `acquire` of the same tag.
void acquire([[maybe_unused]] char& tag) {
#ifdef KD_TSAN
  __tsan_acquire(&tag);
#endif
}
void release([[maybe_unused]] char& tag) {
#ifdef KD_TSAN
  __tsan_release(&tag);
#endif
}
void reads([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#ifdef KD_TSAN
  __tsan_read_range((void*)p, bytes);
#endif
}
void writes([[maybe_unused]] void* p, [[maybe_unused]] std::size_t bytes) {
#ifdef KD_TSAN
  __tsan_write_range(p, bytes);
#endif
}

// ---------------------------------------------------------------------------------------------- the grid

constexpr std::size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr int kWarp = 32, kMostBarriers = 64;
constexpr long long kMostBytes = (1 << 20) - 1;  // that an mbarrier counts
constexpr std::size_t kQuad = 16;

struct Copy {
  void* to;
  const void* from;
};

struct Block;
struct Warp;

struct Thread : KdThread {
  Block* home;
  Warp* warp;
  Thread* next_waiting;
  const char* waits = nullptr;  // for what, or null
  std::uint64_t priority;
  std::vector<Copy> copies;
  ucontext_t context;  // of the start, or where it is
  jmp_buf jump;        // where it is
  bool started = true;
  char* stack = nullptr;
  const void* stack_bottom = nullptr;
  std::size_t stack_bytes = 0;
  void *fake_stack = nullptr, *fiber = nullptr;
};

// Threads that wait until all of them are there. A phase has the tag that the one before it has not: who is late to wake
// up from that is not to be ordered after what others did since.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned phase = 0;
  Thread* waiting = nullptr;
  char tags[2] = {};
};

struct Warp : Meeting {
  unsigned values[2][kWarp];  // of this phase, and of the one before, which some may still read
  int mask;
};

struct Mbarrier {
  unsigned long long* place;
  unsigned arrivals, missing, phase;
  long long bytes;
  Thread* waiting;
  char tags[4];
};

struct Block {
  std::unique_ptr<char[]> memory;
  Meeting everybody;
  Mbarrier barriers[kMostBarriers];
  int barrier_count = 0, running = 0, under_way = 0;
};

struct Message {
  Block* block;
  char* to;
  unsigned value[4];
  Mbarrier* barrier;
};

// What goes on next: a thread, or a message's way.
struct Task {
  std::uint64_t key;
  Thread* thread;
  Message* message;
  bool operator<(const Task& other) const { return key > other.key; }
};

struct Queue : std::priority_queue<Task> {
  void reserve(std::size_t n) { c.reserve(n); }
};

struct Grid {
  KdKernel* kernel;
  const void* argument;
  std::size_t shared_bytes;
  std::uint64_t seed, random, tasks = 0;
  std::vector<Thread> threads;  // of the cluster that runs
  std::vector<Warp> warps;
  std::vector<Block> blocks;  // of the whole grid: ThreadSanitizer is to see that clusters share nothing
  Block* first;               // of the cluster that runs
  unsigned cluster_blocks;
  Meeting cluster;
  Queue queue;
  int running = 0;
  char ended = 0;
  std::string failure;

  std::uint64_t chance() {
    std::uint64_t x = random += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  }
  std::uint64_t key(const Thread* thread) {
    if (seed == 0) return ++tasks;
    return thread && seed % 2 == 0 ? thread->priority : chance();
  }
};

Grid* grid;
Thread host;  // who launched
KdKernel* kernels;

Thread* self() { return (Thread*)kd_self; }

// ---------------------------------------------------------------------------------------------- who runs

Thread* switched_from;

// What a fiber does first, wherever it goes on.
void arrived() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self()->fake_stack, &switched_from->stack_bottom, &switched_from->stack_bytes);
#endif
}

void switch_to(Thread* to) {
  Thread* from = switched_from = self();
  kd_self = to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack_bottom, to->stack_bytes);
#endif
#ifdef KD_TSAN
  __tsan_switch_to_fiber(to->fiber, 1);  // 1: that they take turns orders nothing
#endif
#ifdef KD_PROGRAM
  swapcontext(&from->context, &to->context);
#else
  // The same without asking Linux for the signals of each, which takes longer than all else.
  if (_setjmp(from->jump) == 0) {
    if (to->started) _longjmp(to->jump, 1);
    to->started = true;
    setcontext(&to->context);
  }
#endif
  arrived();
}

// The launch ends, and nobody comes back to this thread.
[[noreturn]] void give_up(std::string why) {
  grid->failure = std::move(why);
  release(grid->ended);
  switch_to(&host);
  std::abort();
}

[[gnu::format(printf, 1, 2), noreturn]] void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[128] = "";
  if (self() != &host)
    std::snprintf(where, sizeof where, " (thread %d of block %lld)", kd_self->thread, kd_self->block);
  give_up(std::string(text) + where);
}

void wake(Thread* thread) {
  thread->waits = nullptr;
  grid->queue.push({grid->key(thread), thread, nullptr});
}

void wake_all(Thread*& waiting) {
  for (Thread *thread = waiting, *next; thread; thread = next) {
    next = thread->next_waiting;
    wake(thread);
  }
  waiting = nullptr;
}

void deliver(const Message& message);

[[noreturn]] void deadlock() {
  std::map<std::string, std::pair<int, Thread*>> waiting;
  for (Thread& thread : grid->threads) {
    auto& entry = waiting[thread.waits ? thread.waits : "ended"];
    entry.first++;
    if (!entry.second) entry.second = &thread;
  }
  std::string text = "deadlock:";
  for (auto& [what, entry] : waiting)
    text += " " + std::to_string(entry.first) + " threads " + what + ", as thread " +
            std::to_string(entry.second->thread) + " of block " + std::to_string(entry.second->block) + ";";
  text.pop_back();
  give_up(text);
}

// Somebody else's turn, until this thread is woken up.
void go_on() {
  for (;;) {
    if (grid->queue.empty()) {
      if (grid->running) deadlock();
      switch_to(&host);
    }
    Task task = grid->queue.top();
    grid->queue.pop();
    if (task.message) {
      deliver(*task.message);
      delete task.message;
      continue;
    }
    if (task.thread != self()) switch_to(task.thread);
    return;
  }
}

void wait_in(Thread*& waiting, const char* what) {
  self()->waits = what;
  self()->next_waiting = waiting;
  waiting = self();
  go_on();
}

void thread_main() {
  arrived();
  grid->kernel->call(grid->argument);
  Block* home = self()->home;
  grid->running--;
  if (--home->running == 0 && home->under_way)
    fail("the block ended with %d messages to it under way", home->under_way);
  release(grid->ended);
  go_on();
  std::abort();  // nobody wakes it up
}

void meet(Meeting& meeting, const char* what) {
  char& tag = meeting.tags[meeting.phase % 2];
  release(tag);
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.phase++;
    wake_all(meeting.waiting);
    wake(self());
    go_on();
  } else {
    wait_in(meeting.waiting, what);
  }
  acquire(tag);
}

// ---------------------------------------------------------------------------------------------- mbarriers and messages

// In memory an mbarrier is this and its number, so that what was not made or was written over is found.
constexpr unsigned long long kMade = 0x6B6462617272ull << 16;

std::size_t offset_of(const void* p, std::size_t bytes, const char* what) {
  std::uintptr_t at = (std::uintptr_t)p, start = (std::uintptr_t)kd_self->shared;
  if (at < start || at + bytes > start + grid->shared_bytes) fail("%s: not in shared memory", what);
  if (at % bytes) fail("%s: not aligned to %zu bytes", what, bytes);
  return at - start;
}

Mbarrier& mbarrier_of(Block& block, unsigned long long* place, const char* what) {
  reads(place, sizeof *place);
  unsigned long long number = *place ^ kMade;
  if (number >= (unsigned long long)block.barrier_count || block.barriers[number].place != place)
    fail("%s: no barrier_init was seen, or it was written over", what);
  return block.barriers[number];
}

void check_phase(Mbarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.phase++;
  barrier.missing = barrier.arrivals;
  wake_all(barrier.waiting);
}

void deliver(const Message& message) {
  std::memcpy(message.to, message.value, kQuad);
  release(message.barrier->tags[message.barrier->phase % 4]);
  message.block->under_way--;
  message.barrier->bytes -= kQuad;
  if (message.barrier->bytes < -kMostBytes) fail("send: more bytes than an mbarrier counts");
  check_phase(*message.barrier);
}

}  // namespace

KdThread* kd_self = &host;

void kd_block_barrier() { meet(self()->home->everybody, "in block_barrier"); }
void kd_cluster_barrier() { meet(grid->cluster, "in cluster_barrier"); }

unsigned kd_exchange(unsigned x, int mask) {
  Warp& warp = *self()->warp;
  int lane = kd_self->thread % kWarp;
  unsigned turn = warp.phase % 2;
  if (mask < 0 || mask >= kWarp) fail("from_other: mask %d is outside the warp", mask);
  if (!warp.arrived) warp.mask = mask;
  if (warp.mask != mask) fail("from_other: masks %d and %d at once", warp.mask, mask);
  warp.values[turn][lane] = x;
  meet(warp, "in from_other");
  return warp.values[turn][lane ^ mask];
}

void kd_barrier_init(unsigned long long* place, unsigned arrivals) {
  offset_of(place, sizeof *place, "barrier_init");
  if (!arrivals) fail("barrier_init: 0 arrivals");
  Block& block = *self()->home;
  if (block.barrier_count == kMostBarriers) fail("barrier_init: more than %d in a block", kMostBarriers);
  writes(place, sizeof *place);
  *place = kMade ^ block.barrier_count;
  block.barriers[block.barrier_count++] = {place, arrivals, arrivals, 0, 0, nullptr, {}};
}

void kd_barrier_expect(unsigned long long* place, unsigned bytes) {
  Mbarrier& barrier = mbarrier_of(*self()->home, place, "barrier_expect");
  if (!barrier.missing) fail("barrier_expect: more arrivals than the phase has");
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) fail("barrier_expect: more bytes than an mbarrier counts");
  release(barrier.tags[barrier.phase % 4]);
  barrier.missing--;
  check_phase(barrier);
}

void kd_barrier_wait(unsigned long long* place, unsigned parity) {
  Mbarrier& barrier = mbarrier_of(*self()->home, place, "barrier_wait");
  if (parity > 1) fail("barrier_wait: parity %u", parity);
  // Who is late and finds that the next phase is over, too, waits for one more: so does a GPU.
  while (barrier.phase % 2 == parity)
    wait_in(barrier.waiting, parity ? "in barrier_wait of parity 1" : "in barrier_wait of parity 0");
  acquire(barrier.tags[(barrier.phase + 3) % 4]);
}

void kd_send(void* to, const unsigned* value, unsigned long long* place, unsigned block) {
  std::size_t at = offset_of(to, kQuad, "send"), barrier_at = offset_of(place, sizeof *place, "send's barrier");
  if (block >= grid->cluster_blocks) fail("send: block %u of a cluster of %u", block, grid->cluster_blocks);
  Block& other = grid->first[block];
  if (!other.running) fail("send: block %u of the cluster has ended", block);
  char* memory = other.memory.get();
  Mbarrier& barrier = mbarrier_of(other, (unsigned long long*)(memory + barrier_at), "send");
  Message message{&other, memory + at, {value[0], value[1], value[2], value[3]}, &barrier};
  writes(message.to, kQuad);
  std::memset(message.to, 0xFF, kQuad);
  other.under_way++;
  if (kThreadSanitizer) return deliver(message);  // it knows by itself who may have come too early
  grid->queue.push({grid->key(nullptr), nullptr, new Message(message)});
}

void kd_aligned(const void* p, const char* what) {
  if ((std::uintptr_t)p % kQuad) fail("%s: %p is not aligned to 16 bytes", what, p);
}

void kd_copy_later(void* to, const void* from) {
  kd_aligned(from, "copy_later");
  offset_of(to, kQuad, "copy_later");
  reads(from, kQuad);
  writes(to, kQuad);
  std::memset(to, 0xFF, kQuad);
  self()->copies.push_back({to, from});
}

void kd_copies_done() {
  for (const Copy& copy : self()->copies) {
    reads(copy.from, kQuad);
    writes(copy.to, kQuad);
    std::memcpy(copy.to, copy.from, kQuad);
  }
  self()->copies.clear();
}

// ---------------------------------------------------------------------------------------------- launches

KdKernel::KdKernel(const char* name, void (*call)(const void*), std::size_t bytes)
    : name(name), call(call), bytes(bytes), next(kernels) {
  kernels = this;
}

namespace {

// Of a launch, kept for its next cluster. ThreadSanitizer would take two threads that have had a stack in turn for a race
// on it.
std::vector<char*> stacks;

char* stack(std::size_t number) {
  if (number < stacks.size() && !kThreadSanitizer) return stacks[number];
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) std::abort();
  stacks.push_back((char*)memory);
  return stacks.back();
}

// A process may have 65,530 mappings, two of which are a stack; a test has many builds loaded, each with stacks of its own.
void free_stacks() {
  if (kThreadSanitizer) return;
  for (char* memory : stacks) munmap(memory, kStackBytes);
  stacks.clear();
}

void prepare(Thread& thread, std::size_t number) {
  thread.stack = stack(number);
  thread.started = false;
  thread.stack_bottom = thread.stack + kPage;
  thread.stack_bytes = kStackBytes - kPage;
  thread.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  // Who had the stack before left in the middle of a function.
  ASAN_UNPOISON_MEMORY_REGION(thread.stack_bottom, thread.stack_bytes);
#endif
  getcontext(&thread.context);
  thread.context.uc_stack = {thread.stack + kPage, 0, kStackBytes - kPage};
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
  // AddressSanitizer would forget at every switch what lies between the variables of a stack that it is shown.
  thread.context.uc_stack.ss_size = 0;
#ifdef KD_TSAN
  thread.fiber = __tsan_create_fiber(0);
#endif
}

void run_cluster(long long number, int threads) {
  int cluster = grid->cluster_blocks;
  grid->first = &grid->blocks[number * cluster];
  grid->cluster.size = grid->running = cluster * threads;
  for (int b = 0; b < cluster; ++b) {
    Block& block = grid->first[b];
    block.memory.reset(new char[grid->shared_bytes]);
    std::memset(block.memory.get(), 0xFF, grid->shared_bytes);
    block.everybody.size = block.running = threads;
    for (int t = 0; t < threads; ++t) {
      std::size_t i = (std::size_t)b * threads + t;
      Thread& thread = grid->threads[i];
      (KdThread&)thread = {t, threads, number * cluster + b, (long long)grid->blocks.size(), block.memory.get()};
      thread.home = &block;
      thread.warp = &grid->warps[i / kWarp];
      thread.copies.clear();
      if (t % kWarp == 0) {
        *thread.warp = {};
        thread.warp->size = kWarp;
        thread.priority = grid->chance();
      } else {
        thread.priority = (&thread)[-1].priority + 1;
      }
      prepare(thread, i);
      wake(&thread);
    }
  }
  go_on();
  for ([[maybe_unused]] Thread& thread : grid->threads) {
#ifdef KD_TSAN
    __tsan_destroy_fiber(thread.fiber);
#endif
  }
}

const char* why_not(
    const KdKernel* kernel, std::size_t bytes, long long blocks, int threads, std::size_t shared, int cluster) {
  if (!kernel) return "no kernel has this name";
  if (kernel->bytes != bytes) return "the kernel's argument has another size";
  if (threads < kWarp || threads > 1024 || threads % kWarp) return "a block has full warps, and at most 1,024 threads";
  if (cluster < 1 || cluster > 16 || blocks < 1 || blocks % cluster)
    return "the grid has full clusters, of at most 16 blocks";
  if (shared > 227 << 10) return "a block has at most 227 KiB of shared memory";
  return nullptr;
}

}  // namespace

// Null, or why the launch ended early, until the next one.
extern "C" [[gnu::visibility("default")]] const char* kd_launch(
    const char* name, const void* argument, std::size_t bytes, long long blocks, int threads, std::size_t shared_bytes,
    int cluster, unsigned long long seed) {
  static std::mutex one_by_one;
  static std::string failure;
  std::lock_guard<std::mutex> lock(one_by_one);
  KdKernel* kernel = kernels;
  while (kernel && std::strcmp(kernel->name, name)) kernel = kernel->next;
  if (const char* reason = why_not(kernel, bytes, blocks, threads, shared_bytes, cluster)) return reason;

  std::unique_ptr<char[]> copy(new char[bytes]);
  std::memcpy(copy.get(), argument, bytes);
  auto owned = std::make_unique<Grid>();
  grid = owned.get();
  grid->kernel = kernel;
  grid->argument = copy.get();
  grid->shared_bytes = shared_bytes;
  grid->seed = grid->random = seed;
  grid->cluster_blocks = cluster;
  grid->blocks = std::vector<Block>(blocks);
  grid->threads = std::vector<Thread>((std::size_t)cluster * threads);
  grid->warps.resize(grid->threads.size() / kWarp);
  grid->queue.reserve(grid->threads.size());
  kd_self = &host;
#ifdef KD_TSAN
  host.fiber = __tsan_get_current_fiber();
#endif
  for (long long number = 0; number < blocks / cluster && grid->failure.empty(); ++number) run_cluster(number, threads);
  acquire(grid->ended);
  free_stacks();
  if (grid->failure.empty()) return nullptr;
  failure = grid->failure;
  owned.release();  // whose threads are in the middle of something
  copy.release();
  return failure.c_str();
}

// ---------------------------------------------------------------------------------------------- a program

#ifdef KD_PROGRAM

#include <fstream>

// Reads a launch and its memory, and writes the memory as the kernel leaves it: a sanitizer is part of a program from its
// start, which Python isn't. tests/cuda_shim.py says what is in the file.
int main(int count, char** words) {
  if (count != 3) return 2;
  std::ifstream in(words[1], std::ios::binary);
  std::string kernel;
  long long blocks, threads, shared, cluster, seed, argument_bytes, pointers, pieces;
  in >> kernel >> blocks >> threads >> shared >> cluster >> seed >> argument_bytes >> pointers >> pieces;
  struct Pointer {
    long long at, piece, offset;
  };
  struct Piece {
    long long bytes, skew;
    char* data;
  };
  std::vector<Pointer> points(pointers);
  std::vector<Piece> memory(pieces);
  for (auto& [at, piece, offset] : points) in >> at >> piece >> offset;
  for (auto& [bytes, skew, data] : memory) in >> bytes >> skew;
  in.get();
  std::vector<char> argument(argument_bytes);
  in.read(argument.data(), argument_bytes);
  for (auto& [bytes, skew, data] : memory) {
    // Ends where the memory does: a byte more is somebody else's.
    data = (char*)std::malloc(skew + bytes) + skew;
    in.read(data, bytes);
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(data - skew, skew);
#endif
  }
  for (auto& [at, piece, offset] : points) {
    char* p = memory[piece].data + offset;
    std::memcpy(&argument[at], &p, sizeof p);
  }
  if (!in) return 2;
  const char* failure =
      kd_launch(kernel.c_str(), argument.data(), argument_bytes, blocks, threads, shared, cluster, seed);
  if (failure) {
    std::fprintf(stderr, "launch: %s\n", failure);
    std::fflush(stderr);
    std::_Exit(3);
  }
  std::ofstream out(words[2], std::ios::binary);
  for (auto& [bytes, skew, data] : memory) out.write(data, bytes);
  return out.flush() ? 0 : 2;
}

#endif
