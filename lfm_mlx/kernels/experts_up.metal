// h = silu(gate_e x) * (up_e x) for each chosen expert e of each token.
//
// A simdgroup takes FEATURES neighbouring features of one (token, expert) pair, and so 2 FEATURES
// rows of weights; its lanes take VALUES neighbouring inputs at a time and add up in registers. x
// is read once for gate and up together. Simdgroups share nothing.
//
// grid [32 · pairs, ceil(F / FEATURES), 1], threadgroup [32, any, 1]; VALUES divides D and GROUP, and
// GROUP divides D.
//
// T: type of x and h · D, F, K: inputs, features, experts per token · FEATURES
// W, BITS, GROUP, VALUES, PACKED: how weights are read, see matrix.py

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int first = static_cast<int>(thread_position_in_grid.y) * FEATURES;
const size_t pair = threadgroup_position_in_grid.x;
const size_t expert = static_cast<size_t>(indices[pair]);

const device T* token = x + pair / K * D;
const device W* gate_row[FEATURES];
const device W* up_row[FEATURES];
int group_row[FEATURES];
float gate[FEATURES];
float up[FEATURES];
for (int f = 0; f < FEATURES; ++f) {
  // The last block may reach past the end: it computes the last feature again, and drops it.
  const size_t row = expert * F + metal::min(first + f, F - 1);
  gate_row[f] = (const device W*)gate_weight + row * (D * BITS / 8);
  up_row[f] = (const device W*)up_weight + row * (D * BITS / 8);
  group_row[f] = static_cast<int>(row) * (D / GROUP);
  gate[f] = 0.0f;
  up[f] = 0.0f;
}

for (int d = lane * VALUES; d < D; d += 32 * VALUES) {
  float values[VALUES];
  const float sum = load_vector<T, float, VALUES, BITS>(token + d, values);
  for (int f = 0; f < FEATURES; ++f) {
    const int group = group_row[f] + d / GROUP;
    gate[f] += qdot<float, VALUES, BITS>(
        gate_row[f] + d * BITS / 8,
        values,
        PACKED ? static_cast<float>(gate_scales[group]) : 1.0f,
        PACKED ? static_cast<float>(gate_biases[group]) : 0.0f,
        sum);
    up[f] += qdot<float, VALUES, BITS>(
        up_row[f] + d * BITS / 8,
        values,
        PACKED ? static_cast<float>(up_scales[group]) : 1.0f,
        PACKED ? static_cast<float>(up_biases[group]) : 0.0f,
        sum);
  }
}

for (int f = 0; f < FEATURES; ++f) {
  const float gated = metal::simd_sum(gate[f]);
  const float raised = metal::simd_sum(up[f]);
  if (lane == 0 && first + f < F) {
    h[pair * F + first + f] =
        static_cast<T>(gated / (1.0f + metal::precise::exp(-gated)) * raised);
  }
}
