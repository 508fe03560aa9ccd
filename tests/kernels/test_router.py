"""The router against its definition in NumPy, and against the three rules ports got wrong."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import twins
from judge import judge_router, rms_norm, sigmoid, softmax
from models import as_numpy

from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.router import norm_router, norm_router_reference, router

SIZES = [(1, 8, 2), (3, 32, 4), (17, 33, 5), (64, 7, 7), (129, 32, 1)]  # tokens, E, K


def draw(seed: int, tokens: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [L, E], and a bias [E] large enough to change what is chosen."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    return logits, rng.normal(scale=0.2, size=experts).astype(np.float32)


def expected(
    logits: np.ndarray, bias: np.ndarray | None, count: int, norm: bool = True, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The judge's answer for logits: its gate is the identity."""
    gate = np.eye(logits.shape[-1])
    return judge_router(logits.astype(np.float64), gate, bias, count, norm, scale)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "experts", "count"), SIZES)
def test_router_equals_its_definition(seed: int, tokens: int, experts: int, count: int) -> None:
    logits, bias = draw(seed, tokens, experts)
    indices, weights = router(mx.array(logits), mx.array(bias), count)
    chosen, wanted = expected(logits, bias, count)
    np.testing.assert_array_equal(np.array(indices), chosen)
    np.testing.assert_allclose(np.array(weights), wanted, rtol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_router_options(norm: bool, scale: float) -> None:
    logits, bias = draw(3, 21, 16)
    _, weights = router(mx.array(logits), mx.array(bias), 3, normalize=norm, scale=scale)
    np.testing.assert_allclose(np.array(weights), expected(logits, bias, 3, norm, scale)[1], 1e-5)


def test_router_without_bias() -> None:
    logits, _ = draw(4, 21, 16)
    indices, _ = router(mx.array(logits), None, 3)
    np.testing.assert_array_equal(np.array(indices), np.argsort(-logits, kind="stable")[:, :3])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_scores_choose_as_float32_does_on_the_same_scores(dtype: mx.Dtype) -> None:
    logits, bias = draw(5, 64, 32)
    half = mx.array(logits).astype(dtype)
    indices, weights = router(half, mx.array(bias), 4)
    scores = as_numpy(mx.sigmoid(half))
    chosen = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, :4]
    np.testing.assert_array_equal(np.array(indices), chosen)
    picked = np.take_along_axis(scores, chosen, -1)
    exact = picked / (picked.sum(-1, keepdims=True) + 1e-6)
    assert weights.dtype == dtype
    rounding = {mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(as_numpy(weights), exact, rtol=rounding)


def test_ties_go_to_the_lower_index() -> None:
    indices, _ = router(mx.zeros((5, 32)), mx.zeros((32,)), 4)
    np.testing.assert_array_equal(np.array(indices), np.tile(np.arange(4), (5, 1)))


def test_softmax_would_be_seen() -> None:
    logits, bias = draw(6, 200, 32)
    indices, _ = router(mx.array(logits), mx.array(bias), 4)
    wrong = np.argsort(-(softmax(logits) + bias), axis=-1, kind="stable")[:, :4]
    differ = (np.sort(np.array(indices), -1) != np.sort(wrong, -1)).any(-1)
    assert differ.mean() > 0.29


def test_biased_weights_would_be_seen() -> None:
    logits, bias = draw(7, 200, 32)
    indices, weights = router(mx.array(logits), mx.array(bias), 4)
    biased = np.take_along_axis(sigmoid(logits) + bias, np.array(indices), -1)
    wrong = biased / biased.sum(-1, keepdims=True)
    assert (np.abs(np.array(weights) - wrong).max(-1) > 1e-3).mean() > 0.9


def test_a_missing_epsilon_would_be_seen() -> None:
    # Scores near 1e-6 are where the 1e-6 in the divisor decides: four equal ones weigh 0.2 each.
    logits = np.full((1, 8), np.log(1e-6), np.float32)
    _, weights = router(mx.array(logits), None, 4)
    np.testing.assert_allclose(np.array(weights), 1 / 5, rtol=1e-3)


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="router: the Metal kernel cannot run"):
        router(mx.zeros((1, 8)), None, 2, use_kernel=True)


def draw_layer(
    seed: int, tokens: int, experts: int, width: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """x [1, L, D], the norm's weight [D], the gate [E, D] and its bias [E]."""
    rng = np.random.default_rng(seed)
    x = twins.draw(rng, 1, tokens, width, dtype=dtype)
    norm_weight = 1 + twins.draw(rng, width, dtype=dtype, scale=0.1)
    gate = twins.draw(rng, experts, width, dtype=dtype, scale=width**-0.5)
    return x, norm_weight, gate, twins.draw(rng, experts, dtype=mx.float32, scale=0.2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_norm_router_equals_its_definition(seed: int) -> None:
    x, norm_weight, gate, bias = draw_layer(seed, 5, 9, 37, mx.float32)
    # One token at a time: products of more are TF32 on some GPUs, if that is asked for.
    rows = [
        norm_router(x[:, token : token + 1], norm_weight, 1e-5, Matrix(gate), bias, 3)
        for token in range(5)
    ]
    normed, indices, weights = (mx.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
    exact = rms_norm(as_numpy(x)[0].astype(np.float64), as_numpy(norm_weight), 1e-5)
    chosen, wanted = judge_router(exact, as_numpy(gate), as_numpy(bias), 3, True, 1.0)
    twins.close(normed[0], exact)
    np.testing.assert_array_equal(np.array(indices)[0], chosen)
    np.testing.assert_allclose(as_numpy(weights)[0], wanted, rtol=1e-5)


# Tokens, E, K, D, whether there is a bias: fewer numbers than a thread reads at once, odd widths,
# every expert chosen, more experts than a simdgroup has lanes, the model's own.
KERNEL_SIZES = [(2, 7, 7, 3, True), (5, 33, 5, 37, False), (3, 70, 4, 130, True)]


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize("size", [*KERNEL_SIZES, (1, 32, 4, 2048, True)])
def test_the_norm_router_kernel_equals_its_reference(
    size: tuple[int, int, int, int, bool], dtype: mx.Dtype
) -> None:
    tokens, experts, count, width, biased = size
    x, norm_weight, weight, bias = draw_layer(3, tokens, experts, width, dtype)
    expect_the_kernel_to_agree((x, norm_weight, Matrix(weight), bias), count, biased)


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "group_size"),
    [(2, 7, 96, 32), (1, 32, 2048, 64), (3, 9, 256, 128)],
)
def test_the_kernel_reads_a_gate_in_8_bits(
    tokens: int, experts: int, width: int, group_size: int, dtype: mx.Dtype
) -> None:
    x, norm_weight, weight, bias = draw_layer(4, tokens, experts, width, dtype)
    gate = Matrix(*mx.quantize(weight, group_size, 8), group_size, 8)
    expect_the_kernel_to_agree((x, norm_weight, gate, bias), 3, True)


def expect_the_kernel_to_agree(drawn: tuple[Any, ...], count: int, biased: bool) -> None:
    x, norm_weight, gate, bias = drawn
    dtype = x.dtype
    given, scale = (bias, 1.0) if biased else (None, 2.5)
    layer, options = (x, norm_weight, 1e-5, gate, given, count), {"normalize": biased}
    wanted = norm_router_reference(*layer, **options, scale=scale)
    with twins.kernels():
        got = norm_router(*layer, **options, scale=scale, use_kernel=True)
        mx.eval(got)
    twins.same_kind(got, wanted)
    twins.close(got[0], wanted[0])
    # Another order of summation may round a logit the other way: near ties may swap, no more.
    logits = as_numpy(wanted[0]).astype(np.float64) @ twins.unpacked(gate).T
    scores = mx.sigmoid(mx.array(logits.astype(np.float32)).astype(dtype))
    shifted = scores if given is None else scores + given
    chosen, best = (mx.take_along_axis(shifted, i, axis=-1) for i in (got[1], wanted[1]))
    twins.close(chosen.astype(dtype), best.astype(dtype))
    picked = as_numpy(mx.take_along_axis(scores, got[1], axis=-1))
    divisor = picked.sum(-1, keepdims=True) + 1e-6 if biased else 1 / scale
    twins.close(got[2], picked / divisor)


def routed(gate: np.ndarray, count: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """What the kernel makes of a token of ones, of which the norm leaves ones."""
    ones, matrix = mx.ones((1, 1, gate.shape[1]), dtype), Matrix(mx.array(gate).astype(dtype))
    with twins.kernels(checked=False):
        found = norm_router(ones, ones[0, 0], 0.0, matrix, None, count, use_kernel=True)
        mx.eval(found)
    return found


def test_a_missing_epsilon_would_be_seen_in_the_kernel() -> None:
    _, _, weights = routed(np.full((8, 64), np.log(1e-6) / 64, np.float32), 4, mx.float32)
    np.testing.assert_allclose(as_numpy(weights), 1 / 5, rtol=1e-3)


def test_logits_and_scores_are_rounded_before_they_are_compared() -> None:
    """What ties in bfloat16 ties, and the lower index wins, though its exact value is lower."""
    logits = np.zeros((2, 64), np.float32)
    logits[0, :2], logits[1, :2] = (4.0, 0.01953125), (4.03125, 0.0078125)  # both 4.03125
    assert np.array(routed(logits, 2, mx.bfloat16)[1]).ravel().tolist() == [0, 1]
    scores = np.zeros((2, 64), np.float32)
    scores[:, 0] = 4.03125, 4.0625  # logits that differ, of which the sigmoids round to the same
    assert np.array(routed(scores, 2, mx.bfloat16)[1]).ravel().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_normed_token_is_rounded_before_it_meets_its_weight(dtype: mx.Dtype) -> None:
    x, norm_weight, gate, _ = draw_layer(2, 1, 8, 512, dtype)
    with twins.kernels(checked=False):
        normed, _, _ = norm_router(x, norm_weight, 1e-5, Matrix(gate), None, 2, use_kernel=True)
        mx.eval(normed)
    token = as_numpy(x)[0].astype(np.float64)
    scale = 1 / np.sqrt((token**2).mean() + 1e-5)
    exact = twins.rounded(token * scale, dtype).astype(np.float64) * as_numpy(norm_weight)
    twins.mostly_equal(normed[0], exact)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_norm_router_kernel_gives_ties_and_nans_to_the_lower_index(value: float) -> None:
    x, ones = mx.full((1, 2, 40), value), mx.ones((40,))
    with twins.kernels():
        gate = Matrix(mx.ones((32, 40)))
        _, indices, _ = norm_router(x, ones, 1e-5, gate, None, 4, use_kernel=True)
        mx.eval(indices)
    np.testing.assert_array_equal(np.array(indices), np.tile(np.arange(4), (1, 2, 1)))


@pytest.mark.parametrize(
    ("tokens", "experts", "count", "width", "gate_dtype", "reason"),
    [
        (65, 8, 2, 16, mx.float32, "1 to 64 tokens, got 65"),
        (1, 8, 2, 16, mx.float16, "the weights are"),
        (1, 8, 9, 16, mx.float32, "chooses 1 to 8 experts, got 9"),
        (1, 513, 2, 16, mx.float32, "at most 4096 and 512 experts"),
        (1, 8, 2, 4097, mx.float32, "at most 4096 and 512 experts"),
    ],
)
def test_the_norm_router_kernel_states_its_limits(
    tokens: int, experts: int, count: int, width: int, gate_dtype: mx.Dtype, reason: str
) -> None:
    x, gate = mx.zeros((tokens, width)), Matrix(mx.zeros((experts, width), gate_dtype))
    with twins.kernels(), pytest.raises(RuntimeError, match=reason):
        norm_router(x, mx.ones((width,)), 1e-5, gate, None, count, use_kernel=True)


def test_a_gate_in_other_bits_stays_on_the_operations() -> None:
    x, norm_weight, weight, bias = draw_layer(5, 1, 8, 64, mx.float32)
    gate = Matrix(*mx.quantize(weight, 64, 4), 64, 4)
    with twins.kernels(), pytest.raises(RuntimeError, match="a gate of floats or 8 bits, got 4"):
        norm_router(x, norm_weight, 1e-5, gate, bias, 2, use_kernel=True)
