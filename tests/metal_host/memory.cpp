// Launches a kernel and watches its memory. Checked kernels are compiled with clang's thread and
// undefined-behaviour instrumentation, and call the functions at the end of this file, where the
// sanitizers' own runtimes would be. These know the buffers' bounds, which bytes were written, and
// who touched them since which barrier.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <algorithm>
#include <vector>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/time.h>
#include "runtime.h"

struct Buffer {  // mirrored in kernel.py
  char* data;
  uint64_t size;
  uint32_t writable, initialised;
  const char* name;
};

namespace {
constexpr size_t page = 4096, max_threadgroup_memory = 32 << 10;
constexpr uint16_t several = 0x8000, many = 0xffff;

// What happened to one byte. Times count barriers: at equal times there was none between.
struct Cell {
  uint32_t write_time, read_time;   // 0: never
  uint16_t writer, reader;          // reader: a thread, `several` of one simdgroup, or `many`
  uint32_t write_fence, read_step;  // the writer's simdgroup's fences, the reader's one's steps
};
struct Region {
  char* begin;
  size_t size;
  Space space;
  bool writable;
  const char* name;
  std::vector<Cell> cells;
};
struct Variable {  // in threadgroup memory
  uint32_t id;
  size_t size;
  char* data;
};

std::vector<uint64_t> addresses;
std::vector<Region> regions;  // only when checked
std::vector<Variable> variables;
PerSpace now, threadgroup_began;
bool checked;
char* library;  // where the kernel's library lies
jmp_buf leave;
char report[1024];

// ---- blocks of memory, 64 GiB apart, so that no 32-bit index leads from one into another -----
char* const first_block = (char*)0x100000000000;
constexpr int log_distance = 36;

char* block(size_t index, size_t size) {
  char* wanted = first_block + (index << log_distance);
  void* at = mmap(wanted, size + page, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at != wanted) fail("no memory for %zu bytes at %p", size, (void*)wanted);
  return wanted;
}
char* watch(size_t index, size_t size, Space space, bool writable, const char* name) {
  char* data = block(index, size);
  regions.push_back({data, size, space, writable, name, std::vector<Cell>(writable ? size : 0)});
  return data;
}
void forget() {
  for (auto& r : regions) munmap(r.begin, r.size + page);
  if (!checked)
    for (auto& v : variables) munmap(v.data, v.size + page);
  regions.clear();
  variables.clear();
}

// ---- checks of one access --------------------------------------------------------------------
struct Access {
  Region& region;
  bool write;
  ptrdiff_t caller;  // in the kernel's library
  uint16_t me = running()->thread_index_in_threadgroup;
  const Simdgroup& group = its_simdgroup();
  uint32_t time = now[region.space], began = threadgroup_began[region.space];

  // No barrier lies between then and now: the same time, or another threadgroup's, which device
  // memory alone outlives. Time 1 is before the launch.
  bool unordered(uint32_t then) const {
    return then == time || (region.space == device_space && then > 1 && then < began);
  }
  bool in_my_simdgroup(uint16_t who) const {
    if (who & several) return who == (several | group.first / lanes);
    return who / lanes == group.first / lanes;
  }
  long index(const Cell& c) const { return &c - region.cells.data(); }

  void after_write(const Cell& c) const {
    bool written = region.space == device_space ? c.write_time : c.write_time >= began;
    if (!written && !write)
      fail("uninitialised read: byte %ld of %s, at <%#tx>", index(c), region.name, caller);
    if (!written || !unordered(c.write_time)) return;
    bool elsewhere = c.write_time < began;
    bool fenced = in_my_simdgroup(c.writer) && c.write_fence != group.fences[region.space];
    if (elsewhere || (c.writer != me && !fenced))
      fail("race on byte %ld of %s: %s after a write by thread %u%s, with no barrier between, "
           "at <%#tx>", index(c), region.name, write ? "write" : "read", c.writer,
           elsewhere ? " of another threadgroup" : "", caller);
  }
  // A meeting of its simdgroup orders a read before a write: each lane has its value by then.
  void after_read(const Cell& c) const {
    if (!c.read_time || !unordered(c.read_time)) return;
    bool elsewhere = c.read_time < began;
    bool met = in_my_simdgroup(c.reader) && c.read_step != group.steps;
    if (elsewhere || (c.reader != me && !met))
      fail("race on byte %ld of %s: write after a read by another %s, with no barrier between, "
           "at <%#tx>", index(c), region.name, elsewhere ? "threadgroup" : "thread", caller);
  }
  void note(Cell& c) const {
    if (write) {
      c.write_time = time, c.writer = me, c.write_fence = group.fences[region.space];
      return;
    }
    bool alone = c.read_time != time || c.reader == me ||
                 (in_my_simdgroup(c.reader) && c.read_step != group.steps);
    c.reader = alone ? me : in_my_simdgroup(c.reader) ? several | group.first / lanes : many;
    c.read_time = time, c.read_step = group.steps;
  }
};

void touch(char* address, size_t size, bool write, void* return_address) {
  size_t index = (address - first_block + (1l << (log_distance - 1))) >> log_distance;  // nearest
  if (index >= regions.size()) return;  // a thread's own memory, or a constant of the program
  Region& r = regions[index];
  ptrdiff_t caller = (char*)return_address - library;
  if (address < r.begin || address + size > r.begin + r.size)
    fail("out of bounds: %s of %zu bytes at byte %ld of %s, which has %zu, at <%#tx>",
         write ? "write" : "read", size, long(address - r.begin), r.name, r.size, caller);
  if (write && !r.writable) fail("input written: %s, at <%#tx>", r.name, caller);
  if (!r.writable) return;
  Access access{r, write, caller};
  for (size_t i = address - r.begin, end = i + size; i < end; i++) {
    access.after_write(r.cells[i]);
    if (write) access.after_read(r.cells[i]);
    access.note(r.cells[i]);
  }
}
void touch_aligned(char* address, size_t size, bool write, void* return_address) {
  // Clang promises eight bytes of alignment at most; a larger vector out of line raises a signal.
  if ((uint64_t)address % std::min(size, size_t(8)))
    fail("misaligned access of %zu bytes, at <%#tx>", size, (char*)return_address - library);
  touch(address, size, write, return_address);
}

// ---- signals: ours while a kernel runs, then Python's again ----------------------------------
void on_signal(int signal) {
  if (signal == SIGFPE) fail("integer division by zero");
  if (signal == SIGVTALRM) fail("no end: the time limit has passed");
  if (signal == SIGILL || signal == SIGTRAP) fail("index outside an array");
  fail("invalid memory access, or stack overflow");
}
constexpr int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
struct Signals {
  struct sigaction before[std::size(caught)];
  stack_t stack_before;
  Signals(uint32_t seconds) {
    static char stack[64 << 10];
    stack_t ours{stack, 0, sizeof stack};
    sigaltstack(&ours, &stack_before);
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &action, &before[i]);
    itimerval limit{{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &limit, nullptr);
  }
  ~Signals() {
    itimerval never{};
    setitimer(ITIMER_VIRTUAL, &never, nullptr);
    for (size_t i = 0; i < std::size(caught); i++) sigaction(caught[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// ---- a launch --------------------------------------------------------------------------------
void bring_in(const Buffer* buffers, uint32_t count) {
  addresses.clear();
  std::fill(now, now + 2, 1);
  for (uint32_t i = 0; i < count; i++) {
    const Buffer& b = buffers[i];
    char* data = checked ? watch(i, b.size, device_space, b.writable, b.name) : b.data;
    if (checked && b.initialised) {
      memcpy(data, b.data, b.size);
      for (auto& c : regions[i].cells) c.write_time = 1;
    }
    addresses.push_back((uint64_t)data);
  }
}
void bring_out(const Buffer* buffers, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) {
    if (!buffers[i].writable) continue;
    const auto& cells = regions[i].cells;
    auto unwritten = [](const Cell& c) { return !c.write_time; };
    size_t n = std::count_if(cells.begin(), cells.end(), unwritten);
    size_t first = std::find_if(cells.begin(), cells.end(), unwritten) - cells.begin();
    if (n)
      fail("%s: %zu of %zu bytes were never written, the first is byte %zu", buffers[i].name, n,
           cells.size(), first);
    memcpy(buffers[i].data, regions[i].begin, buffers[i].size);
  }
}
}  // namespace

void fail(const char* format, ...) {
  va_list rest;
  va_start(rest, format);
  size_t n = vsnprintf(report, sizeof report, format, rest);
  va_end(rest);
  if (const Position* at = running(); at && n < sizeof report) {
    uint3_ g = at->threadgroup_position_in_grid;
    snprintf(report + n, sizeof report - n, ", by thread %u of threadgroup (%u, %u, %u)",
             at->thread_index_in_threadgroup, g.x, g.y, g.z);
  }
  _longjmp(leave, 1);
}
void begin_threadgroup() {
  for (int s = 0; s < 2; s++) threadgroup_began[s] = ++now[s];
}
void order_by_barrier(unsigned fences) {
  now[threadgroup_space] += (fences & fence_threadgroup) != 0;
  now[device_space] += (fences & fence_device) != 0;
}

extern "C" {
// Null when all went well, else what went wrong; <0x..> in it is a place in the kernel's library.
const char* metal_launch(Entry entry, const Buffer* buffers, uint32_t count, const uint32_t* sizes,
                         uint32_t order, uint32_t check, uint32_t seconds) {
  Dl_info info;
  library = dladdr((void*)entry, &info) ? (char*)info.dli_fbase : nullptr;
  checked = check;
  Signals ours(seconds);
  bool failed = _setjmp(leave);
  if (!failed) {
    bring_in(buffers, count);
    run_grid({entry, addresses.data(), {sizes[0], sizes[1], sizes[2]},
              {sizes[3], sizes[4], sizes[5]}, Order(order)});
    if (checked) bring_out(buffers, count);
  } else {
    forget_fibers();
  }
  forget();
  return failed ? report : nullptr;
}

unsigned long metal_threadgroup_memory(unsigned id, unsigned long size, const char* name) {
  size_t used = size, index = addresses.size() + variables.size();
  for (auto& v : variables) {
    if (v.id == id && v.size == size) return (unsigned long)v.data;
    used += v.size;
  }
  if (used > max_threadgroup_memory)
    fail("threadgroup memory: %zu bytes, more than %zu", used, max_threadgroup_memory);
  char* data = checked ? watch(index, size, threadgroup_space, true, name) : block(index, size);
  variables.push_back({id, size, data});
  return (unsigned long)data;
}

// Rounding to bfloat16, which older compiler libraries lack.
__bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t upper = x != x ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 rounded;
  memcpy(&rounded, &upper, 2);
  return rounded;
}

// ---- called by clang's instrumentation -------------------------------------------------------
#define CALLER __builtin_return_address(0)
#define ACCESS(N)                                                                  \
  void __tsan_read##N(char* p) { touch_aligned(p, N, false, CALLER); }             \
  void __tsan_write##N(char* p) { touch_aligned(p, N, true, CALLER); }             \
  void __tsan_unaligned_read##N(char* p) { touch(p, N, false, CALLER); }           \
  void __tsan_unaligned_write##N(char* p) { touch(p, N, true, CALLER); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_init() {}
void* __tsan_memcpy(char* to, char* from, size_t n) {
  touch(from, n, false, CALLER);
  touch(to, n, true, CALLER);
  return memmove(to, from, n);
}
void* __tsan_memmove(char* to, char* from, size_t n) { return __tsan_memcpy(to, from, n); }
void* __tsan_memset(char* to, int value, size_t n) {
  touch(to, n, true, CALLER);
  return memset(to, value, n);
}

struct Source {  // how clang's description of any check begins
  const char* file;
  uint32_t line, column;
};
#define CHECK(NAME, TEXT) \
  void __ubsan_handle_##NAME(Source* s) { fail(TEXT " at %s:%u", s->file, s->line); }
CHECK(out_of_bounds, "index outside an array")
CHECK(type_mismatch_v1, "misaligned access")
CHECK(divrem_overflow, "integer division by zero")
CHECK(add_overflow, "signed integer overflow")
CHECK(sub_overflow, "signed integer overflow")
CHECK(mul_overflow, "signed integer overflow")
CHECK(negate_overflow, "signed integer overflow")
CHECK(float_cast_overflow, "value too large for an integer")
CHECK(load_invalid_value, "a bool that is neither true nor false")
}
