"""Whether Metal is there, which kernels may run, and how one is built from its text.

A kernel's text is the body of a Metal function, in the .metal file beside its Python face; MLX
writes the signature around it from the arrays it is called with. Sizes and dtypes come in as
template constants, floats as scalar inputs. MLX's defaults hold: inputs are made row-contiguous,
and Metal's math mode is `safe`. LFM_MLX_KERNELS=off|all|name,name is the default for models
loaded without `use_kernels`.
"""

import functools
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.errors import InputError

VARIABLE = "LFM_MLX_KERNELS"
OPERATIONS = ("short_conv", "norm_router", "qk_norm_rope", "projection", "experts", "sample")
# The operations that may run their kernels.
Kernels = frozenset[str]
NO_KERNELS: Kernels = frozenset()
# How a person says it: all or none, a text as in LFM_MLX_KERNELS, names; None for what that says.
UseKernels = bool | str | Collection[str] | None
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SIMD_WIDTH = 32
# The heads of MLX's functions as the kernels call them, and their bodies up to the closing brace.
HELPERS = (
    r"template <typename T, typename U, int values_per_thread, int bits>\ninline U load_vector\("
    r"const device T\* x, thread U\* x_thread\) \{\n.*?\n\}\n",
    r"template <typename U, int values_per_thread, int bits>\ninline U qdot\(\s*"
    r"const device uint8_t\* w,\s*const thread U\* x_thread,\s*U scale,\s*U bias,\s*U sum\) "
    r"\{\n.*?\n\}\n",
)

Kernel = Callable[..., list[mx.array]]


def available() -> bool:
    """True where arrays are computed by Metal."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def choose(operation: str, use_kernel: bool | None, refusal: str | None) -> bool:
    """Whether `operation` runs its kernel; `refusal` says why these inputs do not suit it.

    None: the kernel wherever it can run. Raises RuntimeError with the reason when the kernel was
    asked for and cannot run.
    """
    if use_kernel is None:
        return refusal is None and available()
    if use_kernel and not available():
        refusal = "arrays are not computed by Metal here"
    if use_kernel and refusal is not None:
        raise RuntimeError(f"{operation}: the Metal kernel cannot run: {refusal}")
    return use_kernel


def among(kernels: Kernels, operation: str) -> bool | None:
    """`use_kernel` for an operation, where `kernels` may run."""
    return None if operation in kernels else False


def chosen(use_kernels: UseKernels = None) -> Kernels:
    """The operations whose kernels may run.

    use_kernels: True for all, False for none, names, or a text as in LFM_MLX_KERNELS; None takes
        what that variable says, and all where it is not set

    Raises InputError for a name that is no operation's.
    """
    if use_kernels is None:
        return _parse(os.environ.get(VARIABLE, "all"), f"{VARIABLE} is ")
    if isinstance(use_kernels, bool):
        return frozenset(OPERATIONS) if use_kernels else NO_KERNELS
    setting = use_kernels if isinstance(use_kernels, str) else ",".join(use_kernels)
    return _parse(setting or "off", "kernels are ")


@functools.cache
def _parse(setting: str, subject: str) -> Kernels:
    if setting in ("", "all", "off"):
        return NO_KERNELS if setting == "off" else frozenset(OPERATIONS)
    names = frozenset(name.strip() for name in setting.split(","))
    if names - set(OPERATIONS):
        raise InputError(
            f"{subject}{setting!r}; expected off, all, or names of {', '.join(OPERATIONS)}"
        )
    return names


def kernel(
    file: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str = ""
) -> Kernel:
    """The kernel whose body is `file`.metal, built at its first use in this process.

    name: what Metal's tools show, with the kernel's limits; header: what the body calls
    """
    # Keyed by the builder too, so that a stand-in for it gets kernels of its own.
    return _built(mx.fast.metal_kernel, file, name, inputs, outputs, header)


@functools.cache
def _built(
    build: Callable[..., Any],
    file: str,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    header: str,
) -> Kernel:
    return build(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=text(f"{file}.metal"),
        header=header,
    )


def text(file: str) -> str:
    """A file of this folder without its comments, which MLX would hash at every launch."""
    source = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return re.sub(r"^[ \t]*//.*\n|[ \t]*//.*", "", source, flags=re.M)


@functools.cache
def weight_reader(packed: bool) -> str:
    """The text of `load_vector` and `qdot`, by which kernels read packed or dense weights.

    For packed weights it is MLX's own, tuned and tested, out of the installed package; empty
    where the package has it not, or in another form.
    """
    if not packed:
        return text("dense.h")
    tuned = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/quantized.h"
    whole = tuned.read_text(encoding="utf-8") if tuned.exists() else ""
    found = [match.group() for name in HELPERS if (match := re.search(name, whole, re.S))]
    return "\n".join(["using namespace metal;", *found]) if len(found) == len(HELPERS) else ""
