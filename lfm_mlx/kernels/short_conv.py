"""The gated short convolution of LFM2: y = C * conv(B * x), depthwise and causal.

`B`, `C` and `x` are the three thirds of in_proj's output, in that order; there is no activation.
The state is the last W - 1 columns of `B * x`, the `window`. The last tap meets the current token
(cross-correlation). Sums are taken in float32 and rounded once. Padded columns count as zero, and
do not enter the window.
"""

import mlx.core as mx

from lfm_mlx.kernels import metal


def short_conv(
    bcx: mx.array,
    taps: mx.array,
    bias: mx.array | None = None,
    window: mx.array | None = None,
    start: mx.array | None = None,
    stop: mx.array | None = None,
    *,
    use_kernel: bool | None = None,
) -> tuple[mx.array, mx.array]:
    """Convolve L new columns after the W - 1 of `window`, gate them, and move the window on.

    Row b's columns start[b] to stop[b] (exclusive, either may lie outside 0..L) are its tokens, the
    others are padding.

    Shapes:
        bcx: [B, L, 3D] · taps: [D, W] · bias: [D] · window: [B, W-1, D], zeros when None
        start, stop: [B] integers, 0 and L when None
        returns y [B, L, D] in bcx's dtype and the window after the last token [B, W-1, D]
    """
    metal.choose("short_conv", use_kernel, "this version has its reference only")
    return short_conv_reference(bcx, taps, bias, window, start, stop)


def short_conv_reference(
    bcx: mx.array,
    taps: mx.array,
    bias: mx.array | None = None,
    window: mx.array | None = None,
    start: mx.array | None = None,
    stop: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`short_conv` in MLX operations."""
    gate_in, gate_out, x = mx.split(bcx, 3, axis=-1)
    batch, length, width = x.shape
    num_taps = taps.shape[1]
    product = gate_in * x
    if start is not None or stop is not None:
        product = mx.where(_inside(length, start, stop)[..., None], product, 0)
    if window is None:
        window = mx.zeros((batch, num_taps - 1, width), product.dtype)
    columns = mx.concatenate([window, product], axis=1)  # [B, W-1+L, D]
    shifted = (columns[:, tap : tap + length].astype(mx.float32) for tap in range(num_taps))
    total = sum(part * taps[:, tap].astype(mx.float32) for tap, part in enumerate(shifted))
    if bias is not None:
        total = total + bias.astype(mx.float32)
    y = (gate_out * total).astype(bcx.dtype)
    return y, _last_columns(columns, num_taps - 1, length, stop)


def _inside(length: int, start: mx.array | None, stop: mx.array | None) -> mx.array:
    """[B, L] booleans: which columns are tokens."""
    column = mx.arange(length)
    after = None if start is None else column >= start[:, None]
    before = None if stop is None else column < stop[:, None]
    if after is None or before is None:
        found = before if after is None else after
        assert found is not None, "_inside is asked only where a bound is given"
        return found
    return after & before


def _last_columns(columns: mx.array, count: int, length: int, stop: mx.array | None) -> mx.array:
    """The `count` columns that end with each row's last token."""
    if stop is None:
        return columns[:, length:]
    ends = mx.clip(stop, 0, length)
    return mx.take_along_axis(columns, (ends[:, None] + mx.arange(count))[..., None], axis=1)
