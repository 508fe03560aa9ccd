// y = residual + sum over the chosen experts e of weight_e * (down_e h_e), for each token.
//
// A threadgroup takes ROWS neighbouring outputs of one token, and each of its K simdgroups one of
// the chosen experts: its lanes take VALUES neighbouring features at a time and add up in
// registers. Lane 0 leaves the weighted products in threadgroup memory, and thread r adds output r.
//
// grid [32 · tokens, K, ceil(D / ROWS)], threadgroup [32, K, 1]; VALUES divides F and GROUP, and
// GROUP divides F. Threadgroup memory is K · ROWS floats; ROWS up to 32.
//
// T: type of h, weights, residual and y · D, F, K: outputs, features, experts per token · ROWS
// HAS_RESIDUAL: whether residual is meant · W, BITS, GROUP, VALUES, PACKED: see matrix.py

threadgroup float products[K * ROWS];

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int rank = static_cast<int>(thread_position_in_threadgroup.y);
const int token = static_cast<int>(threadgroup_position_in_grid.x);
const int first = static_cast<int>(threadgroup_position_in_grid.z) * ROWS;
const size_t pair = static_cast<size_t>(token) * K + rank;
const size_t expert = static_cast<size_t>(indices[pair]);

const device T* features = h + pair * F;
const device W* down_row[ROWS];
int group_row[ROWS];
float total[ROWS];
for (int r = 0; r < ROWS; ++r) {
  // The last block may reach past the end: it computes the last output again, and drops it.
  const size_t row = expert * D + metal::min(first + r, D - 1);
  down_row[r] = (const device W*)down_weight + row * (F * BITS / 8);
  group_row[r] = static_cast<int>(row) * (F / GROUP);
  total[r] = 0.0f;
}

for (int f = lane * VALUES; f < F; f += 32 * VALUES) {
  float values[VALUES];
  const float sum = load_vector<T, float, VALUES, BITS>(features + f, values);
  for (int r = 0; r < ROWS; ++r) {
    const int group = group_row[r] + f / GROUP;
    total[r] += qdot<float, VALUES, BITS>(
        down_row[r] + f * BITS / 8,
        values,
        PACKED ? static_cast<float>(down_scales[group]) : 1.0f,
        PACKED ? static_cast<float>(down_biases[group]) : 0.0f,
        sum);
  }
}

const float weight = static_cast<float>(weights[pair]);
for (int r = 0; r < ROWS; ++r) {
  const float product = metal::simd_sum(total[r]) * weight;
  if (lane == 0) {
    products[rank * ROWS + r] = product;
  }
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);

if (rank == 0 && lane < ROWS && first + lane < D) {
  const size_t at = static_cast<size_t>(token) * D + first + lane;
  float sum = HAS_RESIDUAL ? static_cast<float>(residual[at]) : 0.0f;
  for (int other = 0; other < K; ++other) {
    sum += products[other * ROWS + lane];
  }
  y[at] = static_cast<T>(sum);
}
