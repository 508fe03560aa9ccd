"""The doctor's verdicts: kernels that are right, slow, wrong or do not run, on the host harness."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
import twins

from lfm_mlx import device
from lfm_mlx.cli.command import run
from lfm_mlx.doctor import measure, program
from lfm_mlx.doctor.cases import Case, Run, Sizes, cases, wide
from lfm_mlx.errors import InputError
from lfm_mlx.kernels import experts, metal, short_conv

TINY = Sizes(
    hidden=64, dense=128, expert=64, experts=8, chosen=2, heads=4, kv_heads=2, head_dim=16, taps=3,
    vocab=96, tokens=(1, 3), prompt=19,
)  # fmt: skip
ONE = ["--quick", "--dtype", "float32", "--runs", "1"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that each way to run takes, instead of a clock's."""
    taken = {"with_kernel": 1.0, "with_operations": 2.0}

    def seconds(run: Run, case: Case, length: int) -> float:
        mx.eval(case.chain(run, 1))
        return taken[run.__name__] * length

    monkeypatch.setattr(measure, "seconds", seconds)
    return taken


@pytest.fixture
def metal_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Metal, or the harness in its place on a machine that has memory as a CPU has."""
    if metal.available():
        yield
        return
    there = device.device_bytes()
    monkeypatch.setattr(device, "device_bytes", lambda: there)
    monkeypatch.setattr(device, "wired_limit", contextlib.nullcontext)
    # The harness cannot compile: what is exact must not leave that switched on.
    with twins.kernels(checked=False), mock.patch.object(mx, "enable_compile"):
        yield


def examined(
    capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[str], dict[str, Any]]:
    """The exit code, the lines that were printed, and the record in the last of them."""
    code = run(lambda: program.main([*ONE, *options], TINY), "doctor")
    *lines, last = capsys.readouterr().out.splitlines()
    return code, lines, json.loads(last, parse_constant=pytest.fail)


@pytest.mark.slow
@pytest.mark.usefixtures("clock", "metal_here")
def test_every_kernel_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, record = examined(capsys)
    assert code == 0
    assert {row["kernel"] for row in record["findings"]} == set(metal.OPERATIONS)
    assert {row["verdict"] for row in record["findings"]} == {"ok"}
    assert all(0 <= row["relative_error"] <= 1e-4 for row in record["findings"])
    assert sum(line.endswith("  ok") for line in lines) == len(record["findings"])
    assert "none is slower than the operations" in "\n".join(lines)
    assert record["wrong"] == record["does_not_run"] == record["slower"] == []
    assert record["suggested"] is None
    assert record["decode"]["first_different_token"] is None
    assert set(record["decode"]["tokens_per_second"]) == {"kernels", "operations"}
    assert "the tokens are equal" in lines


def off_by(share: float) -> Callable[..., mx.array]:
    def kernel(*arguments: Any) -> mx.array:
        y = experts.experts_reference(*arguments)
        return y + share * mx.abs(y).max()

    return kernel


@pytest.mark.usefixtures("clock", "metal_here")
def test_a_wrong_kernel_is_told_and_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_experts_metal", off_by(1e-3))
    monkeypatch.setenv(metal.VARIABLE, "short_conv,experts")
    code, lines, record = examined(capsys, "--kernel", "experts", "--kernel", "short_conv")
    assert code == 1
    assert record["wrong"] == ["experts"]
    assert record["suggested"] == "LFM_MLX_KERNELS=short_conv"
    assert {"WRONG here: experts", "to leave them out: LFM_MLX_KERNELS=short_conv"} <= set(lines)
    verdicts = {(row["kernel"], row["verdict"]) for row in record["findings"]}
    assert verdicts == {("experts", "WRONG"), ("short_conv", "ok")}
    assert record["decode"]["first_different_token"] is None, "it decodes without the wrong kernel"


def raises(*_: Any) -> tuple[mx.array, mx.array]:
    raise RuntimeError("[metal::Device] Unable to build metal library\nerror: x")


def nothing_but_nan(bcx: mx.array, *others: Any) -> tuple[mx.array, mx.array]:
    y, window = short_conv.short_conv_reference(bcx, *others)
    return y * float("nan"), window


def half(*arguments: Any) -> tuple[mx.array, ...]:
    return tuple(y.astype(mx.float16) for y in short_conv.short_conv_reference(*arguments))


@pytest.mark.usefixtures("clock", "metal_here")
@pytest.mark.parametrize(
    ("kernel", "matter", "told"),
    [
        (raises, "does_not_run", "does not run: [metal::Device] Unable to build metal library err"),
        (nothing_but_nan, "wrong", "nan"),
        (half, "wrong", "inf"),
    ],
)
def test_what_does_not_compile_or_makes_something_else(
    kernel: Callable[..., Any], matter: str, told: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(short_conv, "_short_conv_metal", kernel)
    monkeypatch.setenv(metal.VARIABLE, "short_conv")
    code, lines, record = examined(capsys, "--kernel", "short_conv")
    assert code == 1
    assert record[matter] == ["short_conv"]
    assert record["suggested"] == "LFM_MLX_KERNELS=off"
    assert told in "\n".join(lines)


@pytest.mark.usefixtures("metal_here")
def test_a_slow_kernel_is_told_but_is_no_fault(
    capsys: pytest.CaptureFixture[str], clock: dict[str, float]
) -> None:
    clock["with_kernel"] = 3.0
    code, lines, record = examined(capsys, "--kernel", "short_conv")
    assert code == 0
    assert {row["verdict"] for row in record["findings"]} == {"slower"}
    assert record["slower"] == ["short_conv"]
    assert "slower here: short_conv" in lines
    assert "short_conv" not in record["suggested"]
    assert record["suggested"].count(",") == len(metal.OPERATIONS) - 2


@pytest.mark.skipif(metal.available(), reason="Metal is there")
def test_without_metal_the_operations_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, record = examined(capsys, "--kernel", "short_conv")
    assert code == 0
    assert sum("Metal is not there" in line for line in lines) == 1
    assert {row["verdict"] for row in record["findings"]} == {"no Metal"}
    assert all(row["reference_microseconds"] > 0 for row in record["findings"])
    assert record["suggested"] is None
    assert [*record["decode"]["tokens_per_second"]] == ["operations"]
    assert record["doctor"]["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        (["--runs", "0"], "all", "--runs is 0; expected 1 or more"),
        (["--model", "no/such/folder"], "all", "no/such/folder"),
        ([], "fast", "LFM_MLX_KERNELS is 'fast'; expected off, all"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    options: list[str], environment: str, told: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(metal.VARIABLE, environment)
    monkeypatch.setattr(program, "find", lambda *_: pytest.fail("nothing is to be measured"))
    assert run(lambda: program.main(options, TINY), "doctor") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_a_kernel_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="invalid choice: 'fast'"):
        program.main(["--kernel", "fast"], TINY)


@pytest.mark.parametrize("dtype", twins.DTYPES)
def test_cases_are_what_they_say(dtype: mx.Dtype) -> None:
    """Every operation, in every way to store weights, in one dtype; a run follows from another."""
    seen = set()
    for case in cases(TINY, dtype):
        seen.add((case.kernel, case.weights))
        first, second = case.chain(case.with_operations, 2)
        assert [y.shape for y in first] == [y.shape for y in second]
        floating = [y for y in first if mx.issubdtype(y.dtype, mx.floating)]
        assert {y.dtype for y in floating} == {mx.float32 if case.kernel == "sample" else dtype}
        assert not mx.array_equal(first[0], second[0]), "the second run does not need the first"
    read = {("projection", "4-bit"), ("experts", "4-bit"), ("norm_router", "8-bit")}
    dense = {(name, "dense") for name, _ in read}
    assert seen == read | dense | {("short_conv", ""), ("qk_norm_rope", ""), ("sample", "")}


def test_the_head_is_left_out_where_there_is_no_vocabulary() -> None:
    parts = [case.part for case in cases(TINY, mx.float32, ["projection"])]
    quick = [
        case.part for case in cases(Sizes(**vars(TINY) | {"vocab": 0}), mx.float32, ["projection"])
    ]
    assert [part for part in parts if part != "head"] == quick
    assert "head" in parts


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_no_rounding_changes_what_the_router_is_asked(dtype: mx.Dtype) -> None:
    for case in cases(TINY, dtype, ["norm_router"]):
        _, indices, _ = case.with_operations(case.inputs)
        _, exact, _ = case.exact()
        assert mx.array_equal(indices, exact)


def test_the_clock_counts_a_run_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def seconds(run: Run, case: Case, length: int) -> float:
        lengths.append(length)
        return 0.001 * length + (0.5 if len(lengths) == 1 else 0)

    monkeypatch.setattr(measure, "seconds", seconds)
    (case, *_) = cases(TINY, mx.float32, ["short_conv"])
    took = measure.microseconds({"operations": case.with_operations}, case, 3)
    assert lengths == [1, 1, 50, 50, 50], "once to warm up, once for the length, then the rounds"
    assert took == {"operations": pytest.approx(1000)}


def test_what_is_exact_leaves_compilation_on() -> None:
    (case, *_) = cases(TINY, mx.float32, ["short_conv"])
    case.exact()
    traced = []
    doubled = mx.compile(lambda x: traced.append(None) or x * 2)
    mx.eval(doubled(mx.ones(3)), doubled(mx.ones(3)))
    assert len(traced) == 1


def test_errors_are_judged_by_what_the_operations_do() -> None:
    (case, *_) = cases(TINY, mx.bfloat16, ["short_conv"])
    y, window = case.exact()
    same = case.with_operations(case.inputs)
    for (ours, theirs), found, exact in zip(
        measure.distances(case, same), same, (y, window), strict=True
    ):
        assert ours == theirs == pytest.approx(measure.distance(wide(found), exact))
        assert ours < 2**-7
