"""Files of requests and of results: a JSON object a line, each result known by its request's line.

A results file grows by whole lines. What a kill tore is mended when the file is opened again, and
the requests that it answers are not asked again. A line that failed or was changed is: the last
result of a line is the one that counts.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import lock, no_room
from lfm_mlx.text import map_text

KEYS = ("id", "prompt", "messages", "tools", "max_tokens")
BEGINNING = b'{"id": '
# The name of the standard streams.
STANDARD = Path("-")


@dataclass(frozen=True)
class Request:
    """One line of requests.

    id: the line's own, else its number, or a text with it if another line has that as its own
    error: why it cannot be answered, else None
    hash: of the line's bytes
    """

    line: int
    id: str | int
    messages: Any = None
    tools: Any = None
    max_tokens: int | None = None
    error: str | None = None
    hash: str = ""


@dataclass(frozen=True)
class Known:
    """The last result of a line, as the file has it.

    error: why it was not answered, else None
    hash: of the line as it was then; None if the result does not say
    """

    id: str | int
    error: str | None
    hash: str | None

    def answers(self, request: Request) -> bool:
        """Whether the request need not be asked again."""
        return self.error is None and self.hash in (None, request.hash)


def read_requests(path: Path) -> list[Request]:
    """Parse a request file, or standard input; a malformed line becomes a Request with an error."""
    try:
        data = sys.stdin.buffer.read() if path == STANDARD else path.read_bytes()
    except OSError as error:
        raise InputError(f"--in {path}: cannot be read ({error.strerror})") from error
    lines = data.splitlines()
    found = [_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    first: dict[str | int, int] = {}
    for request, explicit in found:
        if explicit:
            first.setdefault(request.id, request.line)
    return [_told_apart(request, explicit, first) for request, explicit in found]


def _told_apart(request: Request, explicit: bool, first: Mapping[str | int, int]) -> Request:
    """The request with an id of its own; in error if it gave itself that of a line before it.

    first: the line that gave itself an id first, by that id
    """
    if not explicit:
        identity = request.id
        while identity in first:
            identity = f"line {request.line}" if identity == request.line else f"{identity}'"
        return replace(request, id=identity)
    line = first[request.id]
    if line == request.line:
        return request
    error = f"id {request.id!r} is that of line {line}"
    return Request(request.line, request.id, error=error, hash=request.hash)


def _request(number: int, line: bytes) -> tuple[Request, bool]:
    """The request of a line, and whether the line gives itself an id."""
    identity: str | int = number
    explicit = False
    digest = hashlib.sha256(line.strip()).hexdigest()[:16]
    try:
        content = map_text(json.loads(line.decode("utf-8-sig", "replace")))
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        identity = _identity(content.get("id", number))
        explicit = "id" in content
        return replace(_checked(number, identity, content), hash=digest), explicit
    except json.JSONDecodeError as error:
        problem = f"no JSON: {error}"
    except RecursionError:
        problem = "nested too deep"
    except ValueError as error:
        problem = one_line(error)
    return Request(number, identity, error=problem, hash=digest), explicit


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

    known: what it said of each line when it was opened
    """

    def __init__(self, path: Path, file: BinaryIO, known: dict[int, Known]):
        self._path, self._file, self.known = path, file, known

    def write(self, request: Request, content: Mapping[str, Any]) -> None:
        """Add the result of a request, unless it is the error that is there already.

        Raises InputError if the disk is full.
        """
        if self.known.get(request.line) == Known(
            request.id, content.get("error", ""), request.hash
        ):
            return
        result = {"id": request.id, "line": request.line, "hash": request.hash, **content}
        try:
            left = json.dumps(map_text(result), ensure_ascii=False).encode() + b"\n"
            while left:  # without a buffer, a write may take a part only
                left = left[self._file.write(left) :]
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise no_room(error, self._path) from error

    def unanswered(self, requests: list[Request]) -> list[Request]:
        """The requests without an answer, or with that of another line than they are today.

        Raises InputError if an answer is that of no request: the file belongs to other requests.
        """
        ids = {request.line: request.id for request in requests}
        for line, known in self.known.items():
            if known.error is None and ids.get(line) != known.id:
                raise InputError(
                    f"--out {self._path}: has a result for id {known.id!r} in line {line}, "
                    "which is not in --in; give another name"
                )
        known = self.known
        return [it for it in requests if it.line not in known or not known[it.line].answers(it)]


@contextlib.contextmanager
def open_results(path: Path) -> Iterator[Results]:
    """The results in `path`, mended, to be added to; by no other process at the same time.

    Standard output, a device and a pipe are written to only.

    Raises InputError, and leaves the file as it is, for one that holds something else.
    """
    if path == STANDARD:
        yield Results(path, sys.stdout.buffer, {})
        return
    if path.exists() and not path.is_file() and not path.is_dir():
        with _opened(path, "wb") as file:
            yield Results(path, file, {})
        return
    with _opened(path, "a+b") as file:
        try:
            lock(file.fileno())
        except BlockingIOError as error:
            raise InputError(f"--out {path}: another run is writing it") from error
        yield Results(path, file, _mended(path, file))


def _opened(path: Path, mode: str) -> Any:
    """The file, without a buffer: a failed write is not tried again when it is closed."""
    try:
        return open(path, mode, buffering=0)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from error


def _mended(path: Path, file: BinaryIO) -> dict[int, Known]:
    """The file's results by line; a last line that was torn is gone."""
    file.seek(0)
    *lines, last = file.read().split(b"\n")
    known: dict[int, Known] = {}
    for number, line in enumerate(lines, 1):
        result = _result(line)
        if result is None:
            raise InputError(
                f"--out {path}: line {number} is not a result of this command; give another name"
            )
        known[result[0]] = result[1]
    if not last:
        return known
    if not (last.startswith(BEGINNING) or BEGINNING.startswith(last)):
        raise InputError(f"--out {path}: is not a file of results; give another name")
    file.truncate(sum(len(line) + 1 for line in lines))
    return known


def _result(line: bytes) -> tuple[int, Known] | None:
    """The line that a result is of, and what it says; None for something else."""
    try:
        content = json.loads(line)
        known = Known(_identity(content["id"]), content.get("error"), content.get("hash"))
        return int(content["line"]), known
    except (ValueError, KeyError, TypeError):
        return None
