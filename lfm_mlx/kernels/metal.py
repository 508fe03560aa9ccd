"""Whether Metal is there, and the policy that every kernel's door shares."""

import mlx.core as mx


def available() -> bool:
    """True where arrays are computed by Metal."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def choose(operation: str, use_kernel: bool | None, refusal: str | None) -> bool:
    """Whether `operation` runs its kernel; `refusal` says why it cannot, None that it can.

    Raises RuntimeError with the reason when the kernel was asked for and cannot run.
    """
    if use_kernel and refusal is not None:
        raise RuntimeError(f"{operation}: the Metal kernel cannot run: {refusal}")
    return refusal is None and use_kernel is not False
