// Kernels with one bug each: {{the bug :: what should stand there}}. Above each body stands its
// name, and what is said about the bug, as a regular expression. The kernel reads x, which holds
// 0, 1, 2 …, and writes y, both of 64 floats, with 64 threads.

read_past_end: out of bounds: read of 4 bytes at byte 256 of x
y[i] = x[i + {{1 :: 0}}];

read_before_start: out of bounds: read of 4 bytes at byte -4 of x
y[i] = x[int(i) - {{1 :: 0}}];

read_before_start_unsigned: out of bounds: read of 4 bytes at byte 17179869180 of x
y[i] = x[i - {{1 :: 0}}];

write_past_end: out of bounds: write of 4 bytes at byte 256 of y
y[i] = 0;
if (i == 63) y[i + {{1 :: 0}}] = 1;

shape_past_end: out of bounds: read of 4 bytes at byte 4 of x_shape
y[i] = x_shape[{{1 :: 0}}];

threadgroup_past_end: index outside an array at threadgroup_past_end.metal:5
threadgroup float b[{{63 :: 64}}];
b[t] = x[i];
y[i] = b[t];

threadgroup_pointer_past_end: out of bounds: write of 4 bytes at byte 256 of b
threadgroup float b[64];
threadgroup float* p = b;
p[t + {{1 :: 0}}] = x[i];
y[i] = p[t + {{1 :: 0}}];

local_past_end: index outside an array
float a[4] = {1, 2, 3, 4};
y[i] = a[i % {{5 :: 4}}];

local_pointer_past_end: index outside an array
float a[4] = {1, 2, 3, 4}, s = 0;
thread float* p = a;
for (int k = 0; k < {{5 :: 4}}; k++) s += p[k * x_shape[0] / 64];
y[i] = s;

misaligned: misaligned access of 16 bytes
y[i] = (*(const device float4*)(x + {{1 :: 4}})).x;

uninitialised_threadgroup: uninitialised read: byte 252 of b
threadgroup float b[64];
if (t < {{63 :: 64}}) b[t] = x[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = b[63 - t];

uninitialised_sum: uninitialised read: byte 0 of b
threadgroup float b[64];
{{ :: b[t] = 0;}}
b[t] += x[i];
y[i] = b[t];

uninitialised_output: uninitialised read: byte 0 of y
{{ :: y[i] = 0;}}
y[i] += x[i];

uninitialised_local_array: a local variable that was never set
float a[4];
for (int k = 0; k < {{3 :: 4}}; k++) a[k] = k;
y[i] = a[i & 3];

output_not_written: y: 4 of 256 bytes were never written, the first is byte 20
if (i != {{5 :: 64}}) y[i] = x[i];

input_written: input written: x
((device float*){{x :: y}})[i] = 1;
y[i] = 2;

barrier_missed: not reached by all: 24 of 64 threads have finished
if (t < {{40 :: 64}}) threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = t;

barrier_after_return: not reached by all: 1 of 64 threads have finished
y[i] = 1;
if (t == {{3 :: 64}}) return;
threadgroup_barrier(mem_flags::mem_threadgroup);

two_barriers: not reached by all: threads wait at lines 5 and 7
if (t < {{32 :: 64}})
  threadgroup_barrier(mem_flags::mem_threadgroup);
else
  threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = t;

simd_or_barrier: divergent simd operation: lane 0 waits at line 5, lane 9 at line 6
float s = 0;
if (lane < {{9 :: 32}}) s = simd_sum(x[i]);
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = s;

divergent_simd: divergent simd operation: lane 0 waits at line 6, lane 7 at line 8
float s;
if (lane < {{7 :: 32}})
  s = simd_sum(x[i]);
else
  s = simd_sum(2 * x[i]);
y[i] = s;

divergent_loop: divergent simd operation
float s = 0;
for (uint k = 0; k < {{lane :: 4}}; k++) s += simd_sum(1.0f);
y[i] = simd_max(s);

shuffle_from_inactive: reads lane 20, which is not active
y[i] = 0;
if (lane >= {{20 :: 32}}) return;
y[i] = simd_shuffle_xor(x[i], 20);

shuffle_out_of_range: reads lane 32, which is not active
y[i] = simd_shuffle(x[i], lane ^ {{32 :: 31}});

broadcast_not_uniform: the lanes name different lanes
y[i] = simd_broadcast(x[i], {{lane :: 3}});

race_missing_barrier: race on byte .* of b: .* at race_missing_barrier.metal:[78]
threadgroup float b[64];
b[t] = 0;
threadgroup_barrier(mem_flags::mem_threadgroup);
b[t] = x[i]; {{ :: threadgroup_barrier(mem_flags::mem_threadgroup);}}
y[i] = b[63 - t];

race_wrong_fence: race on byte .* of b
threadgroup float b[64];
b[t] = x[i];
threadgroup_barrier({{mem_flags::mem_device :: mem_flags::mem_threadgroup}});
y[i] = b[63 - t];

race_reused_memory: race on byte .* of b
threadgroup float b[2];
float m = simd_max(x[i]);
if (lane == 0) b[group] = m;
threadgroup_barrier(mem_flags::mem_threadgroup);
m = max(b[0], b[1]);
{{ :: threadgroup_barrier(mem_flags::mem_threadgroup);}}
m = simd_sum(m);
if (lane == 0) b[group] = m;
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = b[0] + b[1];

race_in_simdgroup: race on byte .* of b
threadgroup float b[64];
b[t] = 0;
simdgroup_barrier(mem_flags::mem_threadgroup);
b[t] = x[i];
{{ :: simdgroup_barrier(mem_flags::mem_threadgroup);}}
y[i] = b[t ^ 1];

race_on_one_element: race on byte 0 of y: write after a write by thread 0
if (t < {{64 :: 1}}) y[0] = t;
if (t > 0) y[t] = 0;

race_between_threadgroups: race on byte .* of y: write after a write by thread .* of another
if (threadgroup_position_in_grid.x == 0) y[i ^ {{32 :: 1}}] = 0;
else y[i] = x[i];

race_on_device_memory: race on byte .* of y: read after a write
y[i] = x[i];
threadgroup_barrier({{mem_flags::mem_threadgroup :: mem_flags::mem_device}});
if (y[i ^ 1] < 0) y[0] = 0;

threadgroup_memory: threadgroup memory: 32772 bytes, more than 32768
threadgroup float b[{{8193 :: 8192}}];
b[t] = 1;
y[i] = b[t];

division_by_zero: integer division by zero
y[i] = i / uint(x[{{0 :: 1}}]);

integer_overflow: signed integer overflow
y[i] = int(i) * {{1073741824 :: 16777216}};

float_to_integer: value too large for an integer
y[i] = int(x[i] * {{1e9f :: 1.0f}});

endless: no end
y[i] = 0;
while (x[0] == {{0 :: 1}}) y[i] += 1;

// Text that Metal's compiler refuses, and ours.

refused_double: use of type 'double'|type 'double'
{{double :: float}} d = x[i];
y[i] = d;

refused_device_as_threadgroup: cannot initialize a variable of type 'const __local
const {{threadgroup :: device}} float* p = x;
y[i] = p[i];

refused_constant_as_device: cannot initialize a variable of type 'const __global
const {{device :: constant}} int* p = x_shape;
y[i] = *p;

refused_no_address_space: `float. p` has no address space
float a[2] = {1, 2};
{{ :: thread}} float* p = a;
y[i] = p[i & 1];

refused_input_assigned: read-only
{{x :: y}}[i] = 1;
y[i] = 1;

refused_float_to_bfloat: loses floating-point precision
bfloat b = {{x[i] :: static_cast<bfloat>(x[i])}};
y[i] = b;

refused_mixed_types: call to 'max' is ambiguous
y[i] = max(i, {{3 :: 3u}});

refused_simd_sum_of_long: no such simd operation
y[i] = simd_sum({{long :: int}}(i));

refused_uninitialised_local: variable 'a' is used uninitialized
float a{{ :: = 0}};
if (i > 3) a = 1;
y[i] = a;

refused_standard_library: undeclared identifier 'std'
y[i] = {{std :: metal}}::exp(x[i]);

refused_mlx_include: file not found
{{#include "mlx/backend/metal/kernels/utils.h" :: #include <metal_math>}}
y[i] = 1;
