"""What the installed package asks of Python and of other packages, and what is beside it."""

import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OURS = metadata.metadata("lfm_mlx")
REQUIREMENTS = [Requirement(line) for line in metadata.requires("lfm_mlx") or []]
# Without an extra's marker; environments of other platforms with their own.
NEEDED = [r for r in REQUIREMENTS if r.marker is None or "extra" not in str(r.marker)]
MAC = {"sys_platform": "darwin", "platform_machine": "arm64"}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}


def floor(requirement: Requirement) -> str:
    found = re.search(r">=([^,]+)", str(requirement.specifier))
    assert found, f"{requirement} has no lowest version"
    return found[1]


def named(name: str, environment: dict[str, str]) -> list[Requirement]:
    return [r for r in NEEDED
            if r.name == name and (r.marker is None or r.marker.evaluate(environment))]  # fmt: skip


def test_python_is_what_mlx_lm_runs_on() -> None:
    """pip says in one line that an older Python will not do."""
    ours = SpecifierSet(OURS["Requires-Python"])
    assert not ours.contains("3.10.14")
    assert ours.contains("3.11.0")
    assert ours.contains("3.13.1")
    assert ours.contains(".".join(map(str, sys.version_info[:3])))
    classes = [Requirement(line) for line in metadata.requires("mlx-lm") or []]
    assert classes  # mlx-lm is there, and says what it needs


@pytest.mark.parametrize(("environment", "lowest"), [(MAC, "0.32.4"), (LINUX, "0.32.3")])
def test_mlx_has_what_mlx_lm_calls(environment: dict[str, str], lowest: str) -> None:
    (mlx,) = named("mlx", environment)
    assert floor(mlx) == lowest
    assert ("cpu" in mlx.extras) == (environment is LINUX)


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_what_is_installed_is_allowed(requirement: Requirement) -> None:
    if requirement.marker is None or requirement.marker.evaluate():
        assert requirement.specifier.contains(metadata.version(requirement.name))


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_no_floor_is_below_what_a_dependency_needs(requirement: Requirement) -> None:
    """A floor that never resolves promises what nobody has tested."""
    others = {"mlx-lm", "transformers", "huggingface-hub", "tokenizers"} - {requirement.name}
    for other in others:
        for line in metadata.requires(other) or []:
            wanted = Requirement(line)
            same = wanted.name.replace("_", "-") == requirement.name.replace("_", "-")
            if same and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                assert wanted.specifier.contains(floor(requirement)), f"{other} needs {wanted}"
