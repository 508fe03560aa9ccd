// queries and keys, each head normed and then rotated in halves, from the merged projection.
//
// A simdgroup takes one head of one token: its lanes sum the head's squares, then each turns pairs
// (j, j + HEAD_DIM / 2) by position · base^(-2 j / HEAD_DIM). Heads below HEADS are queries, the
// next KV_HEADS are keys, and the values behind them are not touched. Simdgroups share nothing.
//
// grid [32, HEADS + KV_HEADS, B · L], threadgroup [32, any, 1]; HEAD_DIM is even.
//
// T: type of qkv, norm weights and outputs · HEADS, KV_HEADS, HEAD_DIM: sizes
// OFFSET_PER_ROW: whether every row of the batch has an offset of its own

const int lane = static_cast<int>(thread_index_in_simdgroup);
const int head = static_cast<int>(thread_position_in_grid.y);
const int token = static_cast<int>(thread_position_in_grid.z);
const int length = qkv_shape[1];
const int row = token / length;
const int column = token - row * length;
const int before = static_cast<int>(offset[OFFSET_PER_ROW ? row : 0]);
const float position = static_cast<float>(column + before);

constexpr int HALF = HEAD_DIM / 2;
const bool is_query = head < HEADS;
constexpr int ALL_HEADS = HEADS + 2 * KV_HEADS;
const size_t source = (static_cast<size_t>(token) * ALL_HEADS + head) * HEAD_DIM;
const size_t heads_before = is_query ? static_cast<size_t>(row) * HEADS + head
                                     : static_cast<size_t>(row) * KV_HEADS + (head - HEADS);
const size_t target = (heads_before * static_cast<size_t>(length) + column) * HEAD_DIM;

float squares = 0.0f;
for (int d = lane; d < HEAD_DIM; d += 32) {
  const float value = static_cast<float>(qkv[source + d]);
  squares += value * value;
}
const float mean = metal::simd_sum(squares) / static_cast<float>(HEAD_DIM);
const float inverse = metal::precise::rsqrt(mean + eps);

for (int j = lane; j < HALF; j += 32) {
  float side[2];
  for (int i = 0; i < 2; ++i) {
    const int d = j + i * HALF;
    const float weight = static_cast<float>(is_query ? q_weight[d] : k_weight[d]);
    // Rounded twice, as the norm rounds before and after its weight.
    const T scaled = static_cast<T>(static_cast<float>(qkv[source + d]) * inverse);
    side[i] = static_cast<float>(static_cast<T>(static_cast<float>(scaled) * weight));
  }
  const float fraction = static_cast<float>(j) / static_cast<float>(HALF);
  const float angle = position * metal::precise::exp2(-fraction * log2_base);
  const float cosine = metal::precise::cos(angle);
  const float sine = metal::precise::sin(angle);
  const T turned_left = static_cast<T>(side[0] * cosine - side[1] * sine);
  const T turned_right = static_cast<T>(side[0] * sine + side[1] * cosine);
  if (is_query) {
    queries[target + j] = turned_left;
    queries[target + j + HALF] = turned_right;
  } else {
    keys[target + j] = turned_left;
    keys[target + j + HALF] = turned_right;
  }
}
