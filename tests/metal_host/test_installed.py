"""Inside `installed()` a model takes its Metal path, and says what it says without it."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import lfm_mlx
from lfm_mlx.kernels import metal
from lfm_mlx.load import load_model
from metal_host import HostKernel, available, installed, refusal

pytestmark = pytest.mark.skipif(not available(), reason=str(refusal()))

DEMO = Path(lfm_mlx.__file__).parent / "demo"


def test_context_is_left_as_it_was_found() -> None:
    real, there = mx.fast.metal_kernel, metal.available()
    with installed():
        assert metal.available()
        assert isinstance(mx.fast.metal_kernel("k", ["x"], ["y"], ""), HostKernel)
    assert mx.fast.metal_kernel is real
    assert metal.available() is there


def test_compiled_functions_run_uncompiled() -> None:
    with installed():
        kernel = mx.fast.metal_kernel("twice", ["x"], ["y"], "y[grid_size.y - 1] = 2 * x[0];")

        @mx.compile
        def twice(x: mx.array) -> mx.array:
            one = (1, 1, 1)
            shape = {"output_shapes": [(1,)], "output_dtypes": [x.dtype]}
            return kernel(inputs=[x], grid=one, threadgroup=one, **shape)[0]

        assert twice(mx.array([3])).tolist() == [6]


@pytest.mark.parametrize("checked", [False, True])
def test_demo_model(checked: bool) -> None:
    model = load_model(DEMO)

    def greedy(count: int = 4) -> tuple[list[int], mx.array]:
        cache = model.make_cache()
        logits = [model(mx.array([[1, 5, 9, 20, 33]]), cache=cache)]
        tokens = []
        for _ in range(count):
            tokens.append(mx.argmax(logits[-1][0, -1]).item())
            logits.append(model(mx.array([tokens[-1:]]), cache=cache))
        return tokens, mx.concatenate(logits, axis=1)

    tokens, logits = greedy()
    with installed(checked=checked):
        host_tokens, host_logits = greedy()
    assert host_tokens == tokens
    difference = np.abs(np.array(host_logits - logits)).max()
    assert difference <= 1e-4 * np.abs(np.array(logits)).max()
