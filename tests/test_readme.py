"""The README is true: its Python runs, and every file that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "27 + 58 = 85." in capsys.readouterr().out


@pytest.mark.parametrize(
    "named",
    sorted({*re.findall(r"(?:scripts|benchmarks|examples|tests)/[\w./]+\.(?:py|svg)", TEXT)}),
)
def test_what_it_names_is_there(named: str) -> None:
    assert (ROOT / named).exists()


def test_the_tree_is_the_tree() -> None:
    tree = TEXT.split("```\nlfm_mlx/\n")[1].split("scripts/")[0]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[2:3].strip()}
    there = {path.name for path in (ROOT / "lfm_mlx").iterdir()}
    assert named == there - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
