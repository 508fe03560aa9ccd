"""A kernel beside its reference: on Metal where it is there, else its text run on the host."""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_host import available, installed, refusal
from models import as_numpy

from lfm_mlx.doctor import cases
from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import Matrix

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Relative to the largest value: one rounding to the dtype, and in half precision another before it.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@contextlib.contextmanager
def kernels(*, checked: bool = True) -> Iterator[None]:
    """Where `use_kernel=True` runs the Metal text, on whatever this machine has for it.

    checked: on the host with all its checks, for small inputs
    """
    if metal.available():
        yield
        return
    if not available():
        pytest.skip(str(refusal()))
    with installed(checked=checked):
        yield


def draw(rng: np.random.Generator, *shape: int, dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    """Normally distributed values, rounded to the dtype."""
    return mx.array(rng.normal(scale=scale, size=shape).astype(np.float32)).astype(dtype)


def matrix(seed: int, *shape: int, bits: int, group_size: int, dtype: mx.Dtype) -> Matrix:
    """Random weights [..., out, in], packed unless bits is 0."""
    dense = draw(np.random.default_rng(seed), *shape, dtype=dtype, scale=shape[-1] ** -0.5)
    if not bits:
        return Matrix(dense)
    return Matrix(*mx.quantize(dense, group_size, bits), group_size, bits)


def wide(value: Any) -> Any:
    """The same values in float32: of an array, a matrix or a dictionary of arrays."""
    if isinstance(value, dict):
        return {name: wide(part) for name, part in value.items()}
    return cases.wide(value)


def unpacked(packed: Matrix) -> np.ndarray:
    """The weights that a matrix stands for, in float64."""
    weight, scales, biases, *packing = wide(packed)
    if scales is not None:
        weight = mx.dequantize(weight, scales, biases, *packing[:2])
    return as_numpy(weight).astype(np.float64)


def close(got: mx.array, wanted: mx.array | np.ndarray, tolerance: float | None = None) -> None:
    """Every value within `tolerance` of the wanted one, relative to the largest wanted value."""
    allowed = TOLERANCE[got.dtype] if tolerance is None else tolerance
    expected = as_numpy(wanted) if isinstance(wanted, mx.array) else wanted
    found = as_numpy(got)
    assert found.shape == expected.shape, f"shape {found.shape}; expected {expected.shape}"
    error = np.abs(found - expected) / np.abs(expected).max()
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= allowed, (
        f"relative error {error[worst]:.2e} in {got.dtype} at {worst}: "
        f"got {found[worst]}, expected {expected[worst]}"
    )


def same_kind(got: tuple[mx.array, ...], wanted: tuple[mx.array, ...]) -> None:
    """The same shapes and dtypes."""
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in wanted]


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The values as `dtype` holds them, in float32."""
    return as_numpy(mx.array(np.asarray(values, np.float32)).astype(dtype))


def mostly_equal(got: mx.array, exact: np.ndarray) -> None:
    """Nearly every value is the exact one rounded once: a rounding more would change many."""
    equal = as_numpy(got) == rounded(exact, got.dtype)
    assert equal.mean() > 0.97, f"{1 - equal.mean():.1%} of {equal.size} values are rounded twice"
