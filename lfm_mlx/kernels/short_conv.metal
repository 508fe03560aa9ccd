// y = C * conv(B * x) and the window that follows, from in_proj's output where it lies.
//
// A thread takes one channel of one row and COLUMNS columns, one after another. It walks over the
// columns of [window | B * x] from TAPS - 1 before its first, keeps the last TAPS of them in
// registers, and so reads every column once and its predecessors again. Threads share nothing:
// simdgroups and threadgroups only make neighbours in memory neighbours in time.
//
// grid [D, ceil(L / COLUMNS), B]; nothing has to divide anything.
//
// T: type of bcx, window and outputs · D, TAPS, COLUMNS: sizes
// HAS_BIAS, HAS_WINDOW, HAS_START, HAS_STOP: whether that input is meant, or only fills its place

const int channel = static_cast<int>(thread_position_in_grid.x);
const int first = static_cast<int>(thread_position_in_grid.y) * COLUMNS;
const int row = static_cast<int>(thread_position_in_grid.z);
const int length = bcx_shape[1];

const int start = HAS_START ? static_cast<int>(row_start[row]) : 0;
const int stop = HAS_STOP ? static_cast<int>(row_stop[row]) : length;
const int end = metal::clamp(stop, 0, length);
const float offset = HAS_BIAS ? static_cast<float>(bias[channel]) : 0.0f;

float weight[TAPS];
float seen[TAPS];
for (int tap = 0; tap < TAPS; ++tap) {
  weight[tap] = static_cast<float>(taps[channel * TAPS + tap]);
  seen[tap] = 0.0f;
}

const size_t tokens = static_cast<size_t>(row) * static_cast<size_t>(length);
const size_t windows = static_cast<size_t>(row) * (TAPS - 1);
const int last = metal::min(first + COLUMNS, length) + TAPS - 1;

for (int column = first; column < last; ++column) {
  const int token = column - (TAPS - 1);
  T product = static_cast<T>(0.0f);
  if (token >= 0) {
    if (token >= start && token < stop) {
      const size_t at = (tokens + static_cast<size_t>(token)) * (3 * D) + channel;
      product = static_cast<T>(static_cast<float>(bcx[at]) * static_cast<float>(bcx[at + 2 * D]));
    }
  } else if (HAS_WINDOW) {
    product = static_cast<T>(window[(windows + static_cast<size_t>(column)) * D + channel]);
  }
  for (int tap = 0; tap + 1 < TAPS; ++tap) {
    seen[tap] = seen[tap + 1];
  }
  seen[TAPS - 1] = static_cast<float>(product);

  // The next window is columns end .. end + TAPS - 2; each is this thread's, or its predecessor's.
  const bool mine = token >= first || first == 0;
  if (mine && column >= end && column < end + TAPS - 1) {
    next_window[(windows + static_cast<size_t>(column - end)) * D + channel] = product;
  }
  if (token >= first) {
    float total = 0.0f;
    for (int tap = 0; tap < TAPS; ++tap) {
      total += seen[tap] * weight[tap];
    }
    const size_t at = tokens + static_cast<size_t>(token);
    const float gate = static_cast<float>(bcx[at * (3 * D) + D + channel]);
    y[at * D + channel] = static_cast<T>(gate * (total + offset));
  }
}
