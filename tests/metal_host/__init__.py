"""Metal kernels on the host: the text of `mx.fast.metal_kernel`, executed and checked.

See README.md for how it works and for what it cannot see.
"""

from metal_host.build import CompileError, available, refusal
from metal_host.kernel import HostKernel, KernelError, installed, metal_kernel

__all__ = [
    "CompileError",
    "HostKernel",
    "KernelError",
    "available",
    "installed",
    "metal_kernel",
    "refusal",
]
