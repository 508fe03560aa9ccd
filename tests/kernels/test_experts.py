"""The chosen experts: against NumPy, and the kernels against their reference."""

import mlx.core as mx
import numpy as np
import pytest
import twins
from judge import swiglu
from models import as_numpy

from lfm_mlx.kernels.experts import experts, experts_reference
from lfm_mlx.kernels.matrix import Matrix

Layer = tuple[mx.array, mx.array, mx.array, Matrix, Matrix, Matrix, mx.array]


def draw(
    seed: int, lead: tuple[int, ...], sizes: tuple[int, int, int, int], bits: int, group_size: int,
    dtype: mx.Dtype,
) -> Layer:  # fmt: skip
    """x [..., D], indices and weights [..., K], gate, up and down of E experts, and a residual."""
    num_experts, chosen, width, inner = sizes
    rng = np.random.default_rng(seed)
    tokens = int(np.prod(lead))
    indices = np.stack([rng.permutation(num_experts)[:chosen] for _ in range(tokens)])
    packing = {"bits": bits, "group_size": group_size, "dtype": dtype}
    return (
        twins.draw(rng, *lead, width, dtype=dtype),
        mx.array(indices.reshape(*lead, chosen).astype(np.uint32)),
        mx.array(rng.uniform(0.1, 0.5, (*lead, chosen)).astype(np.float32)).astype(dtype),
        twins.matrix(seed + 1, num_experts, inner, width, **packing),
        twins.matrix(seed + 2, num_experts, inner, width, **packing),
        twins.matrix(seed + 3, num_experts, width, inner, **packing),
        twins.draw(rng, *lead, width, dtype=dtype),
    )


def expected(layer: Layer) -> np.ndarray:
    """The judge's feed-forward of each chosen expert, weighed and added to the residual."""
    x, weights, y = (as_numpy(layer[i]).astype(np.float64) for i in (0, 2, 6))
    gate, up, down = (twins.unpacked(matrix) for matrix in layer[3:6])
    for token, chosen in np.ndenumerate(np.array(layer[1])):
        at = token[:-1]
        one = swiglu(x[at][None], gate[chosen], down[chosen], up[chosen])
        y[at] += weights[token] * one[0]
    return y


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (11,)])
def test_experts_equal_their_definition(lead: tuple[int, ...], bits: int, seed: int) -> None:
    layer = draw(seed, lead, (5, 3, 64, 32), bits, 32, mx.float32)
    twins.close(experts(*layer), expected(layer))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_experts_in_half_precision(dtype: mx.Dtype) -> None:
    layer = draw(2, (2, 2), (4, 2, 33, 17), 0, 0, dtype)
    got = experts(*layer)
    assert got.dtype == dtype
    twins.close(got, expected(layer))


# Batch and length, (E, K, D, F), bits, group size: odd widths, one expert chosen, every packing,
# one pack a step and two, widths that leave lanes idle.
KERNEL_CASES = [
    ((1, 1), (4, 2, 96, 64), 0, 0),
    ((2, 3), (5, 3, 33, 9), 0, 0),
    ((8,), (3, 1, 8, 10), 0, 0),
    ((1, 1), (4, 4, 512, 192), 4, 64),
    ((1, 3), (3, 2, 96, 160), 4, 32),
    ((2,), (3, 2, 128, 256), 5, 128),
    ((1,), (3, 3, 256, 96), 6, 32),
    ((1, 2), (3, 2, 64, 192), 8, 64),
]


@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize(("lead", "sizes", "bits", "group_size"), KERNEL_CASES)
def test_the_kernels_equal_their_reference(
    lead: tuple[int, ...], sizes: tuple[int, int, int, int], bits: int, group_size: int,
    dtype: mx.Dtype,
) -> None:  # fmt: skip
    layer = draw(3, lead, sizes, bits, group_size, dtype)
    # Without a residual every second time; one or two tokens leave no room for both.
    layer = layer if len(lead) == 2 else layer[:-1]
    same = experts_reference(*layer)
    # On the CPU MLX adds packed half-precision products in half precision; the kernels do not.
    wanted = experts_reference(*(twins.wide(part) for part in layer))
    with twins.kernels():
        got = experts(*layer, use_kernel=True)
        mx.eval(got)
    twins.same_kind((got,), (same,))
    twins.close(got, wanted)


def test_the_kernels_state_their_limits() -> None:
    layer = draw(4, (9,), (3, 2, 32, 32), 0, 0, mx.float32)
    few = draw(4, (1,), (3, 2, 32, 32), 0, 0, mx.float32)
    many = draw(4, (1,), (17, 17, 32, 32), 0, 0, mx.float32)
    packed = draw(4, (1,), (3, 2, 32, 32), 4, 32, mx.float32)
    half = mx.zeros((1, 32), mx.float16)
    with twins.kernels():
        for case, reason in (
            (layer, "1 to 8 tokens, got 9"),
            (many, "1 to 16 experts a token, got 17"),
            ((*few[:6], half), "of one dtype"),
            ((*few[:4], packed[4], *few[5:]), "packed differently"),
            (draw(4, (1,), (3, 2, 32, 7), 0, 0, mx.float32), "8 features or more, got 7"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                experts(*case, use_kernel=True)
        assert experts(*layer).shape == (9, 32)
