"""Queries and keys normed per head and rotated, from the merged q/k/v projection.

    q = rope(rms_norm(q) * q_weight);  k = rope(rms_norm(k) * k_weight);  v as it is

RoPE turns the two halves of a head against each other by position * base^(-2j / Dh). Angles are
float32 products, as `mx.fast.rope` makes them: at position 128 000 the fastest are off by up to
0.008 radians in both. The kernel is one launch for four, any L, and writes the layout that the
cache and attention want; values are a view. Limits: float32, float16 or bfloat16, the same in
projection and norms, heads of an even width of at most 256.
"""

import math

import mlx.core as mx

from lfm_mlx.kernels import metal

MAX_HEAD_DIM = 256
# Simdgroups, and so heads, in a threadgroup: they share nothing.
HEADS_TOGETHER = 8


def qk_norm_rope(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    num_heads: int,
    num_kv_heads: int,
    *,
    eps: float,
    base: float,
    offset: int | mx.array = 0,
    use_kernel: bool | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Split the projection, norm and rotate queries and keys from position `offset` on.

    Shapes:
        qkv: [B, L, (H + 2 Hkv) Dh] · q_weight, k_weight: [Dh]
        offset: an integer, or an array of one or of one a row [B]
        returns queries [B, H, L, Dh], keys and values [B, Hkv, L, Dh]
    """
    run = qk_norm_rope_reference
    if metal.choose("qk_norm_rope", use_kernel, _refusal(qkv, q_weight, k_weight)):
        run = _qk_norm_rope_metal
    return run(qkv, q_weight, k_weight, num_heads, num_kv_heads, eps=eps, base=base, offset=offset)


def qk_norm_rope_reference(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    num_heads: int,
    num_kv_heads: int,
    *,
    eps: float,
    base: float,
    offset: int | mx.array = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """`qk_norm_rope` in MLX operations."""
    head_dim = q_weight.shape[0]
    heads = qkv.reshape(*qkv.shape[:2], -1, head_dim)  # [B, L, H + 2 Hkv, Dh]
    queries, keys, values = mx.split(heads, [num_heads, num_heads + num_kv_heads], axis=2)

    def rotated(x: mx.array, weight: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x, weight, eps).swapaxes(1, 2)
        return mx.fast.rope(
            normed, head_dim, traditional=False, base=base, scale=1.0, offset=offset
        )

    return rotated(queries, q_weight), rotated(keys, k_weight), values.swapaxes(1, 2)


def _refusal(qkv: mx.array, q_weight: mx.array, k_weight: mx.array) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    if qkv.dtype not in metal.DTYPES or not qkv.dtype == q_weight.dtype == k_weight.dtype:
        return (
            "it takes projection and norms of one dtype, float32, float16 or bfloat16; got "
            f"{qkv.dtype}, {q_weight.dtype} and {k_weight.dtype}"
        )
    if q_weight.size % 2 or q_weight.size > MAX_HEAD_DIM:
        return f"it takes heads of an even width up to {MAX_HEAD_DIM}, got {q_weight.size}"
    return None if qkv.size else "there are no tokens"


def _qk_norm_rope_metal(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    num_heads: int,
    num_kv_heads: int,
    *,
    eps: float,
    base: float,
    offset: int | mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """`qk_norm_rope` in one launch: a simdgroup for each head of each token."""
    batch, length, width = qkv.shape
    head_dim = q_weight.size
    offsets = mx.array([offset]) if isinstance(offset, int) else offset.reshape(-1)
    run = metal.kernel(
        "qk_norm_rope",
        f"qk_norm_rope_d{MAX_HEAD_DIM}",
        inputs=("qkv", "q_weight", "k_weight", "offset", "eps", "log2_base"),
        outputs=("queries", "keys"),
    )
    queries, keys = run(
        inputs=[qkv, q_weight, k_weight, offsets, eps, math.log2(base)],
        template=[
            ("T", qkv.dtype),
            ("HEADS", num_heads),
            ("KV_HEADS", num_kv_heads),
            ("HEAD_DIM", head_dim),
            ("OFFSET_PER_ROW", offsets.size > 1),
        ],
        grid=(metal.SIMD_WIDTH, num_heads + num_kv_heads, batch * length),
        threadgroup=(metal.SIMD_WIDTH, HEADS_TOGETHER, 1),
        output_shapes=[
            (batch, num_heads, length, head_dim),
            (batch, num_kv_heads, length, head_dim),
        ],
        output_dtypes=[qkv.dtype, qkv.dtype],
    )
    values = qkv[..., width - num_kv_heads * head_dim :].reshape(batch, length, -1, head_dim)
    return queries, keys, values.swapaxes(1, 2)
