"""Benchmarks count what there is to count, and compare what gives the same."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import twins
from models import as_numpy

from benchmarks import kernels, launches, on_paper
from lfm_mlx.doctor.cases import Case, Sizes, cases
from lfm_mlx.kernels import metal

TINY = Sizes(
    hidden=64, dense=128, expert=64, experts=8, chosen=2, heads=4, kv_heads=2, head_dim=16, taps=3,
    vocab=96, tokens=(1, 3), prompt=19,
)  # fmt: skip


ROOT = Path(__file__).parents[1]
# Those that need what the package's environment has not are left out.
FILES = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")])
LIBRARIES = {"model_card", "make_reference", "on_paper"}
PROGRAMS = [file for file in FILES if file.stem not in LIBRARIES]
PROGRAMS.append(ROOT / "scripts" / "demo" / "evaluate.py")


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_every_program_tells_its_options(file: Path) -> None:
    done = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(("engine", "of_a_token"), [("kernels", 167), ("mlx-lm", 723)])
def test_launches_of_a_token(engine: str, of_a_token: int) -> None:
    found = launches.by_kind(engine, 4)
    assert found["a token"] == of_a_token
    assert sum(found[kind] * number for kind, number in launches.NUMBERS.items()) == of_a_token


def test_a_view_is_no_launch_and_a_concatenation_copies_each_input() -> None:
    a, b = mx.ones((2, 3)), mx.ones((4, 3))
    mx.eval(a, b)
    assert on_paper.count([a.reshape(3, 2)[1:]]) == 0
    assert on_paper.count([mx.concatenate([a, b])]) == 2
    assert on_paper.count([mx.abs(a) + 1.0]) == 2


def test_launches_of_a_sampled_token() -> None:
    assert launches.launches("kernels", launches.FULL, 4, launches.RECOMMENDED) == 167


def test_a_token_in_few_command_buffers() -> None:
    found = launches.cuts(4)
    assert found["mlx-lm"]["Max, Ultra"] == 24
    assert found["kernels"]["Max, Ultra"] == 24
    assert found["kernels"]["ours"] <= 5


def test_where_a_command_buffer_ends() -> None:
    """After the primitive that exceeds a limit; an array counts once in a buffer."""
    mebi = 1 << 20
    first, second, third = (
        on_paper.Launch(1, [("x", mebi), (name, mebi)], 0) for name in ("y", "z", "y")
    )
    assert on_paper.command_buffers([first, first, first], 40, 2) == 1
    assert on_paper.command_buffers([first, second, third], 40, 2) == 2
    assert on_paper.command_buffers([first, second, third, third], 2, 40) == 2
    assert on_paper.command_buffers([first, second], 1, 40) == 1, "both in the one that is ended"


def test_a_trace_is_what_is_counted() -> None:
    with on_paper.on_paper():
        model = launches.ours(True, launches.FULL, 4)
        cache = launches.begun(launches.FULL, model)
        made = launches.step(model, cache, launches.drawing(model, launches.GREEDY))
        assert sum(launch.kernels for launch in on_paper.trace(made)) == on_paper.count(made)


def test_a_prompt_leaves_little_memory_pending() -> None:
    found = launches.prompt_pending_bytes(4, 2048)
    assert found["evaluated every few layers"] < 1.3e9
    assert found["evaluated at its end"] > 5 * found["evaluated every few layers"]


def chosen_weights(indices: mx.array, weights: mx.array) -> np.ndarray:
    """Each token's weights in the order of its experts' numbers, whichever order they came in."""
    order = mx.argsort(indices, axis=-1)
    return as_numpy(mx.take_along_axis(weights, order, axis=-1))


def merged(case: Case, found: tuple[mx.array, ...]) -> list[np.ndarray]:
    """Outputs as they can be compared: mlx-lm projects apart and leaves its experts unsorted."""
    if case.kernel == "norm_router":
        normed, indices, weights = found
        return [as_numpy(normed), np.sort(np.array(indices)), chosen_weights(indices, weights)]
    if case.kernel == "projection":
        return [as_numpy(mx.concatenate(found, axis=-1))]
    return [as_numpy(y) for y in found]


@pytest.mark.parametrize("operation", metal.OPERATIONS)
def test_mlx_lm_computes_the_same(operation: str) -> None:
    for case in cases(TINY, mx.float32, [operation]):
        theirs = merged(case, kernels.OF_MLX_LM[operation](case)(case.inputs))
        ours = merged(case, case.with_operations(case.inputs))
        if case.part == "recommended":  # mlx-lm draws by other numbers
            theirs, ours = ([np.zeros_like(y) for y in found] for found in (theirs, ours))
        for one, other in zip(theirs, ours, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=case.part)


@pytest.mark.skipif(metal.available(), reason="Metal is there")
def test_without_metal_mlx_lm_is_compared_with_the_operations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernels.main(["--quick", "--runs", "1", "--kernel", "short_conv"], TINY)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "no kernel runs" in first
    record = json.loads(last)
    assert [case["tokens"] for case in record["cases"]] == [1, 3, 19]
    for case in record["cases"]:
        assert set(case["microseconds"]) == set(case["times_as_long"]) == {"operations", "mlx-lm"}
        assert case["times_as_long"]["operations"] == 1


def test_kernels_are_measured_first_where_they_run() -> None:
    with twins.kernels(checked=False):
        (case, *_) = cases(TINY, mx.float32, ["short_conv"])
        found = kernels.measure(case, 1)
    assert [*found["microseconds"]] == ["kernel", "operations", "mlx-lm"]
    assert found["times_as_long"]["kernel"] == 1
