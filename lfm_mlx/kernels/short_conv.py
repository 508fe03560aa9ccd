"""The gated short convolution of LFM2: y = C * conv(B * x), depthwise and causal.

`B`, `C` and `x` are the three thirds of in_proj's output, in that order; there is no activation.
The state is the last W - 1 columns of `B * x`, the `window`. The last tap meets the current token
(cross-correlation). Sums are taken in float32 and rounded once. Padded columns count as zero, and
do not enter the window.

The kernel is one launch for any L, and reads B, C and x where in_proj left them. Limits: float32,
float16 or bfloat16, a window of bcx's dtype, 2 to 16 taps.
"""

import mlx.core as mx

from lfm_mlx.kernels import metal

# How many columns one thread computes: each chunk reads W - 1 columns of the chunk before it again.
COLUMNS = 8
MAX_TAPS = 16


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
        bcx: [B, L, 3D] · taps: [D, W] · bias: [D] · window: [B, W-1, D], zeros if None
        start, stop: [B] integers, 0 and L if None
        returns y [B, L, D] in bcx's dtype and the window after the last token [B, W-1, D]
    """
    run = short_conv_reference
    if metal.choose("short_conv", use_kernel, _refusal(bcx, taps, bias, window)):
        run = _short_conv_metal
    return run(bcx, taps, bias, window, start, stop)


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
    rows = (num_taps - 1 + length) * width
    seen = mx.as_strided(columns, (batch, length, num_taps, width), (rows, width, width, 1))
    total = (seen.astype(mx.float32) * taps.T.astype(mx.float32)).sum(axis=2)  # [B, L, D]
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


def _refusal(
    bcx: mx.array, taps: mx.array, bias: mx.array | None, window: mx.array | None
) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    if not 2 <= taps.shape[1] <= MAX_TAPS:
        return f"it takes 2 to {MAX_TAPS} taps, got {taps.shape[1]}"
    if bcx.size == 0:
        return "there are no columns"
    if window is not None and window.dtype != bcx.dtype:
        return f"the window is {window.dtype}, bcx is {bcx.dtype}"
    arrays = (bcx, taps) if bias is None else (bcx, taps, bias)
    odd = next((array.dtype for array in arrays if array.dtype not in metal.DTYPES), None)
    return None if odd is None else f"it takes float32, float16 and bfloat16, got {odd}"


def _short_conv_metal(
    bcx: mx.array,
    taps: mx.array,
    bias: mx.array | None,
    window: mx.array | None,
    start: mx.array | None,
    stop: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`short_conv` in one launch: a thread for each channel of each COLUMNS columns of a row."""
    batch, length, _ = bcx.shape
    width, num_taps = taps.shape
    optional = {"BIAS": bias, "WINDOW": window, "START": start, "STOP": stop}
    run = metal.kernel(
        "short_conv",
        f"short_conv_w{MAX_TAPS}",
        inputs=("bcx", "taps", "bias", "window", "row_start", "row_stop"),
        outputs=("y", "next_window"),
    )
    y, next_window = run(
        # What is absent needs an array in its place, which the kernel does not read.
        inputs=[bcx, taps, *(taps if array is None else array for array in optional.values())],
        template=[
            ("T", bcx.dtype),
            ("D", width),
            ("TAPS", num_taps),
            ("COLUMNS", COLUMNS),
            *((f"HAS_{name}", array is not None) for name, array in optional.items()),
        ],
        grid=(width, -(-length // COLUMNS), batch),
        threadgroup=(256, 1, 1),
        output_shapes=[(batch, length, width), (batch, num_taps - 1, width)],
        output_dtypes=[bcx.dtype, bcx.dtype],
    )
    return y, next_window
