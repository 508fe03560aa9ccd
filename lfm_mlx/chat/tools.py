"""The functions of a Python file as tools, each call in a process of its own with a time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfm_mlx.chatml import Call
from lfm_mlx.errors import InputError, one_line

WORKER = Path(__file__).with_name("tool_worker.py")
# Of a result, in characters: a model must read all of it.
LONGEST_RESULT = 20_000


class ToolError(Exception):
    """A tool did not answer; says why."""


class Tools:
    """The functions of a Python file, offered as tools.

    schemas: the tools as in a chat request
    seconds: how long a call, and the reading of the file, may take

    Raises InputError for a file that cannot be used.
    """

    def __init__(self, path: str, seconds: float):
        missing = [name for name in ("pydantic", "docstring_parser") if find_spec(name) is None]
        if missing:
            raise InputError(f"tools need {' and '.join(missing)}; pip install 'lfm_mlx[chat]'")
        self.path, self.seconds = Path(path).expanduser().resolve(), seconds
        if not self.path.is_file():
            raise InputError(f"--tools {path}: there is no such file")
        try:
            self.schemas: list[dict[str, Any]] = self._ask({})["tools"]
        except ToolError as error:
            raise InputError(f"--tools {path}: {one_line(error)}") from error
        if not self.schemas:
            raise InputError(f"--tools {path}: defines no public function")

    def run(self, call: Call) -> str:
        """The result of a call as text, or `{"error": …}`."""
        try:
            result = self._ask({"name": call.name, "arguments": call.arguments})["result"]
        except ToolError as error:
            return failure(str(error))
        left_out = len(result) - LONGEST_RESULT
        if left_out > 0:
            return f"{result[:LONGEST_RESULT]}\n[{left_out} more characters left out]"
        return result

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with subprocess.Popen(
            [sys.executable, str(WORKER)], text=True, encoding="utf-8", start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                question = json.dumps({"file": str(self.path), **request})
                out, err = process.communicate(question, timeout=self.seconds)
            except subprocess.TimeoutExpired:
                raise ToolError(f"gave no answer within {self.seconds:g} seconds") from None
            finally:
                end_group(process.pid)
        return reply_in(out, err, process.returncode)


def reply_in(out: str, err: str, code: int) -> dict[str, Any]:
    """The worker's reply. Raises ToolError for one that tells of an error, or is none."""
    try:
        reply = json.loads(out)
    except ValueError:
        *_, last = ["", *err.strip().splitlines()]
        raise ToolError(f"its process ended with exit code {code}. {last}".rstrip()) from None
    if "error" in reply:
        raise ToolError(reply["error"])
    return reply


def end_group(leader: int) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def failure(reason: str) -> str:
    """The text a model is given in place of a result."""
    return json.dumps({"error": reason}, ensure_ascii=False)
