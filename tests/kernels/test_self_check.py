"""A kernel that is wrong on this machine is found before a model relies on it, and left out."""

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import twins

from lfm_mlx.kernels import metal, self_check
from lfm_mlx.kernels.matrix import Matrix


def test_every_operation_is_checked() -> None:
    assert set(self_check.CHECKS) == set(metal.OPERATIONS)


def test_the_kernels_pass(caplog: pytest.LogCaptureFixture) -> None:
    with twins.kernels(checked=False):
        assert self_check.working(metal.chosen(True)) == frozenset(metal.OPERATIONS)
        assert self_check.working(frozenset({"experts"})) == {"experts"}
    assert not caplog.records


def test_a_gpu_that_multiplies_in_tf32_is_no_fault_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an M5 does with float32 matrices of two rows and more, while the CPU does not."""
    streams: list[mx.Device] = []
    plain = Matrix.times

    def times(self: Matrix, x: mx.array) -> mx.array:
        streams.append(mx.default_stream(mx.default_device()).device)
        dense = self.scales is None and x.dtype == mx.float32
        if dense and min(x.size // x.shape[-1], self.weight.shape[0]) > 1:
            return plain(self._replace(weight=tf32(self.weight)), tf32(x))
        return plain(self, x)

    monkeypatch.setattr(Matrix, "times", times)
    assert tf32(mx.array([1 + 2**-12, 1 + 2**-10])).tolist() == [1, 1 + 2**-10]
    with twins.kernels(checked=False):
        assert self_check.disagreement("norm_router") < self_check.TOLERANCE
        assert self_check.disagreement("projection") < self_check.TOLERANCE
    assert {device.type for device in streams} == {mx.DeviceType.cpu}


def tf32(x: mx.array) -> mx.array:
    """Rounded to TF32's 10 bits."""
    bits = np.array(x).view(np.uint32).astype(np.uint64)
    return mx.array(
        ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13 << 13).astype(np.uint32).view(np.float32)
    )


def test_whoever_turned_compilation_off_keeps_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(mx, "enable_compile", lambda: enabled.append(True))
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    with self_check.on_the_cpu():
        pass
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    with self_check.on_the_cpu():
        pass
    monkeypatch.undo()
    mx.enable_compile()
    assert enabled == [True]


@pytest.mark.parametrize("operation", metal.OPERATIONS)
def test_a_wrong_kernel_is_left_out_with_one_warning(
    operation: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = self_check.CHECKS[operation]

    def wrong(use_kernel: bool) -> tuple[mx.array, ...]:
        first, *others = real(False)
        return (first * 1.001 if use_kernel else first, *others)

    monkeypatch.setitem(self_check.CHECKS, operation, wrong)
    builder = object()
    assert not self_check.passes(builder, operation)
    assert not self_check.passes(builder, operation)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"kernel {operation} is switched off: it is off by" in record.getMessage()


def broken(use_kernel: bool) -> tuple[mx.array, ...]:
    if use_kernel:
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: x")
    return (mx.ones(2),)


def not_a_number(use_kernel: bool) -> tuple[mx.array, ...]:
    return (mx.array([1.0, float("nan") if use_kernel else 2.0]),)


@pytest.mark.parametrize(
    ("check", "reason"), [(broken, "does not run"), (not_a_number, "off by nan")]
)
def test_what_does_not_compile_or_makes_no_numbers(
    check: Callable[[bool], Any], reason: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(self_check.CHECKS, "experts", check)
    assert not self_check.passes(object(), "experts")
    assert reason in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
