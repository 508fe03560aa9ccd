"""The router of LFM2's sparse layers: biased choice, unbiased weights.

    s = sigmoid(W x);  chosen = top K of s + expert_bias;  weight_k = s_k / (sum of chosen s + 1e-6)

The bias moves the choice only and never the weights; the sum with it is taken in float32. There is
no softmax. Among equal scores the expert with the lower index wins.
"""

import mlx.core as mx

from lfm_mlx.kernels import metal

EPSILON = 1e-6


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
    return indices, (weights * scale).astype(logits.dtype)
