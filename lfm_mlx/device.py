"""The device's memory: its size, whether a run fits into it, and the peak of a run."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal

# What prefill's activations and MLX's own buffers take beside weights and cache.
WORKING_BYTES = 512 << 20


def device_bytes() -> int:
    """Bytes that the model may fill: Metal's recommended working set, else the machine's memory."""
    if metal.available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return machine_bytes()


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int:
    """The most memory this process has held: MLX's on Metal, else the resident set's peak."""
    if metal.available():
        return mx.get_peak_memory()
    if sys.platform == "linux":
        # getrusage would count what the parent held when it forked this process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def require_room(weight_bytes: int, cache_bytes: int, context: int) -> None:
    """Raise InputError if weights and the cache of `context` tokens cannot fit in memory."""
    needed, there = weight_bytes + cache_bytes + WORKING_BYTES, device_bytes()
    if needed > there:
        raise InputError(
            f"needs {needed / 1e9:.1f} GB (weights {weight_bytes / 1e9:.1f}, cache of {context} "
            f"tokens {cache_bytes / 1e9:.1f}), and the device has {there / 1e9:.1f} GB; take fewer "
            "bits, a shorter context (max_tokens), or force to try"
        )


@contextlib.contextmanager
def wired_limit() -> Iterator[None]:
    """Keep the model's memory wired on Apple silicon while the block runs; restored after."""
    if not metal.available():
        yield
        return
    before = mx.set_wired_limit(device_bytes())
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
