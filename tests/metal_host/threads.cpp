// Runs a grid: a fiber a GPU thread, 32 to a simdgroup, one threadgroup after another. The lanes of
// a simdgroup meet at every simd operation, the threads of a threadgroup at every barrier; who does
// not come is reported.
#include <csetjmp>
#include <cstring>
#include <algorithm>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include "runtime.h"

namespace {
enum State { ready, meeting, at_barrier, done };

struct Thread {
  Position at;
  State state;
  jmp_buf context;
  ucontext_t birth;
  bool born;
  // What it waits for, and gives to the others there.
  uint32_t line, argument;
  Meeting op;
  Number number;
  uint64_t bits;
};

Thread threads[max_threads];
Simdgroup simdgroups[max_threads / lanes];
Thread* current;
jmp_buf scheduler;
Job job;
std::mt19937 dice;

// ---- fibers: born by makecontext, switched by setjmp and longjmp, which make no system calls ----
constexpr size_t stack_bytes = 128 << 10, page = 4096;

char* stack_of(int thread) {
  static char* all = [] {
    void* at = mmap(nullptr, max_threads * stack_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail("no memory for %d stacks", max_threads);
    for (int i = 0; i < max_threads; i++) mprotect((char*)at + i * stack_bytes, page, PROT_NONE);
    return (char*)at;
  }();
  return all + thread * stack_bytes + page;
}

void pause_as(State state) {
  Thread& me = *current;
  me.state = state;
  if (!_setjmp(me.context)) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    job.entry(job.buffers, &current->at);
    pause_as(done);
  }
}

void resume(Thread& t) {
  current = &t;
  if (!_setjmp(scheduler)) {
    if (t.born) _longjmp(t.context, 1);
    t.born = true;
    getcontext(&t.birth);
    t.birth.uc_stack.ss_sp = stack_of(&t - threads);
    t.birth.uc_stack.ss_size = stack_bytes - page;
    makecontext(&t.birth, live, 0);
    setcontext(&t.birth);
  }
  current = nullptr;
}

// ---- what lanes give each other --------------------------------------------------------------
template <typename T> T combine(Meeting op, T a, T b) {
  if constexpr (std::is_same_v<T, uint32_t>) {
    if (op == simd_and_) return a & b;
    if (op == simd_or_) return a | b;
    if (op == simd_xor_) return a ^ b;
  }
  if (op == simd_product_) return a * b;
  if (op == simd_min_) return b < a ? b : a;
  if (op == simd_max_) return a < b ? b : a;
  return a + b;
}

template <typename T> void give(Thread* t, T value) {
  t->bits = 0;
  memcpy(&t->bits, &value, sizeof(T));
}

template <typename T> void reduce(Meeting op, Thread** present, int count) {
  T value[lanes], sum = 0;
  for (int i = 0; i < count; i++) memcpy(&value[i], &present[i]->bits, sizeof(T));
  if (op == simd_prefix_inclusive_ || op == simd_prefix_exclusive_) {
    for (int i = 0; i < count; i++) {
      T before = sum;
      sum += value[i];
      give(present[i], op == simd_prefix_inclusive_ ? sum : before);
    }
    return;
  }
  for (int width = 1; width < count; width *= 2)  // neighbours first, as a butterfly does
    for (int i = 0; i + width < count; i += 2 * width)
      value[i] = combine(op, value[i], value[i + width]);
  for (int i = 0; i < count; i++) give(present[i], value[0]);
}

int source_lane(const Thread& t, int lane) {
  int argument = t.argument;
  if (t.op == simd_shuffle_xor_) return lane ^ argument;
  if (t.op == simd_shuffle_up_) return lane < argument ? lane : lane - argument;
  if (t.op == simd_shuffle_down_) return lane + argument < lanes ? lane + argument : lane;
  return argument;
}

void exchange(Thread** present, int count, Thread* first_lane) {
  Thread* giver[lanes] = {};
  uint64_t given[lanes];
  for (int i = 0; i < count; i++) {
    int lane = present[i] - first_lane;
    giver[lane] = present[i];
    given[lane] = present[i]->bits;
  }
  for (int i = 0; i < count; i++) {
    Thread& t = *present[i];
    int from = source_lane(t, &t - first_lane);
    current = &t;
    if (t.op == simd_broadcast_ && t.argument != present[0]->argument)
      fail("simd_broadcast at line %u: the lanes name different lanes", t.line);
    if (from >= lanes || !giver[from])
      fail("simd operation at line %u reads lane %d, which is not active", t.line, from);
    t.bits = given[from];
  }
  current = nullptr;
}

// ---- scheduling ------------------------------------------------------------------------------
void hold_meeting(Simdgroup& g, Thread** present, int count) {
  const Thread& t = *present[0];
  g.steps++;
  if (t.op == simdgroup_barrier_) {
    g.fences[threadgroup_space] += (t.argument & fence_threadgroup) != 0;
    g.fences[device_space] += (t.argument & fence_device) != 0;
  } else if (t.number == float_) {
    reduce<float>(t.op, present, count);
  } else if (t.number == int_) {
    reduce<int32_t>(t.op, present, count);
  } else if (t.number == uint_) {
    reduce<uint32_t>(t.op, present, count);
  } else {
    exchange(present, count, threads + g.first);
  }
  for (int i = 0; i < count; i++) present[i]->state = ready;
}

// Brings each lane to its next meeting and holds the meeting. False: no lane waits for one.
bool advance(Simdgroup& g) {
  Thread *lane = threads + g.first, *turn[lanes], *present[lanes];
  for (int i = 0; i < g.count; i++) turn[i] = lane + (job.order == backwards ? g.count - 1 - i : i);
  if (job.order == shuffled) std::shuffle(turn, turn + g.count, dice);
  for (int i = 0; i < g.count; i++)
    if (turn[i]->state == ready) resume(*turn[i]);

  int count = 0;
  for (int i = 0; i < g.count; i++)
    if (lane[i].state == meeting) present[count++] = &lane[i];
  if (!count) return false;
  const Thread& first = *present[0];
  for (int i = 0; i < g.count; i++) {
    const Thread& t = lane[i];
    bool elsewhere = t.state == meeting && (t.line != first.line || t.op != first.op);
    if (elsewhere || t.state == at_barrier)
      fail("divergent simd operation: lane %d waits at line %u, lane %d at line %u",
           int(&first - lane), first.line, i, t.line);
  }
  hold_meeting(g, present, count);
  return true;
}

// Lets all simdgroups come to a barrier or to their end.
void advance_all(int groups) {
  int turn[max_threads / lanes];
  for (int g = 0; g < groups; g++) turn[g] = job.order == backwards ? groups - 1 - g : g;
  for (bool more = true; more;) {
    more = false;
    if (job.order == shuffled) std::shuffle(turn, turn + groups, dice);
    for (int i = 0; i < groups; i++)
      if (job.order == shuffled) more |= advance(simdgroups[turn[i]]);  // by turns
      else while (advance(simdgroups[turn[i]])) {}                      // as far as it goes
  }
}

void run_threadgroup(int count) {
  int groups = (count + lanes - 1) / lanes;
  begin_threadgroup();
  for (int g = 0; g < groups; g++)
    simdgroups[g] = {g * lanes, std::min(lanes, count - g * lanes), 0, {0, 0}};
  for (;;) {
    advance_all(groups);
    int finished = std::count_if(threads, threads + count, [](auto& t) { return t.state == done; });
    if (finished == count) return;
    Thread* waits = std::find_if(threads, threads + count, [](auto& t) { return t.state != done; });
    if (finished)
      fail("threadgroup_barrier at line %u not reached by all: %d of %d threads have finished",
           waits->line, finished, count);
    for (int i = 0; i < count; i++)
      if (threads[i].line != waits->line)
        fail("threadgroup_barrier not reached by all: threads wait at lines %u and %u",
             waits->line, threads[i].line);
    order_by_barrier(waits->argument);
    for (int i = 0; i < count; i++) threads[i].state = ready;
  }
}

uint3_ least(uint3_ a, uint3_ b) {
  return {std::min(a.x, b.x), std::min(a.y, b.y), std::min(a.z, b.z)};
}
uint3_ unflatten(uint64_t i, uint3_ size) {
  return {uint32_t(i % size.x), uint32_t(i / size.x % size.y), uint32_t(i / size.x / size.y)};
}
}  // namespace

void run_grid(const Job& given) {
  job = given;
  dice.seed(1);
  uint3_ full = least(job.grid, job.threadgroup), groups = (job.grid + full - 1u) / full;
  uint32_t most = full.x * full.y * full.z;
  uint64_t total = uint64_t(groups.x) * groups.y * groups.z;
  for (uint64_t k = 0; k < total; k++) {
    uint3_ g = unflatten(job.order == backwards ? total - 1 - k : k, groups);
    uint3_ size = least(full, job.grid - g * full);  // the last threadgroups may be smaller
    uint32_t count = size.x * size.y * size.z;
    for (uint32_t i = 0; i < count; i++) {
      uint3_ p = unflatten(i, size);
      threads[i].state = ready;
      threads[i].at = {
          g * full + p, p, g, size, full, job.grid, job.grid, groups, {0, 0, 0},
          i, i % lanes, i / lanes, i % 4, i / 4,
          (count + lanes - 1) / lanes, (most + lanes - 1) / lanes, (count + 3) / 4, (most + 3) / 4,
          lanes, lanes};
    }
    run_threadgroup(count);
  }
}
void forget_fibers() {
  current = nullptr;
  for (auto& t : threads) t.born = false;
}
const Position* running() { return current ? &current->at : nullptr; }
const Simdgroup& its_simdgroup() { return simdgroups[current->at.simdgroup_index_in_threadgroup]; }

// ---- called by kernels, through shim.h -------------------------------------------------------
extern "C" {
unsigned metal_lane() { return current->at.thread_index_in_simdgroup; }
unsigned long metal_meet(
    Meeting op, Number number, unsigned long bits, unsigned argument, unsigned line) {
  Thread& me = *current;
  me.op = op, me.number = number, me.bits = bits, me.argument = argument, me.line = line;
  pause_as(meeting);
  return me.bits;
}
void metal_barrier(unsigned fences, unsigned line) {
  current->argument = fences, current->line = line;
  pause_as(at_barrier);
}
}
