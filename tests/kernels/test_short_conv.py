"""The gated short convolution against its sum written out in NumPy."""

import mlx.core as mx
import numpy as np
import pytest
import twins
from models import as_numpy

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.short_conv import short_conv, short_conv_reference

# Relative to the largest output: products are rounded to the dtype once before the float32 sum.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
SIZES = [(1, 1, 4, 3), (2, 7, 5, 3), (3, 1, 33, 4), (1, 50, 64, 2), (2, 3, 8, 6)]  # B, L, D, W


def draw(seed: int, rows: int, length: int, width: int, taps: int) -> tuple[np.ndarray, ...]:
    """in_proj's output [B, L, 3D], taps [D, W], bias [D] and a window [B, W-1, D]."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, 3 * width), (width, taps), (width,), (rows, taps - 1, width)]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def expected(
    bcx: np.ndarray, taps: np.ndarray, bias: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """y[t] = C[t] * (bias + sum_j taps[j] * (B * x)[t - (W - 1) + j]), and the next window."""
    bcx, taps, window = (array.astype(np.float64) for array in (bcx, taps, window))
    gate_in, gate_out, x = np.split(bcx, 3, axis=-1)
    columns = np.concatenate([window, gate_in * x], axis=1)
    count, length = taps.shape[1], x.shape[1]
    y = np.zeros_like(x)
    for t in range(length):
        total = bias + sum(taps[:, j] * columns[:, t + j] for j in range(count))
        y[:, t] = gate_out[:, t] * total
    return y, columns[:, columns.shape[1] - (count - 1) :]


def close(got: mx.array, wanted: np.ndarray, dtype: mx.Dtype = mx.float32) -> None:
    error = np.abs(as_numpy(got) - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_short_conv_equals_the_sum(size: tuple[int, ...], seed: int, dtype: mx.Dtype) -> None:
    arrays = [mx.array(array).astype(dtype) for array in draw(seed, *size)]
    y, window = short_conv(*arrays)
    assert y.dtype == window.dtype == dtype
    wanted, next_window = expected(*(as_numpy(array) for array in arrays))
    close(y, wanted, dtype)
    close(window, next_window, dtype)


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 6], [1, 10], [4, 1, 6], [2, 2, 7]])
def test_chunks_equal_the_whole(chunks: list[int]) -> None:
    bcx, taps, bias, window = (mx.array(array) for array in draw(2, 2, 11, 6, 4))
    whole, last = short_conv(bcx, taps, bias, window)
    parts, begin = [], 0
    for length in chunks:
        y, window = short_conv(bcx[:, begin : begin + length], taps, bias, window)
        parts.append(y)
        begin += length
    np.testing.assert_array_equal(np.array(mx.concatenate(parts, axis=1)), np.array(whole))
    np.testing.assert_array_equal(np.array(window), np.array(last))


def test_padded_rows_equal_their_own_tokens() -> None:
    rows = [(0, 9), (3, 9), (0, 4), (2, 6), (0, 1), (8, 9), (-5, 12), (0, 0), (12, 15)]
    bcx, taps, bias, window = (mx.array(array) for array in draw(3, len(rows), 9, 5, 3))
    start, stop = mx.array([row[0] for row in rows]), mx.array([row[1] for row in rows])
    y, windows = short_conv(bcx, taps, bias, window, start, stop)
    for row, (begin, end) in enumerate(rows):
        begin, end = min(max(begin, 0), 9), min(max(end, 0), 9)
        one = slice(row, row + 1)
        # Padding before the tokens pushes zeros into the window, as a fresh row has them there.
        before = mx.concatenate([window[one], mx.zeros((1, begin, 5))], axis=1)[:, -2:]
        alone, alone_window = short_conv(bcx[one, begin:end], taps, bias, before)
        np.testing.assert_array_equal(np.array(y[one, begin:end]), np.array(alone))
        np.testing.assert_array_equal(np.array(windows[one]), np.array(alone_window))


def test_a_nan_in_the_padding_stays_there() -> None:
    bcx, taps, bias, window = (mx.array(array) for array in draw(4, 1, 6, 4, 3))
    clean, _ = short_conv(bcx[:, 2:], taps, bias, mx.zeros_like(window))
    dirty = mx.concatenate([mx.full((1, 2, 12), float("nan")), bcx[:, 2:]], axis=1)
    y, _ = short_conv(dirty, taps, bias, mx.zeros_like(window), mx.array([2]))
    np.testing.assert_array_equal(np.array(y[:, 2:]), np.array(clean))


def test_no_window_is_a_window_of_zeros() -> None:
    bcx, taps, _, window = (mx.array(array) for array in draw(5, 2, 4, 4, 3))
    fresh, _ = short_conv(bcx, taps)
    zeros, _ = short_conv(bcx, taps, None, mx.zeros_like(window))
    np.testing.assert_array_equal(np.array(fresh), np.array(zeros))


@pytest.mark.skipif(metal.available(), reason="the kernel is there")
def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="short_conv: the Metal kernel cannot run"):
        short_conv(mx.zeros((1, 1, 12)), mx.zeros((4, 3)), use_kernel=True)


@pytest.mark.parametrize(
    ("bcx", "taps", "window", "reason"),
    [
        (mx.zeros((1, 1, 12)), mx.zeros((4, 1)), None, "2 to 16 taps, got 1"),
        (mx.zeros((1, 0, 12)), mx.zeros((4, 3)), None, "no columns"),
        (mx.zeros((1, 1, 12)), mx.zeros((4, 3)), mx.zeros((1, 2, 4), mx.float16), "the window is"),
        (mx.zeros((1, 1, 12), mx.int32), mx.zeros((4, 3)), None, "got mlx.core.int32"),
    ],
)
def test_the_kernel_states_its_limits(
    bcx: mx.array, taps: mx.array, window: mx.array | None, reason: str
) -> None:
    with twins.kernels(), pytest.raises(RuntimeError, match=reason):
        short_conv(bcx, taps, None, window, use_kernel=True)


# What is given beside bcx and taps, and B, L, D, W. One channel, fewer than eight numbers; a last
# chunk of one column; more taps than a chunk has columns; more channels than a group has threads.
KERNEL_CASES = [
    (("bias", "window"), (1, 1, 1, 3)),
    (("window", "start", "stop"), (2, 9, 5, 3)),
    (("bias", "stop"), (3, 17, 2, 12)),
    ((), (1, 1, 259, 3)),
    (("window", "start"), (2, 24, 33, 2)),
]


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize(("given", "size"), KERNEL_CASES)
def test_the_kernel_equals_its_reference(
    given: tuple[str, ...], size: tuple[int, ...], dtype: mx.Dtype
) -> None:
    bcx, taps, bias, window = (mx.array(array).astype(dtype) for array in draw(6, *size))
    rows, length = size[:2]
    rng = np.random.default_rng(7)
    start, stop = (mx.array(rng.integers(-2, length + 3, rows).tolist()) for _ in range(2))
    optional = {"bias": bias, "window": window, "start": start, "stop": stop}
    chosen = {name: optional[name] for name in given}
    wanted = short_conv_reference(bcx, taps, **chosen)
    with twins.kernels():
        got = short_conv(bcx, taps, **chosen, use_kernel=True)
        mx.eval(got)
    twins.same_kind(got, wanted)
    twins.close(got[0], wanted[0])
    np.testing.assert_array_equal(as_numpy(got[1]), as_numpy(wanted[1]))


def test_the_kernel_keeps_a_nan_in_the_padding() -> None:
    bcx, taps, bias, window = (mx.array(array) for array in draw(8, 1, 6, 4, 3))
    dirty = mx.concatenate([mx.full((1, 2, 12), float("nan")), bcx[:, 2:]], axis=1)
    wanted, _ = short_conv_reference(dirty, taps, bias, window, mx.array([2]))
    with twins.kernels():
        y, _ = short_conv(dirty, taps, bias, window, mx.array([2]), use_kernel=True)
        mx.eval(y)
    twins.close(y[:, 2:], wanted[:, 2:])


def test_a_row_that_stops_before_it_starts_keeps_its_window() -> None:
    bcx, taps, _, window = (mx.array(array) for array in draw(5, 3, 4, 8, 3))
    stop = mx.array([-2, 3, -9])
    wanted = short_conv_reference(bcx, taps, None, window, None, stop)
    with twins.kernels():
        got = short_conv(bcx, taps, None, window, None, stop, use_kernel=True)
        mx.eval(got)
    np.testing.assert_array_equal(as_numpy(got[1]), as_numpy(wanted[1]))
    twins.close(got[0], wanted[0])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_products_are_rounded_before_they_are_added(dtype: mx.Dtype) -> None:
    """So a window holds what was added, and a prompt in chunks gives what it gives whole."""
    length, width = 9, 64
    bcx, taps = (mx.array(array).astype(dtype) for array in draw(6, 1, length, width, 3)[:2])
    with twins.kernels(checked=False):
        y, _ = short_conv(bcx, taps, use_kernel=True)
        mx.eval(y)
    gate_in, gate_out, x = np.split(as_numpy(bcx)[0], 3, axis=-1)
    columns = np.pad(twins.rounded(gate_in * x, dtype), ((2, 0), (0, 0)))
    total = np.zeros((length, width), np.float32)
    for tap, weight in enumerate(as_numpy(taps).T):
        total += columns[tap : tap + length] * weight
    np.testing.assert_array_equal(as_numpy(y)[0], twins.rounded(gate_out * total, dtype))
