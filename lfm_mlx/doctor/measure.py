"""A case tried on this machine: how far from exact, and how long, kernel and operations are.

Exact is the reference in float32 on the CPU, so a GPU that computes float32 in fewer bits is not
taken for a kernel's fault: a kernel is wrong where it is clearly farther from exact than the
operations are.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.doctor.cases import Arrays, Case, Run
from lfm_mlx.errors import one_line
from lfm_mlx.kernels import metal

OK, SLOWER, WRONG, DOES_NOT_RUN, NO_METAL = "ok", "slower", "WRONG", "does not run", "no Metal"
# A kernel may be this many times as far from exact as the operations, and a rounding more.
FARTHER = 1.5
ROUNDING = {mx.float32: 1e-4, mx.float16: 2**-10, mx.bfloat16: 2**-7}
# What a kernel may take, of the operations' time, before it counts as slower.
NOISE = 1.05
# A chain is as long as fits in this time, so that starting it does not count.
CHAIN_SECONDS = 0.05
LONGEST_CHAIN = 200


@dataclass(frozen=True)
class Measurement:
    """Result of one case; errors are relative to the largest exact value."""

    kernel: str
    part: str
    weights: str
    tokens: int
    dtype: str
    verdict: str
    reference_microseconds: float
    kernel_microseconds: float | None = None
    relative_error: float | None = None
    reference_relative_error: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Kernel time divided by reference time."""
        if self.kernel_microseconds is None:
            return None
        return self.kernel_microseconds / self.reference_microseconds

    def record(self) -> dict[str, Any]:
        """For JSON, which knows neither NaN nor infinity."""
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def examine(case: Case, rounds: int) -> Measurement:
    """The kernel of a case beside its reference; the reference alone where Metal is not there."""
    if not metal.available():
        return Measurement(*named(case), NO_METAL, operations_alone(case, rounds))
    got = attempt(case)
    if isinstance(got, str):
        return Measurement(*named(case), DOES_NOT_RUN, operations_alone(case, rounds), reason=got)
    errors = distances(case, got)
    took = microseconds(
        {"operations": case.with_operations, "kernel": case.with_kernel}, case, rounds
    )
    right = all(ours <= FARTHER * theirs + ROUNDING[case.dtype] for ours, theirs in errors)
    in_time = took["kernel"] <= NOISE * took["operations"]
    verdict = WRONG if not right else OK if in_time else SLOWER
    ours, theirs = np.max(errors, axis=0).tolist()
    return Measurement(*named(case), verdict, took["operations"], took["kernel"], ours, theirs)


def named(case: Case) -> tuple[str, str, str, int, str]:
    dtype = str(case.dtype).rpartition(".")[2]
    return case.kernel, case.part, case.weights, case.tokens, dtype


def operations_alone(case: Case, rounds: int) -> float:
    return microseconds({"operations": case.with_operations}, case, rounds)["operations"]


def attempt(case: Case) -> Arrays | str:
    """The kernel's outputs, or the reason why it does not run."""
    try:
        found = case.with_kernel(case.inputs)
        mx.eval(found)
    except Exception as problem:  # whatever a compiler or a driver may say
        return one_line(problem)
    return found


def distances(case: Case, got: Arrays) -> list[tuple[float, float]]:
    """Distance of each output of kernel and operations from the exact one."""
    same, exact = case.with_operations(case.inputs), case.exact()
    return [
        (distance(ours, wanted) if alike(ours, theirs) else float("inf"), distance(theirs, wanted))
        for ours, theirs, wanted in zip(got, same, exact, strict=True)
    ]


def alike(ours: mx.array, theirs: mx.array) -> bool:
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def distance(found: mx.array, exact: mx.array) -> float:
    """The largest difference, relative to the largest exact value."""
    with mx.stream(mx.cpu):
        wanted = exact.astype(mx.float32)
        apart = mx.abs(found.astype(mx.float32) - wanted).max()
        largest = mx.abs(wanted).max()
        return float(np.array(apart)) / float(np.array(largest))


def microseconds(runs: Mapping[str, Run], case: Case, rounds: int) -> dict[str, float]:
    """Seconds for one run of each: medians of `rounds`, in which they take turns."""
    for run in runs.values():
        seconds(run, case, 1)
    once = max(seconds(run, case, 1) for run in runs.values())
    length = max(1, min(LONGEST_CHAIN, int(CHAIN_SECONDS / once)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run, case, length) / length)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def seconds(run: Run, case: Case, length: int) -> float:
    """Seconds for a chain of runs once Python has built it."""
    chain = case.chain(run, length)
    began = time.perf_counter()
    mx.eval(chain)
    return time.perf_counter() - began
