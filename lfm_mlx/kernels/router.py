"""The router of LFM2's sparse layers: biased choice, unbiased weights.

    s = sigmoid(W x);  chosen = top K of s + expert_bias;  weight_k = s_k / (sum of chosen s + 1e-6)

The bias moves the choice only and never the weights; the sum with it is taken in float32. There is
no softmax. Among equal scores the expert with the lower index wins.

`norm_router` takes the layer's norm and the gate's projection with it: one launch instead of a
dozen, most of which touch 32 numbers or 4. Limits of its kernel: norm and gate in x's dtype
(float32, float16 or bfloat16), or the gate in 8 bits, as mlx-lm packs it; at most 64 tokens
(beyond, the gate is a matrix product), a width of at most 4096 and at most 512 experts.
"""

import mlx.core as mx

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import MIN_SIZE, Matrix

EPSILON = 1e-6
MAX_TOKENS = 64
MAX_WIDTH = 4096
SIMDGROUPS = 16
MAX_EXPERTS = metal.SIMD_WIDTH * SIMDGROUPS
# Neighbouring elements that a lane reads at once.
VALUES = 4


def router(
    logits: mx.array,
    expert_bias: mx.array | None,
    experts_per_token: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    use_kernel: bool | None = None,
) -> tuple[mx.array, mx.array]:
    """Choose each token's experts and their weights.

    Shapes:
        logits: [..., E], the gate's output · expert_bias: [E] float32 or None
        returns indices [..., K] (uint32, best first) and weights [..., K] in logits' dtype
    """
    metal.choose("router", use_kernel, "this version has its reference only")
    return router_reference(
        logits, expert_bias, experts_per_token, normalize=normalize, scale=scale
    )


def router_reference(
    logits: mx.array,
    expert_bias: mx.array | None,
    experts_per_token: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """`router` in MLX operations."""
    scores = mx.sigmoid(logits)
    biased = scores.astype(mx.float32)
    if expert_bias is not None:
        biased = biased + expert_bias
    # A stable sort, so that ties go to the lower index on every device.
    indices = mx.argsort(mx.stop_gradient(-biased), axis=-1)[..., :experts_per_token]
    weights = mx.take_along_axis(scores, indices, axis=-1).astype(mx.float32)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + EPSILON)
    if scale != 1.0:
        weights = weights * scale
    return indices, weights.astype(logits.dtype)


def norm_router(
    x: mx.array,
    norm_weight: mx.array,
    eps: float,
    gate: Matrix,
    expert_bias: mx.array | None,
    experts_per_token: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    use_kernel: bool | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Norm each token, and choose its experts and their weights from the normed token.

    Shapes:
        x: [..., D] · norm_weight: [D] · gate: [E, D] · expert_bias: [E] float32 or None
        returns normed x [..., D], indices [..., K] (uint32, best first) and weights [..., K]
    """
    run = norm_router_reference
    refusal = _refusal(x, norm_weight, gate, experts_per_token)
    if metal.choose("norm_router", use_kernel, refusal):
        run = _norm_router_metal
    return run(
        x, norm_weight, eps, gate, expert_bias, experts_per_token, normalize=normalize, scale=scale
    )


def norm_router_reference(
    x: mx.array,
    norm_weight: mx.array,
    eps: float,
    gate: Matrix,
    expert_bias: mx.array | None,
    experts_per_token: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """`norm_router` in MLX operations."""
    normed = mx.fast.rms_norm(x, norm_weight, eps)
    indices, weights = router_reference(
        gate.times(normed), expert_bias, experts_per_token, normalize=normalize, scale=scale
    )
    return normed, indices, weights


def _refusal(
    x: mx.array, norm_weight: mx.array, gate: Matrix, experts_per_token: int
) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    num_experts, width = gate.shape
    if x.dtype not in metal.DTYPES or x.dtype != norm_weight.dtype:
        return (
            "it takes x and norm of one dtype, float32, float16 or bfloat16; got "
            f"{x.dtype} and {norm_weight.dtype}"
        )
    if gate.scales is not None and gate.bits != 8:
        return f"it takes a gate of floats or 8 bits, got {gate.bits} bits"
    if not width <= x.size <= MAX_TOKENS * width:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {x.size // width}"
    if width > MAX_WIDTH or num_experts > MAX_EXPERTS:
        return (
            f"it takes a width of at most {MAX_WIDTH} and {MAX_EXPERTS} experts, "
            f"got {width} and {num_experts}"
        )
    if not 1 <= experts_per_token <= num_experts:
        return f"it chooses 1 to {num_experts} experts, got {experts_per_token}"
    dense = gate.scales is None and gate.weight.dtype == x.dtype
    return None if dense and gate.weight.size >= MIN_SIZE else gate.refusal(x.dtype)


def _norm_router_metal(
    x: mx.array,
    norm_weight: mx.array,
    eps: float,
    gate: Matrix,
    expert_bias: mx.array | None,
    experts_per_token: int,
    *,
    normalize: bool,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """`norm_router` in one launch: a threadgroup for each token."""
    num_experts, width = gate.shape
    threads = metal.SIMD_WIDTH * SIMDGROUPS
    run = metal.kernel(
        "router",
        f"norm_router_d{MAX_WIDTH}_e{MAX_EXPERTS}",
        inputs=(
            *("x", "norm_weight", "gate", "gate_scales", "gate_biases", "expert_bias"),
            *("eps", "epsilon", "scale"),
        ),
        outputs=("normed", "indices", "weights"),
    )
    chosen = (*x.shape[:-1], experts_per_token)
    normed, indices, weights = run(
        # What is absent needs an array in its place, which the kernel does not read.
        inputs=[
            *(x, norm_weight, *gate.parts(), x if expert_bias is None else expert_bias),
            *(eps, EPSILON, scale),
        ],
        template=[
            ("T", x.dtype),
            ("D", width),
            ("E", num_experts),
            ("K", experts_per_token),
            ("SIMDGROUPS", SIMDGROUPS),
            ("VALUES", VALUES),
            ("HAS_BIAS", expert_bias is not None),
            ("NORMALIZE", normalize),
            *(("PACKED", gate.scales is not None), ("GROUP", gate.group_size)),
        ],
        grid=(threads, x.size // width, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape, chosen, chosen],
        output_dtypes=[x.dtype, mx.uint32, x.dtype],
    )
    return normed, indices, weights
