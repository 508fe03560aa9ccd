"""Norm and rotation of queries and keys against the judge, and the kernel against both."""

import mlx.core as mx
import numpy as np
import pytest
import twins
from judge import rms_norm, rope
from models import as_numpy

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

THETA, EPS = 5e6, 1e-5
# Near position 0. MLX's own RoPE takes Metal's fast sines, the kernel precise ones.
NEAR = {mx.float32: 1e-3 if metal.available() else 1e-5}
SIZES = [(1, 1, 4, 2, 64), (2, 5, 3, 1, 6), (3, 2, 5, 5, 2), (1, 3, 2, 1, 130)]  # B, L, H, Hkv, Dh


def draw(
    seed: int, size: tuple[int, ...], dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, mx.array]:
    """The merged projection [B, L, (H + 2 Hkv) Dh] and both norms' weights [Dh]."""
    rows, length, heads, kv_heads, width = size
    rng = np.random.default_rng(seed)
    qkv = twins.draw(rng, rows, length, (heads + 2 * kv_heads) * width, dtype=dtype)
    q_weight, k_weight = (1 + twins.draw(rng, width, dtype=dtype, scale=0.1) for _ in "qk")
    return qkv, q_weight, k_weight


def expected(
    arrays: tuple[mx.array, mx.array, mx.array], size: tuple[int, ...], offsets: list[int]
) -> tuple[np.ndarray, ...]:
    """The judge's answer. It rotates from position 0, so `offset` tokens are put before a row."""
    qkv, q_weight, k_weight = (as_numpy(array).astype(np.float64) for array in arrays)
    _, _, heads, kv_heads, width = size
    found: list[list[np.ndarray]] = []
    for row, offset in zip(qkv, offsets, strict=True):
        q, k, v = np.split(row.reshape(len(row), -1, width), [heads, heads + kv_heads], axis=1)
        turned = [
            rope(np.pad(rms_norm(x, weight, EPS), ((offset, 0), (0, 0), (0, 0))), THETA)[offset:]
            for x, weight in ((q, q_weight), (k, k_weight))
        ]
        found.append([x.swapaxes(0, 1) for x in (*turned, v)])
    return tuple(np.stack(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_qk_norm_rope_equals_its_definition(
    size: tuple[int, ...], seed: int, dtype: mx.Dtype
) -> None:
    arrays = draw(seed, size, dtype)
    offsets = [7 * row for row in range(size[0])]
    got = qk_norm_rope(*arrays, *size[2:4], eps=EPS, base=THETA, offset=mx.array(offsets))
    for part, wanted in zip(got, expected(arrays, size, offsets), strict=True):
        assert part.dtype == dtype
        twins.close(part, wanted, NEAR.get(dtype))


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_equals_its_reference(size: tuple[int, ...], dtype: mx.Dtype) -> None:
    arrays = draw(3, size, dtype)
    options = {
        "eps": EPS,
        "base": THETA,
        "offset": mx.array([3 + 5 * row for row in range(size[0])]),
    }
    wanted = qk_norm_rope_reference(*arrays, *size[2:4], **options)
    with twins.kernels():
        got = qk_norm_rope(*arrays, *size[2:4], **options, use_kernel=True)
        mx.eval(got)
    twins.same_kind(got, wanted)
    for part, other in zip(got, wanted, strict=True):
        twins.close(part, other, NEAR.get(dtype))


@pytest.mark.parametrize("offset", [127_999, mx.array(127_999), mx.array([127_999])])
def test_the_kernel_is_as_near_as_its_reference_at_the_last_position(
    offset: int | mx.array,
) -> None:
    size = (1, 1, 4, 2, 64)
    arrays = draw(4, size)
    options = {"eps": EPS, "base": THETA, "offset": offset}
    wanted = expected(arrays, size, [127_999])
    reference = qk_norm_rope_reference(*arrays, 4, 2, **options)
    with twins.kernels():
        got = qk_norm_rope(*arrays, 4, 2, **options, use_kernel=True)
        mx.eval(got)
    # float32 holds the fastest angle, 128 000 radians, to 0.008; both are within half of that.
    for part, other, exact in zip(got, reference, wanted, strict=True):
        twins.close(part, exact, 5e-3)
        twins.close(other, exact, 5e-3)


@pytest.mark.parametrize(
    ("width", "dtype", "length", "reason"),
    [
        (5, mx.float32, 1, "an even width up to 256, got 5"),
        (258, mx.float32, 1, "an even width up to 256, got 258"),
        (4, mx.float16, 1, "of one dtype"),
        (4, mx.float32, 0, "no tokens"),
    ],
)
def test_the_kernel_states_its_limits(
    width: int, dtype: mx.Dtype, length: int, reason: str
) -> None:
    qkv, weight = mx.zeros((1, length, 3 * width)), mx.ones((width,), dtype)
    with twins.kernels(), pytest.raises(RuntimeError, match=reason):
        qk_norm_rope(qkv, weight, weight, 1, 1, eps=EPS, base=THETA, use_kernel=True)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_heads_are_rounded_before_they_meet_their_weight(dtype: mx.Dtype) -> None:
    """As the operations round a norm; at position 0 nothing is turned."""
    size = (1, 1, 16, 1, 64)
    qkv, weight, _ = draw(3, size, dtype)
    with twins.kernels(checked=False):
        queries, _, _ = qk_norm_rope(
            *(qkv, weight, weight, 16, 1), eps=EPS, base=THETA, use_kernel=True
        )
        mx.eval(queries)
    heads = as_numpy(qkv).reshape(-1, 64)[:16]
    scale = 1 / np.sqrt((heads.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)
    exact = twins.rounded(heads * scale, dtype).astype(np.float64) * as_numpy(weight)
    twins.mostly_equal(queries[0, :, 0], exact)
