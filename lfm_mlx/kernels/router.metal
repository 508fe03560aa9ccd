// normed = rms_norm(x) * norm_weight; indices, weights = router(normed · gate)
//
// A threadgroup takes one token. Its threads sum the squares and write the normed token, to memory
// and to threadgroup memory; a simdgroup takes every SIMDGROUPS-th expert's score, its lanes VALUES
// neighbouring elements at a time; then thread e finds the rank of expert e by counting the experts
// that go before it, so that ties go to the lower index and ranks are all different.
//
// grid [32 · SIMDGROUPS, tokens, 1], threadgroup [32 · SIMDGROUPS, 1, 1]; nothing has to divide
// anything. E up to 32 · SIMDGROUPS; threadgroup memory is D values of T and 2 E + 33 floats.
//
// T: type of x, norm_weight, gate and outputs · D, E, K, SIMDGROUPS, VALUES: sizes
// HAS_BIAS: whether expert_bias is meant · NORMALIZE: whether weights are divided by their sum
// PACKED: whether the gate is bytes, with gate_scales and gate_biases for each GROUP of them

threadgroup T normed_token[D];
threadgroup float sums[SIMDGROUPS];
threadgroup float scores[E];
threadgroup float biased[E];
threadgroup float picked[K];

const int thread_index = static_cast<int>(thread_index_in_threadgroup);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int simdgroup = static_cast<int>(simdgroup_index_in_threadgroup);
const size_t token = threadgroup_position_in_grid.y;

float squares = 0.0f;
for (int d = thread_index; d < D; d += 32 * SIMDGROUPS) {
  const float value = static_cast<float>(x[token * D + d]);
  squares += value * value;
}
squares = metal::simd_sum(squares);
if (lane == 0) {
  sums[simdgroup] = squares;
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);
float total = 0.0f;
for (int group = 0; group < SIMDGROUPS; ++group) {
  total += sums[group];
}
const float inverse = metal::precise::rsqrt(total / static_cast<float>(D) + eps);

for (int d = thread_index; d < D; d += 32 * SIMDGROUPS) {
  const T scaled = static_cast<T>(static_cast<float>(x[token * D + d]) * inverse);
  const T value =
      static_cast<T>(static_cast<float>(scaled) * static_cast<float>(norm_weight[d]));
  normed_token[d] = value;
  normed[token * D + d] = value;
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);

for (int expert = simdgroup; expert < E; expert += SIMDGROUPS) {
  const size_t row = static_cast<size_t>(expert) * D;
  float logit = 0.0f;
  if (PACKED) {
    const device uint8_t* bytes = (const device uint8_t*)gate + row;
    for (int d = lane * VALUES; d < D; d += 32 * VALUES) {
      float products = 0.0f;
      float sum = 0.0f;
      for (int i = 0; i < VALUES; ++i) {
        const float value = static_cast<float>(normed_token[d + i]);
        products += value * static_cast<float>(bytes[d + i]);
        sum += value;
      }
      const size_t group = (row + d) / GROUP;
      logit += static_cast<float>(gate_scales[group]) * products +
          static_cast<float>(gate_biases[group]) * sum;
    }
  } else {
    for (int d = lane * VALUES; d < D / VALUES * VALUES; d += 32 * VALUES) {
      for (int i = 0; i < VALUES; ++i) {
        logit += static_cast<float>(normed_token[d + i]) * static_cast<float>(gate[row + d + i]);
      }
    }
    for (int d = D / VALUES * VALUES + lane; d < D; d += 32) {
      logit += static_cast<float>(normed_token[d]) * static_cast<float>(gate[row + d]);
    }
  }
  // Rounded where the operations round, so that scores that tie there tie here.
  logit = static_cast<float>(static_cast<T>(metal::simd_sum(logit)));
  if (lane == 0) {
    const float score = static_cast<float>(
        static_cast<T>(1.0f / (1.0f + metal::precise::exp(-logit))));
    const float shifted = HAS_BIAS ? score + static_cast<float>(expert_bias[expert]) : score;
    scores[expert] = score;
    // Not a number goes last, as in a sort, and leaves the ranks a permutation.
    biased[expert] = shifted == shifted ? shifted : -INFINITY;
  }
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);

if (thread_index < E) {
  int rank = 0;
  for (int other = 0; other < E; ++other) {
    const bool before = biased[other] > biased[thread_index] ||
        (biased[other] == biased[thread_index] && other < thread_index);
    rank += before ? 1 : 0;
  }
  if (rank < K) {
    indices[token * K + rank] = static_cast<uint>(thread_index);
    picked[rank] = scores[thread_index];
  }
}
threadgroup_barrier(metal::mem_flags::mem_threadgroup);

if (thread_index < K) {
  float weight = picked[thread_index];
  if (NORMALIZE) {
    float sum = 0.0f;
    for (int rank = 0; rank < K; ++rank) {
      sum += picked[rank];
    }
    weight = weight / (sum + epsilon);
  }
  weights[token * K + thread_index] = static_cast<T>(weight * scale);
}
