"""A projection of few tokens, with what surrounds it: y = x Wᵀ.

The norm before it, and SwiGLU of its two halves or the residual after it, fold into its launch:

    y = residual + silu(g) * u,  [g, u] = rms_norm(x) Wᵀ      (each part where it is asked for)

The kernel reads weights as MLX's own `qmv` and `gemv` do, with MLX's helpers for packed ones, and
each weight once for up to 4 tokens. Asked for nothing but the product, None stays on MLX's
operation, which is one launch too. Limits: at most 8 tokens; float32, float16 or bfloat16; weights
dense in x's dtype, or affine of 4, 5, 6 or 8 bits where MLX's own helpers are installed.
"""

from functools import partial

import mlx.core as mx

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import Matrix

MAX_TOKENS = 8
# Tokens of which a simdgroup keeps the inputs in registers; it reads its weights once for them all.
MAX_TILE = 4
# Rows of weights that a simdgroup reads side by side, as MLX's own matrix-vector products do.
ROWS = 4
# Simdgroups in a threadgroup: they share nothing.
SIMDGROUPS = 2


def projection(
    x: mx.array,
    matrix: Matrix,
    *,
    norm_weight: mx.array | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
    residual: mx.array | None = None,
    use_kernel: bool | None = None,
) -> mx.array:
    """Project x, normed first where `norm_weight` is given.

    Shapes:
        x: [..., K] · matrix: [N, K], with `swiglu` [2N, K], gate before up · norm_weight: [K]
        residual: [..., N] · returns [..., N]
    """
    plain = norm_weight is None and residual is None and not swiglu
    asked = False if use_kernel is None and plain else use_kernel
    run = projection_reference
    refusal = _refusal(x, matrix, norm_weight, swiglu, residual)
    if metal.choose("projection", asked, refusal):
        run = _projection_metal
    return run(x, matrix, norm_weight=norm_weight, eps=eps, swiglu=swiglu, residual=residual)


@partial(mx.compile, shapeless=True)
def silu_times(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, elementwise, in one launch."""
    return gate * mx.sigmoid(gate) * up


def projection_reference(
    x: mx.array,
    matrix: Matrix,
    *,
    norm_weight: mx.array | None = None,
    eps: float = 1e-5,
    swiglu: bool = False,
    residual: mx.array | None = None,
) -> mx.array:
    """`projection` in MLX operations."""
    y = matrix.times(x if norm_weight is None else mx.fast.rms_norm(x, norm_weight, eps))
    if swiglu:
        y = silu_times(*mx.split(y, 2, axis=-1))
    return y if residual is None else residual + y


def _refusal(
    x: mx.array,
    matrix: Matrix,
    norm_weight: mx.array | None,
    swiglu: bool,
    residual: mx.array | None,
) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    width = x.shape[-1]
    if not width <= x.size <= MAX_TOKENS * width:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {x.size // width}"
    if swiglu and matrix.shape[0] % 2:
        return f"SwiGLU takes an even number of rows, got {matrix.shape[0]}"
    given = [array.dtype for array in (x, norm_weight, residual) if array is not None]
    if x.dtype not in metal.DTYPES or any(dtype != x.dtype for dtype in given):
        return "it takes x, norm and residual of one dtype, float32, float16 or bfloat16"
    if matrix.scales is not None and not metal.weight_reader(True):
        return "MLX's Metal helpers for packed weights are not installed"
    return matrix.refusal(x.dtype)


def _projection_metal(
    x: mx.array,
    matrix: Matrix,
    *,
    norm_weight: mx.array | None,
    eps: float,
    swiglu: bool,
    residual: mx.array | None,
) -> mx.array:
    """`projection` in one launch: a simdgroup for each ROWS rows and each tile of tokens."""
    rows, width = matrix.shape
    tokens = x.size // width
    tiles = -(-tokens // MAX_TILE)
    tile = -(-tokens // tiles)
    outputs = rows // 2 if swiglu else rows
    run = metal.kernel(
        "projection",
        f"projection_m{MAX_TOKENS}",
        inputs=("x", "norm_weight", "residual", "eps", "weight", "scales", "biases"),
        outputs=("y",),
        header=metal.weight_reader(matrix.scales is not None),
    )
    (y,) = run(
        # What is absent needs an array in its place, which the kernel does not read.
        inputs=[
            *(x, x if norm_weight is None else norm_weight, x if residual is None else residual),
            *(eps, *matrix.parts()),
        ],
        template=[
            *(("T", x.dtype), ("M", tokens), ("N", outputs), ("K", width)),
            *(("ROWS", ROWS), ("TILE", tile), ("NORM", norm_weight is not None)),
            *(("SWIGLU", swiglu), ("RESIDUAL", residual is not None)),
            # More tokens leave fewer registers for each.
            *matrix.constants(max_packs=2 if tile <= 2 else 1),
        ],
        # Tiles are the fastest dimension, so that those of the same weights read them together.
        grid=(metal.SIMD_WIDTH * tiles, -(-rows // ROWS), 1),
        threadgroup=(metal.SIMD_WIDTH, SIMDGROUPS, 1),
        output_shapes=[(*x.shape[:-1], outputs)],
        output_dtypes=[x.dtype],
    )
    return y
