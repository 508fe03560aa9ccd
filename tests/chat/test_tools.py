"""Functions of a Python file as tools: their schemas, their results, and all that goes wrong."""

import json
import os
import time
from pathlib import Path

import pytest

from lfm_mlx.chat import tools as tools_module
from lfm_mlx.chat.tools import LONGEST_RESULT, Tools
from lfm_mlx.chatml import Call
from lfm_mlx.errors import InputError

FILE = '''
"""Tools of many kinds."""
import asyncio, os, subprocess, sys, time
from dataclasses import dataclass
from datetime import date
from pathlib import PurePath
from typing import Literal

@dataclass
class Size:
    width: int
    height: int = 1

def weather(city: str, unit: Literal["c", "f"] = "c", days: list[int] | None = None) -> dict:
    """Get the weather.

    Args:
        city: Name of the city
        unit: Celsius
            or Fahrenheit
    """
    return {"city": city, "unit": unit, "days": days}

def area(size: Size, on: date) -> str:
    return f"{size.width * size.height} on {on:%d.%m.%Y}"

def bare(a, b=2): return [a, b, PurePath("x")]
async def slowly() -> int:
    await asyncio.sleep(0)
    return 7
def say(text: str) -> str:
    print("to the person")
    os.write(1, b"and again")
    return text
def fail(): raise KeyError("gone")
def leave(): sys.exit(3)
def crash(): os._exit(4)
def long() -> str: return "x" * 30_000
def endless():
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, file=open("child.pid", "w"), flush=True)
    time.sleep(60)
def _private(): pass
'''
SIZE = {"width": 2, "height": 3}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    file = tmp_path_factory.mktemp("tools") / "json.py"  # no module of that name may be shadowed
    file.write_text(FILE, encoding="utf-8")
    return Tools(str(file), seconds=20)


def run(tools: Tools, name: str, **arguments: object) -> str:
    return tools.run(Call(name, arguments))


def test_signature_and_docstring_become_the_schema(tools: Tools) -> None:
    assert tools.schemas[0] == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Get the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city"},
                    "unit": {
                        "type": "string", "enum": ["c", "f"], "default": "c",
                        "description": "Celsius\nor Fahrenheit",
                    },
                    "days": {
                        "anyOf": [{"type": "array", "items": {"type": "integer"}},
                                  {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["city"],
            },
        },
    }  # fmt: skip


def test_public_functions_of_the_file_are_offered_in_its_order(tools: Tools) -> None:
    names = [schema["function"]["name"] for schema in tools.schemas]
    assert names[:4] == ["weather", "area", "bare", "slowly"]
    assert not {"_private", "dataclass", "date"} & set(names)


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("weather", {"city": "Zürich"}, '{"city": "Zürich", "unit": "c", "days": null}'),
        ("area", {"size": SIZE, "on": "2026-05-01"}, "6 on 01.05.2026"),
        ("bare", {"a": None}, '[null, 2, "x"]'),
        ("slowly", {}, "7"),
        ("say", {"text": "hello"}, "hello"),
    ],
)
def test_results_are_text(tools: Tools, name: str, arguments: dict, result: str) -> None:
    assert run(tools, name, **arguments) == result


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("fail", {}, "KeyError: 'gone'"),
        ("leave", {}, "SystemExit: 3"),
        ("crash", {}, "its process ended with exit code 4."),
        ("weather", {"city": "Rome", "days": ["x"]}, "days.0: Input should be a valid integer"),
        ("weather", {}, "city: Missing required argument"),
    ],
)
def test_errors_are_results(tools: Tools, name: str, arguments: dict, error: str) -> None:
    assert json.loads(run(tools, name, **arguments))["error"].startswith(error)


def test_a_long_result_is_cut_and_says_so(tools: Tools) -> None:
    result = run(tools, "long")
    assert result == "x" * LONGEST_RESULT + "\n[10000 more characters left out]"


def test_the_time_limit_ends_the_call_and_what_it_started(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tools, "seconds", 3)
    began = time.monotonic()
    result = json.loads(run(tools, "endless"))
    assert result == {"error": "gave no answer within 3 seconds"}
    assert time.monotonic() - began < 20
    child = int((tmp_path / "child.pid").read_text())
    assert not is_running(child)


def is_running(process: int) -> bool:
    """Whether it is there, and not only waiting for its parent to notice that it ended."""
    for _ in range(50):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat")
            if state.exists() and state.read_text().split()[2] == "Z":
                return False
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def f(:", "SyntaxError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("x = 1", "defines no public function"),
        ("def f(a, /): pass", "f: positional-only parameters are not supported"),
        ("import time; time.sleep(60)", "gave no answer within 2 seconds"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "tools.py"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        Tools(str(file), seconds=2)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        Tools("nowhere.py", seconds=2)
    monkeypatch.setattr(tools_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lfm_mlx\[chat\]"):
        Tools("nowhere.py", seconds=2)
