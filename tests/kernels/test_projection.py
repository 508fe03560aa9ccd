"""A projection with its surroundings: against NumPy, and the kernel against its reference."""

import mlx.core as mx
import numpy as np
import pytest
import twins
from judge import rms_norm, sigmoid
from models import as_numpy

from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.projection import projection, projection_reference

EPS = 1e-5


def draw(
    seed: int, tokens: int, matrix: Matrix, swiglu: bool, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """x [tokens, K], the norm's weight [K] and a residual [tokens, outputs]."""
    rows, width = matrix.shape
    rng = np.random.default_rng(seed)
    x = twins.draw(rng, tokens, width, dtype=dtype, scale=3.0)
    norm_weight = 1 + twins.draw(rng, width, dtype=dtype, scale=0.1)
    return x, norm_weight, twins.draw(rng, tokens, rows // 2 if swiglu else rows, dtype=dtype)


def expected(x: mx.array, matrix: Matrix, options: dict) -> np.ndarray:
    wide = as_numpy(x).astype(np.float64)
    if options.get("norm_weight") is not None:
        wide = rms_norm(wide, as_numpy(options["norm_weight"]), EPS)
    y = wide @ twins.unpacked(matrix).T
    if options.get("swiglu"):
        gate, up = np.split(y, 2, axis=-1)
        y = gate * sigmoid(gate) * up
    return y if options.get("residual") is None else y + as_numpy(options["residual"])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_projection_equals_its_definition(bits: int, seed: int) -> None:
    matrix = twins.matrix(seed, 10, 96, bits=bits, group_size=32, dtype=mx.float32)
    x, norm_weight, residual = draw(seed, 7, matrix, True, mx.float32)
    options = {"norm_weight": norm_weight, "swiglu": True, "residual": residual}
    for given in ({}, {"norm_weight": norm_weight}, {"swiglu": True}, options):
        twins.close(by_token(x, matrix, given), expected(x, matrix, given))
    assert projection(x, matrix, eps=EPS, **options).shape == residual.shape


def by_token(x: mx.array, matrix: Matrix, options: dict) -> mx.array:
    """One token at a time: float32 products of more are TF32 on some GPUs, if that is asked for."""
    rows = []
    for token in range(x.shape[0]):
        one = slice(token, token + 1)
        given = options | ({"residual": options["residual"][one]} if "residual" in options else {})
        rows.append(projection(x[one], matrix, eps=EPS, **given))
    return mx.concatenate(rows)


# Tokens, rows, inputs, bits, group size, what is folded in: rows and inputs that fill no block, one
# tile and two, one pack a step and two, every packing.
KERNEL_CASES = [
    (1, 9, 96, 0, 0, "norm residual"),
    (3, 6, 33, 0, 0, "swiglu"),
    (8, 10, 10, 0, 0, ""),
    (1, 6, 512, 4, 64, "norm swiglu"),
    (2, 5, 160, 4, 32, "residual"),
    (5, 6, 384, 4, 128, "norm"),
    (1, 5, 640, 5, 128, "norm"),
    (6, 7, 96, 5, 32, "residual"),
    (1, 6, 512, 5, 64, ""),
    (4, 6, 256, 6, 64, "swiglu"),
    (1, 5, 96, 6, 32, "norm residual"),
    (1, 9, 256, 8, 128, "norm"),
    (7, 4, 64, 8, 32, ""),
]


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_kernel_equals_its_reference(
    case: tuple[int, int, int, int, int, str], dtype: mx.Dtype
) -> None:
    tokens, rows, width, bits, group_size, folded = case
    matrix = twins.matrix(3, rows, width, bits=bits, group_size=group_size, dtype=dtype)
    swiglu = "swiglu" in folded
    x, norm_weight, residual = draw(3, tokens, matrix, swiglu, dtype)
    options = {
        "norm_weight": norm_weight if "norm" in folded else None,
        "swiglu": swiglu,
        "residual": residual if "residual" in folded else None,
    }
    same = projection_reference(x, matrix, eps=EPS, **options)
    with twins.kernels():
        got = projection(x, matrix, eps=EPS, **options, use_kernel=True)
        mx.eval(got)
    twins.same_kind((got,), (same,))
    twins.close(got, expected(x, matrix, options))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernel_rounds_once_after_the_residual(seed: int) -> None:
    matrix = twins.matrix(seed, 512, 128, bits=4, group_size=64, dtype=mx.bfloat16)
    x, _, residual = draw(seed, 1, matrix, False, mx.bfloat16)
    with twins.kernels(checked=False):
        y = projection(x, matrix, residual=residual, use_kernel=True)
        mx.eval(y)
    twins.mostly_equal(y, expected(x, matrix, {"residual": residual}))


def test_a_plain_product_stays_with_mlx_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = mx.ones((1, 32)), Matrix(mx.ones((4, 32)))
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(metal, "kernel", lambda *_, **__: pytest.fail("a kernel was built"))
    np.testing.assert_array_equal(np.array(projection(x, matrix)), np.full((1, 4), 32.0))


@pytest.mark.parametrize(
    ("x", "matrix", "options", "reason"),
    [
        (mx.ones((9, 32)), Matrix(mx.ones((4, 32))), {}, "1 to 8 tokens, got 9"),
        (mx.ones((1, 32)), Matrix(mx.ones((3, 32))), {"swiglu": True}, "even number of rows"),
        (
            mx.ones((1, 32)),
            Matrix(mx.ones((4, 32), mx.float16)),
            {},
            "weights are mlx.core.float16",
        ),
        (mx.ones((1, 7)), Matrix(mx.ones((4, 7))), {}, "8 inputs or more, got 7"),
        (
            mx.ones((1, 32)),
            Matrix(mx.ones((4, 32))),
            {"residual": mx.ones((1, 4), mx.float16)},
            "of one dtype",
        ),
        (
            mx.ones((1, 64)),
            Matrix(*mx.quantize(mx.ones((4, 64)), bits=3), bits=3),
            {},
            "got affine, 3 bits, groups of 64",
        ),
        (
            mx.ones((1, 64)),
            Matrix(*mx.quantize(mx.ones((4, 64)), 32, 4, mode="mxfp4"), None, 32, 4, "mxfp4"),
            {},
            "got mxfp4, 4 bits, groups of 32",
        ),
    ],
)
def test_the_kernel_states_its_limits(
    x: mx.array, matrix: Matrix, options: dict, reason: str
) -> None:
    with twins.kernels(), pytest.raises(RuntimeError, match=reason):
        projection(x, matrix, **options, use_kernel=True)


def test_packed_weights_stay_with_mlx_where_its_helpers_are_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = Matrix(*mx.quantize(mx.ones((8, 64))))
    monkeypatch.setattr(metal, "weight_reader", lambda packed: "")
    with twins.kernels():
        y = projection(mx.ones((1, 64)), matrix, residual=mx.ones((1, 8)))
        np.testing.assert_allclose(np.array(y), np.full((1, 8), 65.0))
        with pytest.raises(RuntimeError, match="helpers for packed weights are not installed"):
            projection(mx.ones((1, 64)), matrix, use_kernel=True)
