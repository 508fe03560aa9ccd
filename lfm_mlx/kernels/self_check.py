"""Every kernel beside its reference on a few numbers, once a process, before a model relies on it.

The reference runs on the CPU, in float32: an M5's GPU takes the product of two float32 rows or
more in TF32. A kernel that this machine's Metal does not compile, or that says something else than
its reference, is left out with one warning. `python -m lfm_mlx.doctor` looks more closely.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from lfm_mlx.errors import one_line
from lfm_mlx.kernels.experts import experts
from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.metal import Kernels
from lfm_mlx.kernels.projection import projection
from lfm_mlx.kernels.qk_norm_rope import qk_norm_rope
from lfm_mlx.kernels.router import norm_router
from lfm_mlx.kernels.sample import RowSampling, Seen, sample
from lfm_mlx.kernels.short_conv import short_conv

log = logging.getLogger("lfm_mlx")
# Relative to the largest value: float32 sums in another order.
TOLERANCE = 1e-4


def working(kernels: Kernels) -> Kernels:
    """Those of `kernels` that agree with their references here."""
    return frozenset(name for name in kernels if passes(mx.fast.metal_kernel, name))


@functools.cache
def passes(builder: Any, operation: str) -> bool:
    """Whether the kernel agrees; warns where it does not. `builder` is what compiles kernels."""
    try:
        error = disagreement(operation)
    except Exception as problem:  # whatever a compiler or a driver may say
        reason = f"it does not run ({one_line(problem)})"
    else:
        if error <= TOLERANCE:
            return True
        reason = f"it is off by {error:.1e} of the largest value"
    log.warning(
        "kernel %s is switched off: %s; `python -m lfm_mlx.doctor` tells more", operation, reason
    )
    return False


def disagreement(operation: str) -> float:
    """The kernel's largest difference from its reference, relative to the largest value."""
    run = CHECKS[operation]
    found = run(True)
    mx.eval(found)
    worst = 0.0
    with on_the_cpu():
        for got, wanted in zip(found, run(False), strict=True):
            apart = mx.abs(got.astype(mx.float32) - wanted.astype(mx.float32)).max()
            relative: Any = (apart / mx.abs(wanted.astype(mx.float32)).max()).item()
            # Not max(): that lets NaN through.
            worst = worst if relative <= worst else relative
    return worst


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, operations run there, uncompiled: for that MLX would need a C++ compiler."""
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def waves(*shape: int, seed: float) -> mx.array:
    """Numbers between -1 and 1 without a pattern, and without touching MLX's random state."""
    size = 1
    for length in shape:
        size *= length
    return mx.sin(mx.arange(size) * seed + seed).reshape(shape)


def packed(*shape: int, seed: float) -> Matrix:
    return Matrix(*mx.quantize(waves(*shape, seed=seed), 32, 4), 32, 4)


def check_short_conv(use_kernel: bool) -> tuple[mx.array, ...]:
    bcx, taps, window = (waves(1, 3, 24, seed=2.3), waves(8, 3, seed=3.1), waves(1, 2, 8, seed=4.7))
    return short_conv(bcx, taps, None, window, use_kernel=use_kernel)


def check_norm_router(use_kernel: bool) -> tuple[mx.array, ...]:
    x, gate, bias = waves(2, 64, seed=2.3), waves(8, 64, seed=5.9), waves(8, seed=7.7)
    layer = (waves(64, seed=1.9), 1e-5, Matrix(gate), bias, 2)
    # The reference takes a token at a time, which is a product that every device takes in float32.
    rows = (x,) if use_kernel else (x[:1], x[1:])
    found = [norm_router(row, *layer, use_kernel=use_kernel) for row in rows]
    return tuple(mx.concatenate(list(parts)) for parts in zip(*found, strict=True))


def check_qk_norm_rope(use_kernel: bool) -> tuple[mx.array, ...]:
    qkv, norms = waves(1, 2, 4 * 16, seed=2.3), (waves(16, seed=1.9), waves(16, seed=2.9))
    options = {"eps": 1e-5, "base": 1e4, "offset": 3, "use_kernel": use_kernel}
    return qk_norm_rope(qkv, *norms, 2, 1, **options)


def check_projection(use_kernel: bool) -> tuple[mx.array, ...]:
    x, norm, residual = waves(1, 64, seed=2.3), waves(64, seed=1.9), waves(1, 8, seed=3.7)
    matrices = (waves(16, 64, seed=4.3), packed(16, 64, seed=5.3))
    return tuple(
        projection(
            *(x, matrix if isinstance(matrix, Matrix) else Matrix(matrix)),
            norm_weight=norm,
            swiglu=True,
            residual=residual,
            use_kernel=use_kernel,
        )
        for matrix in matrices
    )


def check_experts(use_kernel: bool) -> tuple[mx.array, ...]:
    x, indices, weights = waves(2, 64, seed=2.3), mx.array([[1, 3], [0, 1]]), waves(2, 2, seed=1.7)
    projections = (packed(4, 32, 64, seed=3.3), packed(4, 32, 64, seed=4.1))
    down = packed(4, 64, 32, seed=5.7)
    return (experts(x, indices, weights, *projections, down, x, use_kernel=use_kernel),)


def check_sample(use_kernel: bool) -> tuple[mx.array, ...]:
    logits = 5 * waves(3, 300, seed=6.1)
    seen = Seen((waves(3, 300, seed=2.7) > 0.5).astype(mx.uint16), mx.array([-1, 7, 11], mx.int32))
    rows = (
        RowSampling(),
        RowSampling(0.8, top_k=20, repetition_penalty=1.1),
        RowSampling(1.2, top_p=0.7, min_p=0.01, presence_penalty=0.5),
    )
    allowed = waves(3, 300, seed=4.9) > -0.8
    drawn = sample(logits, rows, (0.0, 0.4, 0.8), seen, None, allowed, use_kernel=use_kernel)
    return drawn.tokens, drawn.logprobs


CHECKS: dict[str, Callable[[bool], tuple[mx.array, ...]]] = {
    "short_conv": check_short_conv,
    "norm_router": check_norm_router,
    "qk_norm_rope": check_qk_norm_rope,
    "projection": check_projection,
    "experts": check_experts,
    "sample": check_sample,
}
