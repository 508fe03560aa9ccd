"""The signature is MLX's own, character for character."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

from metal_host.signature import ATTRIBUTES, Kernel, metal_text

HALF, FLOAT = mx.zeros((4, 3), mx.float16), mx.zeros((2,))
CASES = {
    "plain": (Kernel("plain", ["x"], ["y"], "y[thread_position_in_grid.x] = x[0];"), [FLOAT], []),
    "header": (Kernel("h", ["x"], ["y"], "uint i = grid_size.x;", "// above\n"), [HALF], []),
    "template": (
        Kernel("t", ["x"], ["y", "z"], "thread_index_in_simdgroup"),
        [HALF],
        [("T", mx.bfloat16), ("N", -3), ("flag", True), ("U", mx.uint32), ("off", False)],
    ),
    "shapes": (
        Kernel(
            "s", ["a", "b", "c"], ["y"], "a_shape a_ndim b_strides c_shape thread_position_in_grid"
        ),
        [HALF, FLOAT, mx.array(3)],
        [],
    ),
    "attributes": (Kernel("all", ["x"], ["y"], " ".join(ATTRIBUTES)), [mx.array(True)], []),
    "atomic": (Kernel("a", ["x"], ["y"], "grid_origin", "", True), [mx.array([1, 2])], [("K", 2)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int64, mx.uint8])
def test_signature_is_what_mlx_prints(
    case: str, dtype: mx.Dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel, inputs, template = CASES[case]
    inputs = [*inputs[:-1], inputs[-1].astype(dtype)]
    dtypes = [dtype] * len(kernel.output_names)
    real = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=kernel.input_names,
        output_names=kernel.output_names,
        source=kernel.source,
        header=kernel.header,
        atomic_outputs=kernel.atomic_outputs,
    )

    def trace(*arrays: mx.array) -> list[mx.array]:
        return real(
            inputs=list(arrays),
            template=template,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(4,)] * len(dtypes),
            output_dtypes=dtypes,
            verbose=True,
        )

    mx.export_function(os.fspath(tmp_path / "traced"), trace, *inputs)
    printed = capfd.readouterr().out
    before, after, _ = metal_text(kernel, template, inputs, dtypes)
    ours = f"{kernel.header}{before}{kernel.source}{after}"
    assert printed == f"Generated source code for `{kernel.name}`:\n```\n{ours}\n```\n"
