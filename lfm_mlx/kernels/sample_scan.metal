// Of every block of a row's logits: the best weight and where it stands, the sum of the weights'
// exponentials, and the logits' own; and the counts with the token that was drawn last.
//
// A simdgroup takes BLOCK neighbouring logits of one row, of which sample.h makes weights.
// Simdgroups share nothing.
//
// grid [32, ceil(V / BLOCK), B], threadgroup [32, any, 1]; 32 divides BLOCK.
//
// T: type of logits · V, BLOCK: sizes · SETTINGS: floats of a row's settings, see sample.py
// HAS_COUNTS, HAS_BIAS, HAS_MASK: whether that input is meant, or only fills its place

constexpr int BLOCKS = (V + BLOCK - 1) / BLOCK;
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int block = static_cast<int>(thread_position_in_grid.y);
const int row = static_cast<int>(thread_position_in_grid.z);
const device float* setting = settings + row * SETTINGS;
const int drawn = HAS_COUNTS ? static_cast<int>(last[row]) : -1;

float weights[BLOCK / 32];
float values[BLOCK / 32];
float best = -INFINITY;
float peak = -INFINITY;
int place = V;
for (int i = 0; i < BLOCK / 32; ++i) {
  const int here = block * BLOCK + i * 32 + lane;
  weights[i] = -INFINITY;
  values[i] = -INFINITY;
  if (here < V) {
    const size_t at = static_cast<size_t>(row) * V + here;
    int count = 0;
    if (HAS_COUNTS) {
      count = static_cast<int>(counts[at]);
      // An odd number stays the largest, so that counting never wraps.
      count = here == drawn ? metal::min((count | 1) + 2, 65535) : count;
      next_counts[at] = static_cast<ushort>(count);
    }
    values[i] = comparable(static_cast<float>(logits[at]));
    weights[i] = weight_of<HAS_COUNTS, HAS_BIAS, HAS_MASK>(
        logits, bias, allowed, setting, at, count);
    place = weights[i] > best || place == V ? here : place;
    best = metal::max(best, weights[i]);
    peak = metal::max(peak, values[i]);
  }
}
if (!HAS_COUNTS && row == 0 && block == 0 && lane == 0) {
  next_counts[0] = static_cast<ushort>(0);
}

const float top = metal::simd_max(best);
const float highest = metal::simd_max(peak);
const int first = metal::simd_min(best == top ? place : V);
float weight_sum = 0.0f;
float sum = 0.0f;
for (int i = 0; i < BLOCK / 32; ++i) {
  if (block * BLOCK + i * 32 + lane < V) {
    weight_sum += share(weights[i], top, 1.0f);
    sum += share(values[i], highest, 1.0f);
  }
}
weight_sum = metal::simd_sum(weight_sum);
sum = metal::simd_sum(sum);
if (lane == 0) {
  const int at = row * BLOCKS + block;
  const int all = static_cast<int>(threads_per_grid.z) * BLOCKS;
  best_place[at] = first;
  found[at] = top;
  found[all + at] = weight_sum;
  found[2 * all + at] = highest;
  found[3 * all + at] = sum;
}
