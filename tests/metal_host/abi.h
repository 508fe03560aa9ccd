// What the kernels (C++ for OpenCL) and the runtime (C++) say to each other.
#pragma once
#ifndef __OPENCL_CPP_VERSION__
#define __constant
#endif

typedef unsigned uint3_ __attribute__((ext_vector_type(3)));

// Metal's attributes of a thread, under the names by which a kernel asks for them.
struct Position {
  uint3_ thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3_ threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid, grid_size;
  uint3_ threadgroups_per_grid, grid_origin;
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  unsigned thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  unsigned quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  unsigned threads_per_simdgroup, thread_execution_width;
};

// The operations at which the lanes of a simdgroup meet, and what a lane's bits are there.
enum Meeting {
  simd_sum_, simd_product_, simd_min_, simd_max_, simd_and_, simd_or_, simd_xor_,
  simd_prefix_inclusive_, simd_prefix_exclusive_,
  simd_broadcast_, simd_shuffle_, simd_shuffle_xor_, simd_shuffle_up_, simd_shuffle_down_,
  simdgroup_barrier_
};
enum Number { bits_, float_, int_, uint_ };
enum Fence { fence_device = 1, fence_threadgroup = 2 };

extern "C" {
unsigned metal_lane();
unsigned long metal_meet(Meeting, Number, unsigned long bits, unsigned argument, unsigned line);
void metal_barrier(unsigned fences, unsigned line);
unsigned long metal_threadgroup_memory(
    unsigned id, unsigned long size, const __constant char* name);
}
