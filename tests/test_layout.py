"""The layout is the design: who may import whom, and what no file of the package may do."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lfm_mlx

PACKAGE = Path(lfm_mlx.__file__).parent
# A room's rank: a folder, or a file of the root. Imports go to lower ranks; inside a room they go
# anywhere, but not in a circle.
RANKS = {
    **dict.fromkeys(("errors", "text"), 0),
    **dict.fromkeys(("files", "command_buffers", "kernels", "tool_calls"), 1),
    **dict.fromkeys(("config", "device", "chatml"), 2),
    **dict.fromkeys(("checkpoint", "cache"), 3),
    "model": 4,
    "load": 5,
    "engine": 6,
    "answer": 7,
    "cli": 8,
    **dict.fromkeys(("generate", "chat", "batch", "convert", "doctor", "mlx_lm"), 9),
    "": 10,
    "__main__": 11,
}
# Rooms whose purpose is to meet mlx-lm.
MEET_MLX_LM = {"cache", "model", "engine", "load", "mlx_lm"}
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


def room(name: str) -> str:
    return name.split(".")[0]


def rank(name: str) -> int:
    assert room(name) in RANKS, (
        f"lfm_mlx.{name} has no rank: give its room one in this test's table"
    )
    return RANKS[room(name)]


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


@every_module
def test_imports_go_to_lower_ranks(name: str) -> None:
    for other in own(MODULES[name]):
        assert room(name) == room(other) or rank(name) > rank(other), (
            f"lfm_mlx.{name} (rank {rank(name)}) imports lfm_mlx.{other} (rank {rank(other)})"
        )


def test_no_circle() -> None:
    order = list(
        TopologicalSorter({name: own(tree) for name, tree in MODULES.items()}).static_order()
    )
    assert set(order) == set(MODULES)


def test_the_walls_can_be_seen() -> None:
    """The reader of imports sees every way to write one."""
    tree = ast.parse("import lfm_mlx.load\nfrom lfm_mlx import device, Model\n"
                     "def f():\n    from lfm_mlx.model.decoder import Layer\n")  # fmt: skip
    assert own(tree) == {"load", "device", "", "model.decoder"}
    assert rank("model.decoder") > rank("kernels.short_conv") > rank("errors")
    assert {room(name) for name in MODULES} == set(RANKS)


@every_module
def test_mlx_lm_is_met_where_that_is_the_purpose(name: str) -> None:
    meets = any(other.split(".")[0] == "mlx_lm" for other in imported(MODULES[name]))
    assert not meets or room(name) in MEET_MLX_LM


@every_module
def test_what_is_never_imported(name: str) -> None:
    assert not {other.split(".")[0] for other in imported(MODULES[name])} & NEVER_IMPORTED


# What rooms see of the package's own, where their rank would allow more.
SEES = {
    "kernels": {"errors"},
    "tool_calls": {"errors", "text"},
    "model": {"errors", "config", "device", "cache", "kernels"},
    "engine": {"errors", "files", "config", "device", "cache", "kernels", "model"},
}
# What rooms never import of others' packages.
STRANGERS = {
    "tool_calls": {"mlx", "tokenizers"},
    "chatml": {"mlx", "tokenizers"},
    "engine": {"tokenizers"},
    "answer": {"argparse"},
}


@every_module
def test_rooms_see_what_is_their_business(name: str) -> None:
    seen = {room(other) for other in own(MODULES[name])} - {room(name)}
    assert seen <= SEES.get(room(name), set(RANKS))
    others = {other.split(".")[0] for other in imported(MODULES[name])}
    assert not others & STRANGERS.get(room(name), set())


@every_module
def test_only_commands_speak_of_options(name: str) -> None:
    """A server sends a library's errors to clients, who have no command line."""
    if rank(name) >= RANKS["cli"]:
        return
    words = [node.value for node in ast.walk(MODULES[name])
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    found = [flag for text in words for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)]
    assert found == []


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


TESTS = Path(__file__).parent
# Tests of something else than one module: the whole, or what stands beside the package.
OF_THE_WHOLE = {
    "test_installed",
    "test_layout",
    "test_demo",
    "test_long",
    "test_judge",
    "test_benchmarks",
    "test_readme",
}
BESIDE = {"scripts", "metal_host"}


def test_tests_mirror_the_package() -> None:
    """tests/engine/test_decode.py tests lfm_mlx/engine/decode.py; a suffix may say which part."""
    for path in TESTS.rglob("test_*.py"):
        place = path.relative_to(TESTS)
        if place.parts[0] in BESIDE or place.stem in OF_THE_WHOLE:
            continue
        stem = place.stem.removeprefix("test_")
        modules = [name.split(".")[-1] for name in MODULES
                   if name.split(".")[:-1] == [*place.parts[:-1]]]  # fmt: skip
        assert any(stem == name or stem.startswith(f"{name}_") for name in modules), place


@every_module
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(MODULES[name]):
        text = ast.get_docstring(node) if isinstance(node, definitions) else None
        assert text is None or text.split()[0] not in {"What", "How", "Where", "Who"}, text
