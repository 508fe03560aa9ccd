"""A kernel that is wrong on this machine is found before a model relies on it, and left out."""

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
import twins

from lfm_mlx.kernels import metal, self_check


def test_every_operation_is_checked() -> None:
    assert set(self_check.CHECKS) == set(metal.OPERATIONS)


def test_the_kernels_pass(caplog: pytest.LogCaptureFixture) -> None:
    with twins.kernels(checked=False):
        assert self_check.working(metal.chosen(True)) == frozenset(metal.OPERATIONS)
        assert self_check.working(frozenset({"experts"})) == {"experts"}
    assert not caplog.records


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
