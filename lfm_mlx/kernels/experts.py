"""The chosen experts of a sparse layer: their feed-forwards, weighed, summed and added.

    y = residual + sum over chosen e of weight_e * down_e (silu(gate_e x) * (up_e x))

The kernels are two launches: gate and up with SwiGLU, reading x once; then down, the weighted sum
and the residual. Sums are float32, and round once at the end of each launch. They win while tokens
share few experts; beyond, the operations sort by expert, and each expert is read once. Limits: at
most 8 tokens and 16 experts a token; float32, float16 or bfloat16; weights dense in x's dtype,
or affine of 4, 5, 6 or 8 bits where MLX's own helpers are installed.
"""

from collections.abc import Callable

import mlx.core as mx

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import MIN_SIZE, Matrix
from lfm_mlx.kernels.projection import silu_times

MAX_TOKENS = 8
MAX_EXPERTS_PER_TOKEN = 16
# Rows of weights that a simdgroup reads side by side, as MLX's own matrix-vector products do.
ROWS = 4
FEATURES = ROWS // 2
# Simdgroups in a threadgroup of the first launch: they share nothing.
SIMDGROUPS = 2
# From this many (token, expert) pairs on, sorting them by expert pays.
SORTED_FROM = 64

# A product of rows with the matrices that indices name; the last says whether these are sorted.
Product = Callable[[mx.array, mx.array, bool], mx.array]


def experts(
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    residual: mx.array | None = None,
    *,
    use_kernel: bool | None = None,
) -> mx.array:
    """Each token through the experts chosen for it.

    Shapes:
        x: [..., D] · indices, weights: [..., K] · gate, up: [E, F, D] · down: [E, D, F]
        residual: [..., D] or None · returns [..., D]
    """
    run = experts_reference
    refusal = _refusal(x, indices, weights, gate, up, down, residual)
    if metal.choose("experts", use_kernel, refusal):
        run = _experts_metal
    return run(x, indices, weights, gate, up, down, residual)


def experts_reference(
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    residual: mx.array | None = None,
) -> mx.array:
    """`experts` in MLX operations."""
    y = through_chosen(x, indices, gate.chosen_times, up.chosen_times, down.chosen_times)
    y = (y * weights[..., None]).sum(axis=-2)
    return y if residual is None else residual + y


def through_chosen(
    x: mx.array, indices: mx.array, gate: Product, up: Product, down: Product
) -> mx.array:
    """Each token through each of the experts chosen for it, sorted by expert when there are many.

    Shapes: x [..., D], indices [..., K], returns [..., K, D]
    """

    def feed_forward(rows: mx.array, chosen: mx.array, in_order: bool) -> mx.array:
        h = silu_times(gate(rows, chosen, in_order), up(rows, chosen, in_order))
        return down(h, chosen, in_order)

    if indices.size < SORTED_FROM:
        return feed_forward(x[..., None, None, :], indices, False).squeeze(-2)
    flat = indices.flatten()  # [tokens K]
    order = mx.argsort(flat)
    rows = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]
    y = feed_forward(rows, flat[order], True)
    return y[mx.argsort(order)].reshape(*indices.shape, -1)


def _refusal(
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    residual: mx.array | None,
) -> str | None:
    """Why the kernels cannot take these inputs, None if they can."""
    width, chosen = x.shape[-1], indices.shape[-1]
    if not width <= x.size <= MAX_TOKENS * width:
        return f"they take 1 to {MAX_TOKENS} tokens, got {x.size // width}"
    if not 1 <= chosen <= MAX_EXPERTS_PER_TOKEN:
        return f"they take 1 to {MAX_EXPERTS_PER_TOKEN} experts a token, got {chosen}"
    activations = (x, weights) if residual is None else (x, weights, residual)
    if any(array.dtype != x.dtype for array in activations) or x.dtype not in metal.DTYPES:
        return "they take activations of one dtype, float32, float16 or bfloat16"
    if down.shape[-1] < MIN_SIZE:
        return f"they take {MIN_SIZE} features or more, got {down.shape[-1]}"
    packed = gate.scales is not None or down.scales is not None
    if packed and not metal.weight_reader(True):
        return "MLX's Metal helpers for packed weights are not installed"
    unreadable = next(filter(None, (m.refusal(x.dtype) for m in (gate, up, down))), None)
    if unreadable is None and gate.constants() != up.constants():
        return "gate and up are packed differently"
    return unreadable


def _experts_metal(
    x: mx.array,
    indices: mx.array,
    weights: mx.array,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    residual: mx.array | None,
) -> mx.array:
    """`experts` in two launches."""
    _, features, width = gate.shape
    chosen = indices.shape[-1]
    tokens = x.size // width
    raise_ = metal.kernel(
        "experts_up",
        f"experts_up_m{MAX_TOKENS}",
        inputs=(
            *("x", "indices", "gate_weight", "gate_scales", "gate_biases"),
            *("up_weight", "up_scales", "up_biases"),
        ),
        outputs=("h",),
        header=metal.weight_reader(gate.scales is not None),
    )
    (h,) = raise_(
        inputs=[x, indices, *gate.parts(), *up.parts()],
        template=[
            *(("T", x.dtype), ("D", width), ("F", features), ("K", chosen)),
            *(("FEATURES", FEATURES), *gate.constants()),
        ],
        # Pairs are the fastest dimension: tokens that share an expert read it about together.
        grid=(metal.SIMD_WIDTH * tokens * chosen, -(-features // FEATURES), 1),
        threadgroup=(metal.SIMD_WIDTH, SIMDGROUPS, 1),
        output_shapes=[(*indices.shape, features)],
        output_dtypes=[x.dtype],
    )
    lower = metal.kernel(
        "experts_down",
        f"experts_down_m{MAX_TOKENS}_k{MAX_EXPERTS_PER_TOKEN}",
        inputs=(
            *("h", "indices", "weights", "residual"),
            *("down_weight", "down_scales", "down_biases"),
        ),
        outputs=("y",),
        header=metal.weight_reader(down.scales is not None),
    )
    (y,) = lower(
        # What is absent needs an array in its place, which the kernel does not read.
        inputs=[h, indices, weights, h if residual is None else residual, *down.parts()],
        template=[
            *(("T", x.dtype), ("D", width), ("F", features), ("K", chosen), ("ROWS", ROWS)),
            *(("HAS_RESIDUAL", residual is not None), *down.constants()),
        ],
        grid=(metal.SIMD_WIDTH * tokens, chosen, -(-width // ROWS)),
        threadgroup=(metal.SIMD_WIDTH, chosen, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y
