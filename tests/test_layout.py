"""The layout is the design: who may import whom, and what no file of the package may do."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lfm_mlx

PACKAGE = Path(lfm_mlx.__file__).parent
# Imports go to lower ranks only. Inside a folder they go anywhere, but not in a circle.
RANKS = {
    "command": 0,
    "checkpoint": 1,
    "output": 2,
    "hub": 3,
    "sample": 1,
    "lookup": 1,
    "constraint": 1,
    "grammar": 1,
    "thinking": 2,
    "kernels.metal": 1,
    "config": 2,
    "memory": 2,
    "kernels": 2,
    "kernels.*": 2,
    "weights": 3,
    "quantize": 3,
    "token_log": 1,
    "conv_window": 2,
    "keys_values": 3,
    "cache": 4,
    "model": 5,
    "model.*": 5,
    "load": 6,
    "decode": 6,
    "choice_scores": 6,
    "prompt_cache": 6,
    "chat": 7,
    "chat.__main__": 11,
    "chat.*": 7,
    "convert": 7,
    "control": 8,
    "control_options": 9,
    "speculate": 7,
    "mlx_lm": 8,
    "stream": 8,
    "printer": 8,
    "model_options": 8,
    "doctor": 9,
    "generate": 10,
    "batching": 7,
    "batch_files": 3,
    "batch": 10,
    "terminal": 10,
    "terminal.*": 10,
    "server": 10,
    "": 11,
    "__main__": 12,
}
# Rooms whose purpose is to meet mlx-lm.
MEET_MLX_LM = {
    "cache", "keys_values", "load", "sample", "model.experts", "model.linear", "mlx_lm",
    "batching", "server",
}  # fmt: skip
NEVER_IMPORTED = {"transformers", "torch", "tensorflow", "jax"}


def modules() -> dict[str, ast.Module]:
    """Every module by its name below the package; the package itself is the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("name", MODULES)


def rank(name: str) -> int:
    if name in RANKS:
        return RANKS[name]
    found = [level for pattern, level in RANKS.items() if fnmatch(name, pattern)]
    assert found, f"lfm_mlx.{name} has no rank: give it one in this test's table"
    return found[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module imports, in full: `from lfm_mlx import memory` is lfm_mlx.memory."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(tree: ast.AST) -> set[str]:
    """The package's modules that `tree` imports, as `modules` names them."""
    found = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] == "lfm_mlx":
            inner = ".".join(parts[1:])
            found.add(inner if inner in MODULES else ".".join(parts[1:-1]))
    return found


def folder(name: str) -> str:
    return name.split(".")[0] if name in MODULES and (PACKAGE / name.split(".")[0]).is_dir() else ""


@every_module
def test_imports_go_to_lower_ranks(name: str) -> None:
    for other in own(MODULES[name]):
        same_folder = bool(folder(name)) and folder(name) == folder(other)
        assert rank(name) > rank(other) - same_folder, (
            f"lfm_mlx.{name} (rank {rank(name)}) imports lfm_mlx.{other} (rank {rank(other)})"
        )


def test_no_circle() -> None:
    order = list(
        TopologicalSorter({name: own(tree) for name, tree in MODULES.items()}).static_order()
    )
    assert set(order) == set(MODULES)
    assert order[0] in ("command", "chat.literals", "model.feed_forward", "kernels", "__main__")


def test_the_walls_can_be_seen() -> None:
    """The reader of imports sees every way to write one."""
    tree = ast.parse("import lfm_mlx.load\nfrom lfm_mlx import cache, Model\n"
                     "def f():\n    from lfm_mlx.model.decoder import Layer\n")  # fmt: skip
    assert own(tree) == {"load", "cache", "", "model.decoder"}
    assert rank("model.decoder") > rank("kernels.short_conv") > rank("kernels.metal")
    assert folder("model.decoder") == folder("model") == "model"
    assert folder("load") == folder("") == ""


@every_module
def test_mlx_lm_is_met_where_that_is_the_purpose(name: str) -> None:
    meets = any(other.split(".")[0] == "mlx_lm" for other in imported(MODULES[name]))
    assert not meets or name in MEET_MLX_LM


@every_module
def test_what_is_never_imported(name: str) -> None:
    assert not {other.split(".")[0] for other in imported(MODULES[name])} & NEVER_IMPORTED


@every_module
def test_kernels_take_arrays_and_decode_takes_tokens(name: str) -> None:
    if folder(name) == "kernels":
        assert {other for other in own(MODULES[name]) if folder(other) != "kernels"} <= {"command"}
    if name == "decode":
        assert not any("token" in other.split(".")[-1] for other in imported(MODULES[name]))
    if folder(name) == "chat" or name == "chat":
        assert not any(other.split(".")[0] == "mlx" for other in imported(MODULES[name]))


@every_module
def test_imports_stand_at_the_top(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert inner == [], f"{node.name}, line {inner[0].lineno}"


@every_module
def test_modules_hold_constants_only(name: str) -> None:
    """Names bound at the top are constants, types or the logger; nothing rebinds them."""
    tree = MODULES[name]
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign)
            else [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []
        )  # fmt: skip
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                bare = part.id.strip("_")
                constant = part.id.isupper() or bare[0].isupper() or part.id in ("log", "__all__")
                assert constant, f"line {node.lineno}: {part.id}"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


@every_module
def test_names_say_what_is_inside(name: str) -> None:
    assert not {"utils", "common", "helpers", "util", "misc"} & set(name.split("."))


@every_module
def test_modules_are_documented(name: str) -> None:
    assert ast.get_docstring(MODULES[name])
