"""Values: what kernels compute on the host is what they should."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_host import available, build, metal_kernel, refusal
from metal_host.build import unqualified_pointer

pytestmark = pytest.mark.skipif(not available(), reason=str(refusal()))

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
QUANTIZED = Path(mx.__file__).parents[0] / "include/mlx/backend/metal/kernels/quantized.h"


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduction_over_partial_threadgroups(dtype: mx.Dtype) -> None:
    kernel = metal_kernel(
        "sum_rows",
        ["x"],
        ["y"],
        """
        threadgroup float partial[32];
        uint row = thread_position_in_grid.y, t = thread_position_in_threadgroup.x;
        uint n = x_shape[1];
        float sum = 0;
        for (uint c = t; c < n; c += threads_per_threadgroup.x) sum += float(x[row * n + c]);
        sum = simd_sum(sum);
        if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 0) {
            float total = 0;
            for (uint g = 0; g < simdgroups_per_threadgroup; g++) total += partial[g];
            y[row] = static_cast<T>(total);
        }
        """,
    )
    x = mx.random.normal((5, 301)).astype(dtype)
    (y,) = kernel(
        inputs=[x],
        template=[("T", dtype)],
        grid=(70, 5, 1),
        threadgroup=(70, 1, 1),
        output_shapes=[(5,)],
        output_dtypes=[dtype],
    )
    expected = x.astype(mx.float32).sum(axis=1).astype(dtype)
    np.testing.assert_allclose(*(np.array(a.astype(mx.float32)) for a in (y, expected)), rtol=1e-2)


def test_simd_operations() -> None:
    kernel = metal_kernel(
        "simd",
        ["x"],
        ["y"],
        """
        uint lane = thread_index_in_simdgroup;
        int v = x[lane];
        y[lane] = simd_shuffle_down(v, 3);
        y[32 + lane] = simd_shuffle_up(v, 3);
        y[64 + lane] = simd_shuffle_xor(v, 5);
        y[96 + lane] = simd_broadcast(v, 7);
        y[128 + lane] = simd_prefix_exclusive_sum(v);
        y[160 + lane] = simd_min(v) * 1000 + simd_max(v);
        y[192 + lane] = simd_any(v == 9) + 2 * simd_all(v != 9);
        y[224 + lane] = simd_and(v | 64) + simd_or(v) + simd_product(v & 1 ? 1 : -1);
        """,
    )
    x = np.random.default_rng(0).permutation(32).astype(np.int32)
    (y,) = kernel(
        inputs=[mx.array(x)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(8, 32)],
        output_dtypes=[mx.int32],
    )
    lane = np.arange(32)
    expected = [
        x[np.where(lane + 3 < 32, lane + 3, lane)],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[lane ^ 5],
        np.full(32, x[7]),
        np.cumsum(x) - x,
        np.full(32, 31),
        np.full(32, 1),
        np.full(32, 64 + 31 + 1),
    ]
    np.testing.assert_array_equal(np.array(y), np.stack(expected))


@pytest.mark.parametrize("contiguous", [True, False])
def test_strides_are_those_of_the_memory_given(contiguous: bool) -> None:
    kernel = metal_kernel(
        "copy",
        ["x"],
        ["y"],
        """
        uint3 at = thread_position_in_grid;
        y[at.y * threads_per_grid.x + at.x] = x[at.y * x_strides[0] + at.x * x_strides[1]];
        """,
        ensure_row_contiguous=contiguous,
    )
    x = mx.arange(12).reshape(3, 4)[:, 1:].T
    (y,) = kernel(
        inputs=[x],
        grid=(3, 3, 1),
        threadgroup=(2, 2, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    assert mx.array_equal(y, x)


def test_init_value_and_scalars() -> None:
    kernel = metal_kernel("add", ["n"], ["y"], "if (thread_position_in_grid.x < 2) y[0] += n;")
    (y,) = kernel(
        inputs=[3.0],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.float32],
        init_value=5,
    )
    assert y.tolist() == [8, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_mlx_quantized_helpers(bits: int, dtype: mx.Dtype) -> None:
    """The qmv of MLX's quantized.h, out of what comes before that file's matrix products."""
    header = QUANTIZED.read_text(encoding="utf-8").split("mlx::steel")[0]
    header = header[: header.rindex("template <")]
    width, rows, group = 1024, 16, 64
    kernel = metal_kernel(
        "qmv",
        ["w", "scales", "biases", "x"],
        ["y"],
        "qmv_fast_impl<T, group_size, bits>(w, scales, biases, x, y, x_shape[0], w_shape[0], "
        "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);",
        header=header,
    )
    mx.random.seed(0)
    x = mx.random.normal((width,)).astype(dtype)
    w, scales, biases = mx.quantize(mx.random.normal((rows, width)).astype(dtype), group, bits)
    (y,) = kernel(
        inputs=[w, scales, biases, x],
        template=[("T", dtype), ("group_size", group), ("bits", bits)],
        grid=(32, rows // 8 * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(rows,)],
        output_dtypes=[dtype],
    )
    # In float32: MLX's own product rounds every partial sum to the dtype on a CPU.
    x, scales, biases = (a.astype(mx.float32) for a in (x, scales, biases))
    expected = mx.dequantize(w, scales, biases, group, bits) @ x
    np.testing.assert_allclose(
        np.array(y.astype(mx.float32)), np.array(expected), rtol=1e-2, atol=1e-2
    )


def test_address_spaces_are_missed_only_where_they_are_missing() -> None:
    assert unqualified_pointer(QUANTIZED.read_text(encoding="utf-8")) is None
    assert (
        unqualified_pointer("const device float* x, thread T& y; a * b; const half* z")
        == "const half* z"
    )


def test_the_prelude_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes side by side compile with one file, which none may find half written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written: list[Path] = []
    write = Path.write_text

    def watched(path: Path, *args: object, **options: object) -> int:
        written.append(path)
        return write(path, *args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Path, "write_text", watched)
    first, again = (build._prelude.__wrapped__() for _ in range(2))
    assert first == again
    assert [path.name for path in written] == [first.name], "written once"
    assert written[0].parent != first.parent, "under a name of its own"
    assert list(first.parent.iterdir()) == [first]
