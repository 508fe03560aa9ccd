// The part of Metal's standard library that kernels here may use, for clang's C++ for OpenCL.
// There device, constant and threadgroup are address spaces of the type system, as in Metal, and
// code generation for a CPU puts all of them into flat memory.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma clang system_header
#include "abi.h"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define device __global
#define constant __constant
#define threadgroup __local
#define thread  // generic: clang gives temporaries and `this` no address space of their own
#define METAL_FUNC inline __attribute__((always_inline))

// The language's own names, which are free in Metal.
#define local local_
#define global global_
#define generic generic_
#define kernel kernel_

typedef unsigned char uchar, uint8_t;
typedef unsigned short ushort, uint16_t;
typedef unsigned int uint, uint32_t;
typedef unsigned long ulong, uint64_t, size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t, ptrdiff_t;
typedef __bf16 bfloat;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX __FLT_MAX__
#define M_PI_F 3.14159265358979323846f

namespace metal {
// ---- types ---------------------------------------------------------------------------------
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));

template <typename T, T v> struct integral_constant { static constexpr constant T value = v; };
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <typename A, typename B> struct is_same : false_type {};
template <typename A> struct is_same<A, A> : true_type {};
template <typename A, typename B> constexpr constant bool is_same_v = is_same<A, B>::value;
template <bool, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool B, typename T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool, typename A, typename B> struct conditional { typedef A type; };
template <typename A, typename B> struct conditional<false, A, B> { typedef B type; };
template <bool C, typename A, typename B> using conditional_t = typename conditional<C, A, B>::type;
template <typename T> constexpr constant bool is_integral_v = __is_integral(T);
template <typename T> constexpr constant bool is_signed_v = __is_signed(T);
template <typename T> constexpr constant bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename A, typename B> constexpr constant bool is_convertible_v =
    __is_convertible(A, B) && (is_same_v<A, B> || !is_same_v<B, bfloat>);

template <typename T, typename U> METAL_FUNC constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type: the sizes differ");
  return __builtin_bit_cast(T, x);
}

template <typename T> struct numeric_limits {
  static constexpr T max() { return is_signed_v<T> ? ~min() : T(~0ul); }
  static constexpr T min() { return is_signed_v<T> ? T(1ul << (sizeof(T) * 8 - 1)) : T(0); }
};
#define LIMITS(T, MAX, EPSILON)                                 \
  template <> struct numeric_limits<T> {                        \
    static constexpr T max() { return T(MAX); }                 \
    static constexpr T lowest() { return T(-(MAX)); }           \
    static constexpr T infinity() { return T(INFINITY); }       \
    static constexpr T quiet_NaN() { return T(NAN); }           \
    static constexpr T epsilon() { return T(EPSILON); }         \
  };
LIMITS(float, FLT_MAX, __FLT_EPSILON__)
LIMITS(half, 65504.0f, 0.0009765625f)
LIMITS(bfloat, 3.3895313892515355e38f, 0.0078125f)

// ---- arithmetic: an overload a type, so that a call with mixed types is ambiguous as in Metal --
#define EACH_FLOAT(DO, ...) DO(float, __VA_ARGS__) DO(half, __VA_ARGS__) DO(bfloat, __VA_ARGS__)
#define EACH_INTEGER(DO, ...)                                                               \
  DO(char, __VA_ARGS__) DO(uchar, __VA_ARGS__) DO(short, __VA_ARGS__) DO(ushort, __VA_ARGS__) \
  DO(int, __VA_ARGS__) DO(uint, __VA_ARGS__) DO(long, __VA_ARGS__) DO(ulong, __VA_ARGS__)
#define UNARY_(T, NAME, CALL) METAL_FUNC T NAME(T t) { float x = t; return T(CALL); }
#define UNARY(NAME, CALL) EACH_FLOAT(UNARY_, NAME, CALL)                                    \
  template <int N> METAL_FUNC vec<float, N> NAME(vec<float, N> x) { return CALL; }
#define BINARY_(T, NAME, CALL) METAL_FUNC T NAME(T s, T t) { float x = s, y = t; return T(CALL); }
#define BINARY(NAME, CALL) EACH_FLOAT(BINARY_, NAME, CALL)

#define BUILTIN(NAME) UNARY(NAME, __builtin_elementwise_##NAME(x))
BUILTIN(exp) BUILTIN(exp2) BUILTIN(log) BUILTIN(log2) BUILTIN(log10) BUILTIN(sqrt)
BUILTIN(sin) BUILTIN(cos) BUILTIN(tan) BUILTIN(asin) BUILTIN(acos) BUILTIN(atan)
BUILTIN(sinh) BUILTIN(cosh) BUILTIN(tanh)
BUILTIN(ceil) BUILTIN(floor) BUILTIN(trunc) BUILTIN(rint) BUILTIN(round) BUILTIN(abs)
UNARY(fabs, __builtin_elementwise_abs(x))
UNARY(rsqrt, 1.0f / __builtin_elementwise_sqrt(x))
BINARY(pow, __builtin_elementwise_pow(x, y))
BINARY(atan2, __builtin_atan2f(x, y))
BINARY(fmod, __builtin_fmodf(x, y))
BINARY(fmin, __builtin_fminf(x, y))
BINARY(fmax, __builtin_fmaxf(x, y))
BINARY(min, __builtin_fminf(x, y))
BINARY(max, __builtin_fmaxf(x, y))
BINARY(copysign, __builtin_copysignf(x, y))
#define INTEGER_(T, _)                                  \
  METAL_FUNC T min(T x, T y) { return y < x ? y : x; }  \
  METAL_FUNC T max(T x, T y) { return x < y ? y : x; }  \
  METAL_FUNC T abs(T x) { return x < 0 ? -x : x; }
EACH_INTEGER(INTEGER_)
#define MORE_(T, _)                                                                   \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
EACH_INTEGER(MORE_) EACH_FLOAT(MORE_)
#define PREDICATES_(T, _)                                                             \
  METAL_FUNC bool isnan(T x) { return x != x; }                                       \
  METAL_FUNC bool isinf(T x) { return __builtin_isinf(float(x)); }                    \
  METAL_FUNC bool isfinite(T x) { return __builtin_isfinite(float(x)); }              \
  METAL_FUNC T fma(T x, T y, T z) { return T(__builtin_fmaf(x, y, z)); }
EACH_FLOAT(PREDICATES_)
template <typename T> METAL_FUNC T select(T no, T yes, bool which) { return which ? yes : no; }
template <int N> METAL_FUNC float dot(vec<float, N> a, vec<float, N> b) {
  float sum = 0;
  for (int i = 0; i < N; i++) sum += a[i] * b[i];
  return sum;
}
namespace fast { using namespace metal; }
namespace precise { using namespace metal; }

// ---- threads -------------------------------------------------------------------------------
enum class mem_flags { mem_none, mem_device = fence_device, mem_threadgroup = fence_threadgroup };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
#define HERE uint line = __builtin_LINE()
METAL_FUNC void threadgroup_barrier(mem_flags f, HERE) { metal_barrier(uint(f), line); }
METAL_FUNC void simdgroup_barrier(mem_flags f, HERE) {
  metal_meet(simdgroup_barrier_, bits_, 0, uint(f), line);
}

// Sums and the like: bfloat and half lanes meet as float, and the result is rounded once.
template <Meeting OP, typename T> METAL_FUNC T meet(T x, uint line) {
  constexpr bool bitwise = OP == simd_and_ || OP == simd_or_ || OP == simd_xor_;
  static_assert((is_floating_point_v<T> && !bitwise) || (is_integral_v<T> && sizeof(T) <= 4),
                "no such simd operation");
  if constexpr (is_floating_point_v<T>)
    return T(as_type<float>(uint(metal_meet(OP, float_, as_type<uint>(float(x)), 0, line))));
  else
    return T(metal_meet(OP, is_signed_v<T> && !bitwise ? int_ : uint_, ulong(x), 0, line));
}
#define REDUCTION(NAME, OP) \
  template <typename T> METAL_FUNC T NAME(T x, HERE) { return meet<OP>(x, line); }
REDUCTION(simd_sum, simd_sum_) REDUCTION(simd_product, simd_product_)
REDUCTION(simd_min, simd_min_) REDUCTION(simd_max, simd_max_)
REDUCTION(simd_and, simd_and_) REDUCTION(simd_or, simd_or_) REDUCTION(simd_xor, simd_xor_)
REDUCTION(simd_prefix_inclusive_sum, simd_prefix_inclusive_)
REDUCTION(simd_prefix_exclusive_sum, simd_prefix_exclusive_)
METAL_FUNC bool simd_any(bool x, HERE) { return meet<simd_or_>(uint(x), line); }
METAL_FUNC bool simd_all(bool x, HERE) { return meet<simd_and_>(uint(x), line); }

#define EXCHANGE(NAME, OP)                                                                   \
  template <typename T> METAL_FUNC T NAME(T x, ushort argument, HERE) {                      \
    static_assert(sizeof(T) <= 8, "a lane gives at most eight bytes");                       \
    ulong bits = 0;                                                                          \
    __builtin_memcpy(&bits, &x, sizeof(T));                                                  \
    bits = metal_meet(OP, bits_, bits, argument, line);                                      \
    __builtin_memcpy(&x, &bits, sizeof(T));                                                  \
    return x;                                                                                \
  }
EXCHANGE(simd_broadcast, simd_broadcast_) EXCHANGE(simd_shuffle, simd_shuffle_)
EXCHANGE(simd_shuffle_xor, simd_shuffle_xor_)
EXCHANGE(simd_shuffle_up, simd_shuffle_up_) EXCHANGE(simd_shuffle_down, simd_shuffle_down_)
template <typename T> METAL_FUNC T simd_shuffle_and_fill_up(T x, T fill, ushort delta, HERE) {
  T moved = simd_shuffle_up(x, delta, line);
  return metal_lane() < delta ? fill : moved;
}
template <typename T> METAL_FUNC T quad_sum(T x, HERE) {
  x += simd_shuffle_xor(x, 1, line);
  return x + simd_shuffle_xor(x, 2, line);
}

// ---- vectors from parts ----------------------------------------------------------------------
template <typename V, typename T> METAL_FUNC void put(thread V& v, thread int& at, T x) {
  v[at++] = x;
}
template <typename V, typename T, int N>
METAL_FUNC void put(thread V& v, thread int& at, vec<T, N> x) {
  for (int i = 0; i < N; i++) v[at++] = x[i];
}
template <typename V, typename... P> METAL_FUNC V make_vector(P... parts) {
  V v;
  int at = 0;
  (put(v, at, parts), ...);
  const int lanes = __builtin_vectorelements(V);
  if (at == 1) for (; at < lanes; at++) v[at] = v[0];
  return v;
}
}  // namespace metal

#define VECTORS(T) \
  typedef metal::vec<T, 2> T##2; typedef metal::vec<T, 3> T##3; typedef metal::vec<T, 4> T##4;
VECTORS(char) VECTORS(uchar) VECTORS(short) VECTORS(ushort) VECTORS(int) VECTORS(uint)
VECTORS(long) VECTORS(ulong) VECTORS(half) VECTORS(float) VECTORS(bfloat)

// `threadgroup T name[n];` is rewritten to a reference to memory that the runtime lays out.
#define THREADGROUP_VARIABLE(NAME, ...) \
  threadgroup __typeof__(__VA_ARGS__) &NAME = *(threadgroup __typeof__(__VA_ARGS__)*) \
      metal_threadgroup_memory(__COUNTER__, sizeof(__VA_ARGS__), #NAME)
