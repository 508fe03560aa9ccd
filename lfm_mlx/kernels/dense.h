// What MLX's quantized.h has for packed weights, for dense ones: same names, same arguments.
//
// `bits` is 8: a value takes eight eighths of a stored element. There is no scale and no bias, and
// so no need for the sum of x.

template <typename T, typename U, int values_per_thread, int bits>
inline U load_vector(const device T* x, thread U* x_thread) {
  for (int i = 0; i < values_per_thread; i++) {
    x_thread[i] = static_cast<U>(x[i]);
  }
  return static_cast<U>(0);
}

template <typename U, int values_per_thread, int bits, typename W>
inline U qdot(const device W* w, const thread U* x_thread, U scale, U bias, U sum) {
  U total = static_cast<U>(0);
  for (int i = 0; i < values_per_thread; i++) {
    total += x_thread[i] * static_cast<U>(w[i]);
  }
  return total;
}
