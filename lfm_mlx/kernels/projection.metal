// y = x Wᵀ for few tokens; on request with the norm before it, and SwiGLU or the residual after it.
//
// A simdgroup takes ROWS rows of weights (with SwiGLU half of them gate and half up, of the same
// features) and TILE tokens: its lanes take VALUES neighbouring inputs at a time and add up in
// registers. The norm needs no pass of its own: x times its weight goes into the products, the
// squares are added up beside them, and the reciprocal root multiplies the finished sums.
// Simdgroups share nothing.
//
// grid [32 · ceil(M / TILE), ceil(N / outputs of a simdgroup), 1], threadgroup [32, any, 1]; VALUES
// divides K and GROUP, GROUP divides K, and ROWS is even with SwiGLU.
//
// T: type of x, norm_weight, residual and y · M, N, K: tokens, outputs, inputs · ROWS, TILE
// NORM, SWIGLU, RESIDUAL: what is folded in · W, BITS, GROUP, VALUES, PACKED: see matrix.py

constexpr int OUTPUTS = SWIGLU ? ROWS / 2 : ROWS;
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int first = static_cast<int>(thread_position_in_grid.y) * OUTPUTS;
const int first_token = static_cast<int>(threadgroup_position_in_grid.x) * TILE;

const device W* weight_row[ROWS];
int group_row[ROWS];
for (int r = 0; r < ROWS; ++r) {
  // The last block may reach past the end: it computes the last row again, and drops it.
  const int row = SWIGLU ? metal::min(first + r / 2, N - 1) + (r % 2) * N
                         : metal::min(first + r, N - 1);
  weight_row[r] = (const device W*)weight + static_cast<size_t>(row) * (K * BITS / 8);
  group_row[r] = row * (K / GROUP);
}

const device T* token[TILE];
float squares[TILE];
float total[TILE][ROWS];
for (int t = 0; t < TILE; ++t) {
  token[t] = x + metal::min(first_token + t, M - 1) * K;
  squares[t] = 0.0f;
  for (int r = 0; r < ROWS; ++r) {
    total[t][r] = 0.0f;
  }
}

for (int k = lane * VALUES; k < K; k += 32 * VALUES) {
  float values[TILE][VALUES];
  float sum[TILE];
  for (int t = 0; t < TILE; ++t) {
    sum[t] = load_vector<T, float, VALUES, BITS>(token[t] + k, values[t]);
    if (NORM) {
      // load_vector scales each value for qdot, so the sum is taken from x itself.
      sum[t] = 0.0f;
      for (int i = 0; i < VALUES; ++i) {
        const float value = static_cast<float>(token[t][k + i]);
        const float factor = static_cast<float>(norm_weight[k + i]);
        squares[t] += value * value;
        sum[t] += value * factor;
        values[t][i] *= factor;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const device W* at = weight_row[r] + k * BITS / 8;
    const float scale = PACKED ? static_cast<float>(scales[group_row[r] + k / GROUP]) : 1.0f;
    const float bias = PACKED ? static_cast<float>(biases[group_row[r] + k / GROUP]) : 0.0f;
    for (int t = 0; t < TILE; ++t) {
      total[t][r] += qdot<float, VALUES, BITS>(at, values[t], scale, bias, sum[t]);
    }
  }
}

for (int t = 0; t < TILE; ++t) {
  float inverse = 1.0f;
  if (NORM) {
    inverse = metal::precise::rsqrt(metal::simd_sum(squares[t]) / static_cast<float>(K) + eps);
  }
  for (int r = 0; r < ROWS; ++r) {
    total[t][r] = metal::simd_sum(total[t][r]) * inverse;
  }
  for (int o = 0; o < OUTPUTS; ++o) {
    if (lane == 0 && first + o < N && first_token + t < M) {
      const int at = (first_token + t) * N + first + o;
      float result = total[t][SWIGLU ? 2 * o : o];
      if (SWIGLU) {
        result = result / (1.0f + metal::precise::exp(-result)) * total[t][2 * o + 1];
      }
      if (RESIDUAL) {
        result += static_cast<float>(residual[at]);
      }
      y[at] = static_cast<T>(result);
    }
  }
}
