"""A stand-in for `mx.fast.metal_kernel` that executes Metal text on the host."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from lfm_mlx.kernels import metal
from metal_host import build
from metal_host.signature import Kernel, Template, metal_text, shape_parameters

ORDERS = ("forwards", "backwards", "shuffled")  # as in runtime.h
MAX_THREADS = 1024
SECONDS = 60


class KernelError(RuntimeError):
    """What a kernel did wrong while it ran."""


class _Buffer(ctypes.Structure):  # mirrored in memory.cpp
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    )


class HostKernel:
    """What `mx.fast.metal_kernel` returns; it computes at once, instead of when it is asked for.

    checked: run in every schedule order with all checks on, and compare the outputs; else run
    once, as fast as it goes.
    """

    def __init__(self, kernel: Kernel, ensure_row_contiguous: bool, checked: bool) -> None:
        self.kernel = kernel
        self.ensure_row_contiguous = ensure_row_contiguous
        self.checked = checked

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel over `grid` threads; MLX's arguments, MLX's result."""
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        if min(*grid, *threadgroup) < 1 or math.prod(threadgroup) > MAX_THREADS:
            raise KernelError(
                f"{self.kernel.name}: got grid {grid} and threadgroup {threadgroup}; "
                f"expected sizes above 0 and at most {MAX_THREADS} threads in a threadgroup"
            )
        if self.ensure_row_contiguous:
            arrays = [mx.contiguous(x) for x in arrays]
        before, after, host = metal_text(self.kernel, template or (), arrays, output_dtypes)
        if verbose:
            print(f"Generated source code for `{self.kernel.name}`:\n```")
            print(f"{self.kernel.header}{before}{self.kernel.source}{after}\n```")
        text = (
            f'#line 1 "{self.kernel.name}.header"\n{self.kernel.header}\n{before}'
            f'#line 1 "{self.kernel.name}.metal"\n{self.kernel.source}\n}}\n{host}'
        )
        given = self._inputs(arrays)
        runs = [(order, "checked") for order in ORDERS] if self.checked else []
        outputs: list[mx.array] = []
        for order, flavour in [*runs, ("forwards", "fast")]:
            made = [
                _filled(s, d, init_value) for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
            buffers = [_buffer(name, array) for name, array in given]
            for name, array in zip(self.kernel.output_names, made, strict=True):
                buffers.append(_buffer(name, array, True, init_value is not None))
            self._launch(text, flavour, order, buffers, (*grid, *threadgroup))
            now = [_to_mlx(a, d) for a, d in zip(made, output_dtypes, strict=True)]
            if outputs:
                self._compare(outputs, now, f"{order}, {flavour}")
            outputs = now
        return outputs

    def _inputs(self, arrays: Sequence[mx.array]) -> list[tuple[str, np.ndarray]]:
        """Every input buffer's name and memory, in the order of Metal's buffer numbers."""
        mx.eval(arrays)
        found: list[tuple[str, np.ndarray]] = []
        for name, array in zip(self.kernel.input_names, arrays, strict=True):
            memory = _to_numpy(array)
            found.append((name, memory))
            for extra in shape_parameters(self.kernel, name, array):
                values = {
                    f"{name}_shape": np.array(memory.shape, np.int32),
                    f"{name}_strides": np.array(memory.strides, np.int64) // memory.itemsize,
                    f"{name}_ndim": np.array(memory.ndim, np.int32),
                }
                found.append((extra, values[extra]))
        return found

    def _launch(
        self, text: str, flavour: str, order: str, buffers: list[_Buffer], sizes: tuple[int, ...]
    ) -> None:
        path, entry = _entry(text, flavour)
        said = _launcher()(
            entry,
            (_Buffer * len(buffers))(*buffers),
            len(buffers),
            (ctypes.c_uint32 * 6)(*sizes),
            ORDERS.index(order),
            flavour == "checked",
            SECONDS,
        )
        if said:
            message = _with_lines(said.decode(), path)
            raise KernelError(f"{self.kernel.name} ({flavour}, {order}): {message}")

    def _compare(self, old: list[mx.array], new: list[mx.array], run: str) -> None:
        for name, a, b in zip(self.kernel.output_names, old, new, strict=True):
            if not mx.array_equal(a, b, equal_nan=True):
                raise KernelError(
                    f"{self.kernel.name} ({run}): output {name} depends on the order in which "
                    "threads run, or on a local variable that was never set"
                )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, str] | None = None,
    *,
    checked: bool = True,
) -> HostKernel:
    """A kernel from the arguments of `mx.fast.metal_kernel`. The math mode has no meaning here."""
    if atomic_outputs:
        raise NotImplementedError("atomic outputs do not run on a host")
    kernel = Kernel(name, tuple(input_names), tuple(output_names), source, header)
    return HostKernel(kernel, ensure_row_contiguous, checked)


_BUILDERS = {flag: functools.partial(metal_kernel, checked=flag) for flag in (False, True)}


@contextlib.contextmanager
def installed(*, checked: bool = False) -> Iterator[None]:
    """Inside, lfm_mlx finds Metal to be there, and its kernels run on the host.

    checked: with all checks on, for small inputs; else fast, for whole models. Nothing is compiled
    by `mx.compile` inside, for kernels compute at once.
    """
    with (
        mock.patch.object(mx.fast, "metal_kernel", _BUILDERS[checked]),
        mock.patch.object(metal, "available", return_value=True),
    ):
        mx.disable_compile()
        try:
            with mock.patch.object(mx, "enable_compile"):
                yield
        finally:
            mx.enable_compile()


@functools.cache
def _launcher() -> Any:
    function = ctypes.PyDLL(str(build.runtime())).metal_launch  # PyDLL: one launch at a time
    function.restype = ctypes.c_char_p
    return function


@functools.cache
def _entry(text: str, flavour: str) -> tuple[Path, Any]:
    path = build.library(text, flavour)
    return path, ctypes.PyDLL(str(path)).metal_entry


def _with_lines(message: str, path: Path) -> str:
    """`message` with the addresses in it as lines of the kernel."""

    def line(address: re.Match[str]) -> str:
        command = ["addr2line", "-s", "-e", str(path), hex(int(address[1], 16) - 1)]
        return subprocess.run(command, capture_output=True, text=True).stdout.split(" (")[0].strip()

    return re.sub(r"<(0x[0-9a-f]+)>", line, message)


def _to_numpy(array: mx.array) -> np.ndarray:
    """The array's own memory; bfloat16, which NumPy lacks, as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _to_mlx(memory: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(memory)
    return array.view(dtype) if dtype == mx.bfloat16 else array


def _filled(shape: Sequence[int], dtype: mx.Dtype, value: float | None) -> np.ndarray:
    """An output before the launch: `value`, or NaN in every float type."""
    memory = np.array(_to_numpy(mx.full(shape, 0 if value is None else value, dtype)))
    if value is None:
        memory.view(np.uint8)[...] = 0xFF
    return memory


def _buffer(name: str, a: np.ndarray, writable: bool = False, initialised: bool = True) -> _Buffer:
    spans = [(size - 1) * stride for size, stride in zip(a.shape, a.strides, strict=True)]
    size = sum(spans) + a.itemsize if a.size else 0
    return _Buffer(a.ctypes.data, size, writable, initialised, name.encode())
