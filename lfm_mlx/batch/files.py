"""Files of requests and of results: a JSON object a line, each result known by its request's line.

A results file grows by whole lines. What a kill tore is mended when the file is opened again, and
the requests that it answers are not asked again.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import lock, no_room

KEYS = ("id", "prompt", "messages", "tools", "max_tokens")
BEGINNING = b'{"id": '


@dataclass(frozen=True)
class Request:
    """One line of requests.

    id: the line's own, else its number
    error: why it cannot be answered, else None
    """

    line: int
    id: str | int
    messages: Any = None
    tools: Any = None
    max_tokens: int | None = None
    error: str | None = None


def read_requests(path: Path) -> list[Request]:
    """Parse a request file; a malformed line becomes a Request with `error` set."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"--in {path}: cannot be read ({error.strerror})") from error
    found = [_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    first: dict[str | int, int] = {}
    return [_told_apart(request, first) for request in found]


def _told_apart(request: Request, first: dict[str | int, int]) -> Request:
    """The request, in error if its id is that of a line before it."""
    line = first.setdefault(request.id, request.line)
    if line == request.line:
        return request
    error = f"id {request.id!r} is that of line {line}"
    return Request(request.line, request.id, error=error)


def _request(number: int, line: bytes) -> Request:
    identity: str | int = number
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        identity = _identity(content.get("id", number))
        return _checked(number, identity, content)
    except json.JSONDecodeError as error:
        return Request(number, identity, error=f"no JSON: {error}")
    except (ValueError, RecursionError) as error:
        return Request(number, identity, error=one_line(error))


def _identity(given: Any) -> str | int:
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ValueError(f"id is {given!r:.60}; expected text or an integer")
    return given


def _checked(number: int, identity: str | int, content: Mapping[str, Any]) -> Request:
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} unknown; expected {', '.join(KEYS)}")
    if ("prompt" in content) == ("messages" in content):
        raise ValueError("expected either a prompt or messages")
    messages = content.get("messages")
    if "prompt" in content:
        if not isinstance(content["prompt"], str) or not content["prompt"].strip():
            raise ValueError("prompt: expected text")
        messages = [{"role": "user", "content": content["prompt"]}]
    tools = content.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("tools: expected a list")
    limit = content.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"max_tokens is {limit!r:.60}; expected 1 or more")
    return Request(number, identity, messages, tools, limit)


class Results:
    """A file of results that is being written.

    answered: the id of each request that has a result, by the request's line
    """

    def __init__(self, path: Path, file: BinaryIO, answered: dict[int, str | int]):
        self._path, self._file, self.answered = path, file, answered

    def write(self, request: Request, content: Mapping[str, Any]) -> None:
        """Add the result of a request. Raises InputError if the disk is full."""
        result = {"id": request.id, "line": request.line, **content}
        try:
            self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise no_room(error, self._path) from error

    def unanswered(self, requests: list[Request]) -> list[Request]:
        """The requests without a result.

        Raises InputError if a result is that of no request: the file belongs to other requests.
        """
        ids = {request.line: request.id for request in requests}
        for line, identity in self.answered.items():
            if ids.get(line) != identity:
                raise InputError(
                    f"--out {self._path}: has a result for id {identity!r} in line {line}, "
                    "which is not in --in; give another name"
                )
        return [request for request in requests if request.line not in self.answered]


@contextlib.contextmanager
def open_results(path: Path) -> Iterator[Results]:
    """The results in `path`, mended, to be added to; by no other process at the same time.

    Raises InputError, and leaves the file as it is, for one that holds something else.
    """
    try:
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            lock(file.fileno())
        except BlockingIOError as error:
            raise InputError(f"--out {path}: another run is writing it") from error
        yield Results(path, file, _mended(path, file))


def _mended(path: Path, file: BinaryIO) -> dict[int, str | int]:
    """The file's results by line; a last line that was torn is gone."""
    file.seek(0)
    *lines, last = file.read().split(b"\n")
    answered: dict[int, str | int] = {}
    for number, line in enumerate(lines, 1):
        result = _result(line)
        if result is None:
            raise InputError(
                f"--out {path}: line {number} is not a result of this command; give another name"
            )
        answered[result[0]] = result[1]
    if not last:
        return answered
    if not (last.startswith(BEGINNING) or BEGINNING.startswith(last)):
        raise InputError(f"--out {path}: is not a file of results; give another name")
    file.truncate(sum(len(line) + 1 for line in lines))
    return answered


def _result(line: bytes) -> tuple[int, str | int] | None:
    """Line and id of a result, None for something else."""
    try:
        content = json.loads(line)
        return int(content["line"]), _identity(content["id"])
    except (ValueError, KeyError, TypeError):
        return None
