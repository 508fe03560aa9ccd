// What the two halves of the runtime share: threads.cpp runs a grid, memory.cpp watches its memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include "abi.h"

constexpr int lanes = 32, max_threads = 1024;

enum Space { threadgroup_space, device_space };
using PerSpace = uint32_t[2];

struct Simdgroup {
  int first, count;
  uint32_t steps;   // meetings so far
  PerSpace fences;  // simdgroup barriers that order a space
};

using Entry = void (*)(const uint64_t* buffers, const Position*);
enum Order { forwards, backwards, shuffled };
struct Job {
  Entry entry;
  const uint64_t* buffers;
  uint3_ grid, threadgroup;
  Order order;
};

// threads.cpp
void run_grid(const Job&);
void forget_fibers();              // after a kernel was left in its middle
const Position* running();         // the thread that runs, or null
const Simdgroup& its_simdgroup();  // of the thread that runs

// memory.cpp
[[noreturn]] void fail(const char* format, ...);  // leaves the kernel with a report
void begin_threadgroup();
void order_by_barrier(unsigned fences);
