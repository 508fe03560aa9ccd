"""The text that `mx.fast.metal_kernel` writes around a kernel's body, and how a host calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}
# What a thread can ask about itself, in MLX's order; a parameter is there when the body names it.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
CONSTANT_BELOW = 8  # inputs with fewer elements lie in the constant address space

Value = bool | int | mx.Dtype
Template = Sequence[tuple[str, Value]]


@dataclass(frozen=True)
class Kernel:
    """What a kernel is made of: the arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    atomic_outputs: bool = False


def shape_parameters(kernel: Kernel, name: str, array: mx.array) -> list[str]:
    """Which of `x_shape`, `x_strides` and `x_ndim` come after the input `x`."""
    names = [f"{name}_{part}" for part in ("shape", "strides", "ndim")]
    return [n for n in names if n in kernel.source] if array.ndim else []


def metal_text(
    kernel: Kernel, template: Template, inputs: Sequence[mx.array], dtypes: Sequence[mx.Dtype]
) -> tuple[str, str, str]:
    """MLX's text before the body and after it, and a host's function that calls the kernel.

    The host's function gets the buffers' addresses in the order of Metal's buffer numbers, and the
    thread's position.
    """
    buffers: list[tuple[str, str]] = []  # a parameter's type with its * or &, and its name
    for name, array in zip(kernel.input_names, inputs, strict=True):
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        mark = "*" if array.ndim else "&"
        buffers.append((f"const {space} {TYPES[array.dtype]}{mark}", name))
        kinds = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}
        for extra in shape_parameters(kernel, name, array):
            buffers.append((f"const constant {kinds[extra.rsplit('_', 1)[1]]}", extra))
    for name, dtype in zip(kernel.output_names, dtypes, strict=True):
        element = f"atomic<{TYPES[dtype]}>" if kernel.atomic_outputs else TYPES[dtype]
        buffers.append((f"device {element}*", name))
    attributes = [(kind, name) for name, kind in ATTRIBUTES.items() if name in kernel.source]

    parameters = [f"  {kind} {name} [[buffer({i})]]" for i, (kind, name) in enumerate(buffers)]
    parameters += [f"  {kind} {name} [[{name}]]" for kind, name in attributes]
    full_name = _full_name(kernel.name, template, inputs, dtypes)
    before = f"[[kernel]] void {full_name}(\n" + ",\n".join(parameters) + ") {\n"
    called, after = full_name, "\n}\n"
    if template:
        names = ", ".join(f"{_kind(value)} {name}" for name, value in template)
        before = f"template <{names}>\n{before}"
        called += f"<{', '.join(_value(value) for _, value in template)}>"
        after += (
            f'\ntemplate [[host_name("{full_name}")]] [[kernel]] decltype({called}) {called};\n'
        )

    arguments = [_argument(kind, f"buffers[{i}]") for i, (kind, _) in enumerate(buffers)]
    arguments += [f"at->{name}" for _, name in attributes]
    host = (
        'extern "C" __attribute__((no_sanitize("thread"), visibility("default")))\n'
        "void metal_entry(const device ulong* buffers, const device Position* at) {\n"
        f"  {called}({', '.join(arguments)});\n}}\n"
    )
    return before, after, host


def _argument(kind: str, address: str) -> str:
    return f"*({kind[:-1]}*){address}" if kind.endswith("&") else f"({kind}){address}"


def _kind(value: Value) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"


def _value(value: Value) -> str:
    return TYPES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _full_name(
    name: str, template: Template, inputs: Sequence[mx.array], dtypes: Sequence[mx.Dtype]
) -> str:
    parts = [f"custom_kernel_{name}"]
    if template:
        parts.append("_" + "_".join(_value(value) for _, value in template).replace("-", "_"))
    for array in inputs:
        size = "s" if array.ndim == 0 else "c" if array.size < CONSTANT_BELOW else ""
        parts.append(TYPES[array.dtype] + size)
    return "_".join(parts + [TYPES[dtype] for dtype in dtypes])
