// The token of each row, and the logarithm of the probability that its logits give it.
//
// A threadgroup takes a row. What is kept are the first in the order of weights, equal ones by
// index: all above a threshold, and a number of those that equal it. To find it, the top_k-th (or
// TRIED-th) largest of the blocks' best weights bounds it from below, since so many are at least as
// large; what reaches the bound is collected and ranked by counting. Where that is more than ROOM,
// or less than top_p's mass, the threshold is found bit by bit over all weights. Then one number
// between 0 and 1 picks from the kept ones, laid out in the vocabulary's order.
//
// grid [THREADS, B, 1], threadgroup [THREADS, 1, 1]; 32 divides THREADS and BLOCK. Threadgroup
// memory is BLOCKS + 2 ROOM + 4 THREADS / 32 + 1 words.
//
// T: type of logits · V, BLOCK, ROOM, THREADS, TRIED: sizes · SETTINGS: of a row, see sample.py
// HAS_COUNTS, HAS_BIAS, HAS_MASK: whether that input is meant, or only fills its place

constexpr int BLOCKS = (V + BLOCK - 1) / BLOCK;
constexpr int GROUPS = THREADS / 32;
constexpr int EACH = (BLOCKS + GROUPS - 1) / GROUPS;

threadgroup float tops[BLOCKS];
threadgroup float value[ROOM];
threadgroup float mass[ROOM];
threadgroup float sums[GROUPS];
threadgroup float others[GROUPS];
threadgroup int counted[GROUPS];
threadgroup int places[GROUPS];
threadgroup float bound[1];

const int me = static_cast<int>(thread_index_in_threadgroup);
const int lane = static_cast<int>(thread_index_in_simdgroup);
const int group = static_cast<int>(simdgroup_index_in_threadgroup);
const int row = static_cast<int>(threadgroup_position_in_grid.y);
const int all = static_cast<int>(threads_per_grid.y) * BLOCKS;
const size_t begin = static_cast<size_t>(row) * V;
const device float* setting = settings + row * SETTINGS;
const float temperature = setting[0];
const float top_p = setting[1];
const int limit = setting[6] > 0.0f ? metal::min(static_cast<int>(setting[6]), V) : V;
// Each simdgroup walks over a run of blocks.
const int run = group * EACH;
const int run_end = metal::min(run + EACH, BLOCKS);

float best = -INFINITY;
float peak = -INFINITY;
for (int b = me; b < BLOCKS; b += THREADS) {
  tops[b] = found[row * BLOCKS + b];
  best = metal::max(best, tops[b]);
  peak = metal::max(peak, found[2 * all + row * BLOCKS + b]);
}
best = threadgroup_max<GROUPS>(best, sums, lane, group);
peak = threadgroup_max<GROUPS>(peak, sums, lane, group);

int chosen = V;
float total = 0.0f;
float sum = 0.0f;
for (int b = me; b < BLOCKS; b += THREADS) {
  const int at = row * BLOCKS + b;
  chosen = tops[b] == best ? metal::min(chosen, static_cast<int>(best_place[at])) : chosen;
  total += found[all + at] * share(tops[b], best, 1.0f);
  sum += found[3 * all + at] * share(found[2 * all + at], peak, 1.0f);
}
chosen = threadgroup_min<GROUPS>(chosen, counted, lane, group);
total = threadgroup_sum<GROUPS>(total, sums, lane, group);
sum = threadgroup_sum<GROUPS>(sum, sums, lane, group);

if (temperature > 0.0f) {
  const float floor = best + setting[2];
  const float wanted = top_p * total;
  float threshold = floor;
  int equals = V;
  if (limit < V || top_p < 1.0f) {
    const int tried = limit < V ? limit : TRIED;
    if (me == 0) {
      bound[0] = -INFINITY;
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    for (int b = me; b < BLOCKS; b += THREADS) {
      int rank = 0;
      for (int other = 0; other < BLOCKS; ++other) {
        rank += tops[other] > tops[b] || (tops[other] == tops[b] && other < b) ? 1 : 0;
      }
      if (rank == tried - 1) {
        bound[0] = tops[b];
      }
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const float least = metal::max(bound[0], floor);

    // Twice over the run: counted, then put in place.
    int before = 0;
    int candidates = 0;
    for (int pass = 0; pass < 2; ++pass) {
      int number = before;
      for (int b = run; b < run_end; ++b) {
        if (tops[b] >= least && number <= ROOM) {
          for (int here = b * BLOCK + lane; here < (b + 1) * BLOCK; here += 32) {
            const float weight = weight_at<HAS_COUNTS, HAS_BIAS, HAS_MASK, V>(
                logits, counts, bias, allowed, setting, begin, here);
            const int hit = here < V && weight >= least ? 1 : 0;
            const int at = number + metal::simd_prefix_exclusive_sum(hit);
            if (pass == 1 && hit == 1 && at < ROOM) {
              value[at] = weight;
              mass[at] = share(weight, best, 1.0f);
            }
            number += metal::simd_sum(hit);
          }
        }
      }
      if (pass == 0) {
        if (lane == 0) {
          counted[group] = number;
        }
        threadgroup_barrier(metal::mem_flags::mem_threadgroup);
        for (int g = 0; g < GROUPS; ++g) {
          before += g < group ? counted[g] : 0;
          candidates += counted[g];
        }
      }
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);

    bool complete = false;
    if (candidates <= ROOM) {
      bool stays[ROOM / THREADS];
      float reached = 0.0f;
      float lowest = INFINITY;
      for (int i = 0; i < ROOM / THREADS; ++i) {
        const int mine = me + i * THREADS;
        stays[i] = false;
        if (mine < candidates) {
          int rank = 0;
          float ahead = 0.0f;
          for (int other = 0; other < candidates; ++other) {
            const bool earlier = value[other] > value[mine] ||
                (value[other] == value[mine] && other < mine);
            rank += earlier ? 1 : 0;
            ahead += earlier ? mass[other] : 0.0f;
          }
          reached += mass[mine];
          stays[i] = rank < limit && (top_p == 1.0f || ahead < wanted);
          lowest = stays[i] ? metal::min(lowest, value[mine]) : lowest;
        }
      }
      reached = threadgroup_sum<GROUPS>(reached, sums, lane, group);
      threshold = threadgroup_min<GROUPS>(lowest, sums, lane, group);
      int number = 0;
      for (int i = 0; i < ROOM / THREADS; ++i) {
        number += stays[i] && value[me + i * THREADS] == threshold ? 1 : 0;
      }
      equals = threadgroup_sum<GROUPS>(number, counted, lane, group);
      // Whether all that is kept is among the candidates.
      complete = candidates >= limit || least == floor || (top_p < 1.0f && reached >= wanted);
    }
    if (!complete) {
      // The largest key of which enough are as large: enough for top_k, or for top_p's mass. The
      // last round counts what is above it.
      uint key = 0u;
      int above = 0;
      float mass_above = 0.0f;
      for (int bit = 31; bit >= -1; --bit) {
        const uint trial = bit >= 0 ? key | (1u << static_cast<uint>(bit)) : key + 1u;
        int number = 0;
        float reached = 0.0f;
        for (int here = me; here < V; here += THREADS) {
          const float weight = weight_at<HAS_COUNTS, HAS_BIAS, HAS_MASK, V>(
              logits, counts, bias, allowed, setting, begin, here);
          const bool counts_in = key_of(weight) >= trial;
          number += counts_in ? 1 : 0;
          reached += counts_in ? share(weight, best, 1.0f) : 0.0f;
        }
        above = threadgroup_sum<GROUPS>(number, counted, lane, group);
        mass_above = threadgroup_sum<GROUPS>(reached, sums, lane, group);
        const bool enough = above >= limit || (top_p < 1.0f && mass_above >= wanted);
        key = bit >= 0 && enough ? trial : key;
      }
      threshold = value_of(key);
      equals = limit - above;
      const float each = share(threshold, best, 1.0f);
      if (top_p < 1.0f && each > 0.0f) {
        const float needed = metal::ceil((wanted - mass_above) / each);
        equals = needed < static_cast<float>(equals) ? static_cast<int>(needed) : equals;
      }
      if (threshold < floor) {
        threshold = floor;
        equals = V;
      }
    }
  }

  // How many equal ones come before the run; then what its kept ones sum up to, and where among
  // them the target lies.
  int same = 0;
  for (int b = run; b < run_end; ++b) {
    for (int here = b * BLOCK + lane; tops[b] >= threshold && here < (b + 1) * BLOCK; here += 32) {
      const float weight = weight_at<HAS_COUNTS, HAS_BIAS, HAS_MASK, V>(
          logits, counts, bias, allowed, setting, begin, here);
      same += here < V && weight == threshold ? 1 : 0;
    }
  }
  same = metal::simd_sum(same);
  if (lane == 0) {
    counted[group] = same;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  int same_before = 0;
  for (int g = 0; g < group; ++g) {
    same_before += counted[g];
  }
  int hit = -1;
  float passed = 0.0f;
  float target = INFINITY;
  for (int pass = 0; pass < 2; ++pass) {
    int number = same_before;
    for (int b = run; b < run_end; ++b) {
      if (tops[b] >= threshold && passed <= target) {
        for (int i = 0; i < BLOCK; i += 32) {
          const int here = b * BLOCK + i + lane;
          const float weight = weight_at<HAS_COUNTS, HAS_BIAS, HAS_MASK, V>(
              logits, counts, bias, allowed, setting, begin, here);
          const int equal = here < V && weight == threshold ? 1 : 0;
          const int equals_before = number + metal::simd_prefix_exclusive_sum(equal);
          number += metal::simd_sum(equal);
          const bool kept = here < V &&
              (weight > threshold || (equal == 1 && equals_before < equals));
          const float part = kept ? share(weight, best, temperature) : 0.0f;
          const float reach = passed + metal::simd_prefix_inclusive_sum(part);
          // The first whose reach exceeds the target; until then the last one kept, since by
          // rounding none may exceed it.
          const int first = metal::simd_min(part > 0.0f && reach > target ? here : V);
          const int latest = metal::simd_max(part > 0.0f ? here : -1);
          const float more = metal::simd_sum(part);
          if (passed <= target) {
            hit = first < V ? first : metal::max(hit, latest);
            passed = first < V ? INFINITY : passed + more;
          }
        }
      }
    }
    if (pass == 0) {
      if (lane == 0) {
        sums[group] = passed;
      }
      threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      float whole = 0.0f;
      passed = 0.0f;
      for (int g = 0; g < GROUPS; ++g) {
        passed += g < group ? sums[g] : 0.0f;
        whole += sums[g];
      }
      target = uniform[row] * whole;
      hit = -1;
    }
  }
  if (lane == 0) {
    places[group] = hit;
    others[group] = passed;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  bool settled = false;
  for (int g = 0; g < GROUPS; ++g) {
    chosen = settled || places[g] < 0 ? chosen : places[g];
    settled = settled || others[g] == INFINITY;
  }
}

if (me == 0) {
  const float logit = comparable(static_cast<float>(logits[begin + chosen]));
  token[row] = static_cast<uint>(chosen);
  logprob[row] = (logit == peak ? 0.0f : logit - peak) - metal::precise::log(sum);
}
