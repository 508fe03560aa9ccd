// What both launches of sample do with a logit.

// Equal floats are the same float, and what is not a number is never drawn.
inline float comparable(float weight) {
  return weight == weight ? weight + 0.0f : -INFINITY;
}

// A logit after penalties, bias and mask. Of `count`, bit 0 says that the token was read or drawn,
// the bits above how often it was drawn. HAS_COUNTS, HAS_BIAS, HAS_MASK: whether that is meant.
template <bool HAS_COUNTS, bool HAS_BIAS, bool HAS_MASK, typename T, typename A, typename M>
inline float weight_of(
    const device T* logits,
    const device A* bias,
    const device M* allowed,
    const device float* setting,
    size_t at,
    int count) {
  float weight = static_cast<float>(logits[at]);
  if (HAS_COUNTS && (count & 1) != 0) {
    weight = weight > 0.0f ? weight / setting[3] : weight * setting[3];
  }
  if (HAS_COUNTS && count > 1) {
    weight -= setting[4] + setting[5] * static_cast<float>(count >> 1);
  }
  if (HAS_BIAS) {
    weight += static_cast<float>(bias[at]);
  }
  if (HAS_MASK) {
    weight = static_cast<bool>(allowed[at]) ? weight : -INFINITY;
  }
  return comparable(weight);
}

// The weight of the token `here` of a row that begins at `begin`; nothing lies past the last one.
template <bool HAS_COUNTS, bool HAS_BIAS, bool HAS_MASK, int V, typename T, typename C, typename A,
    typename M>
inline float weight_at(
    const device T* logits,
    const device C* counts,
    const device A* bias,
    const device M* allowed,
    const device float* setting,
    size_t begin,
    int here) {
  if (here >= V) {
    return -INFINITY;
  }
  const int count = HAS_COUNTS ? static_cast<int>(counts[begin + here]) : 0;
  return weight_of<HAS_COUNTS, HAS_BIAS, HAS_MASK>(
      logits, bias, allowed, setting, begin + here, count);
}

// e^((value - top) / temperature), and 1 for the top, infinite or not.
inline float share(float value, float top, float temperature) {
  return value == top ? 1.0f : metal::precise::exp((value - top) / temperature);
}

// Whole numbers in the floats' order, and back.
inline uint key_of(float value) {
  const uint bits = as_type<uint>(value);
  return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}
inline float value_of(uint key) {
  return as_type<float>((key & 0x80000000u) != 0u ? key & 0x7fffffffu : ~key);
}

// Over all GROUPS simdgroups of a threadgroup, of which every thread calls it.
template <int GROUPS, typename U>
inline U threadgroup_sum(U value, threadgroup U* parts, int lane, int group) {
  const U own = metal::simd_sum(value);
  if (lane == 0) {
    parts[group] = own;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  U all = parts[0];
  for (int g = 1; g < GROUPS; ++g) {
    all += parts[g];
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return all;
}

template <int GROUPS, typename U>
inline U threadgroup_min(U value, threadgroup U* parts, int lane, int group) {
  const U own = metal::simd_min(value);
  if (lane == 0) {
    parts[group] = own;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  U all = parts[0];
  for (int g = 1; g < GROUPS; ++g) {
    all = metal::min(all, parts[g]);
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return all;
}

template <int GROUPS, typename U>
inline U threadgroup_max(U value, threadgroup U* parts, int lane, int group) {
  const U own = metal::simd_max(value);
  if (lane == 0) {
    parts[group] = own;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  U all = parts[0];
  for (int g = 1; g < GROUPS; ++g) {
    all = metal::max(all, parts[g]);
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return all;
}
