r"""The text of a tool-call block → the ways to read it as calls, likeliest first.

    [get_weather(city='Paris'), note(text='it's here', n=3)]

Strings in single quotes come without escaping, so a quote may or may not end one. The text is a
graph of places, and each quote that could end its string is an edge: the nearest is tried first,
and a reading is a path to the end of the block. A place from which no path leads is remembered.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lfm_mlx.tool_calls.literals import BARE, Bare, ParseError, place, read_value, skip_space
from lfm_mlx.tool_calls.quoted import Quoted, quoted

UNPACKED = "**"
# Text in which more edges than this are tried is not worth more time: it is no call.
MOST_STEPS = 200_000
_NAME = re.compile(r"\s*(\w[\w.:/-]*)\s*\(")
_KEY = re.compile(r"\s*([^\s=:,()\[\]{}'\"]+)\s*(?:=(?!=)|:(?=\s))\s*")
_UNPACK = re.compile(r"\s*(\*\*)\s*(?=\{)")
_SEPARATORS = re.compile(r"[\s,;]*")


@dataclass(frozen=True)
class Argument:
    """One argument: key None if it has no name, UNPACKED for `**{…}`.

    doubtful: the string holds backslashes that may or may not be escapes
    """

    key: str | None
    value: Any
    doubtful: bool = False


@dataclass(frozen=True)
class WrittenCall:
    """A call as it stands in the text, before any tool's schema is asked."""

    name: str
    arguments: tuple[Argument, ...]


class _Place(NamedTuple):
    """State of the reader: position, what may follow, and what of the call before it matters."""

    state: str
    at: int
    listed: bool = False  # inside [ ]
    tool: str = ""
    named: bool = False  # an argument with a name came before, so that this one needs a name


# A call's name, an argument of the call before it, or punctuation.
_Event = str | tuple[str | None, Any] | None
_Step = tuple[_Event, _Place]


class CallReader:
    """Reads one block.

    tools: the names of calls, and of their arguments, that there may be; None: any
    clean: a quote that is not escaped ends its string, so that there is one reading at most
    positional: arguments may come without a name

    After reading, `problem` says what stood in the way farthest into the text, and `open_string`
    whether the text ends inside a string.
    """

    def __init__(
        self, text: str, tools: Mapping[str, Collection[str]] | None = None, *,
        clean: bool = False, positional: bool = True,
    ):  # fmt: skip
        self._text, self._tools = text, tools
        self._clean, self._positional = clean, positional
        self._farthest = -1
        self.problem, self.open_string = "no call", False

    def readings(self) -> Iterator[tuple[WrittenCall, ...]]:
        """Every path to the end, depth first."""
        states = {
            "call": self._call,
            "argument": self._argument,
            "after": self._after_argument,
            "called": self._after_call,
        }
        dead: set[_Place] = set()
        begin = _Place("call", 0)
        path: list[_Visit] = [_Visit(begin, self._call(begin))]
        for _ in range(MOST_STEPS):
            visit = path[-1]
            event, ahead = next(visit.steps, (None, None))
            if ahead is None:
                path.pop()
                if not visit.reached:
                    dead.add(visit.place)
                if not path:
                    return
                path[-1].reached |= visit.reached
            elif ahead.state == "end":
                visit.reached = True
                yield tuple(_calls([visit.event for visit in path]))
            elif ahead not in dead:
                visit.event = event
                path.append(_Visit(ahead, states[ahead.state](ahead)))
        self.problem = "there are too many ways to read it"

    def _failed(self, at: int, expected: str) -> None:
        if at > self._farthest:
            self._farthest = at
            self.problem = f"expected {expected} at {place(self._text, at)}"

    def _call(self, here: _Place) -> Iterator[_Step]:
        at = skip_space(self._text, here.at)
        opens = not here.listed and self._text.startswith("[", at)
        name = _NAME.match(self._text, at + opens)
        if not name or (self._tools is not None and name[1] not in self._tools):
            self._failed(at + opens, "a call, name(…),")
            return
        yield name[1], _Place("argument", name.end(), here.listed or opens, name[1])

    def _argument(self, here: _Place) -> Iterator[_Step]:
        at = skip_space(self._text, here.at)
        if self._text.startswith(")", at):
            yield None, _Place("called", at + 1, here.listed)
            return
        found = _KEY.match(self._text, at) or _UNPACK.match(self._text, at)
        key, begin = (found[1], found.end()) if found else (None, at)
        if not self._may_stand(key, begin, here):
            self._failed(at, "an argument's name")
            return
        named = here.named or key is not None
        for value, end in self._values(begin):
            yield (key, value), _Place("after", end, here.listed, here.tool, named)

    def _may_stand(self, key: str | None, at: int, here: _Place) -> bool:
        """Whether an argument may have this name, or none."""
        if key is None:
            alone = self._text.startswith("{", at)
            return not here.named and (self._positional or alone)
        known = (self._tools or {}).get(here.tool)
        return not known or key == UNPACKED or key in known or key == "properties"

    def _after_argument(self, here: _Place) -> Iterator[_Step]:
        at = skip_space(self._text, here.at)
        if self._text.startswith(",", at):
            yield None, here._replace(state="argument", at=at + 1)
        elif self._text.startswith(")", at):
            yield None, _Place("called", at + 1, here.listed)
        else:
            self._failed(at, "',' or ')'")

    def _after_call(self, here: _Place) -> Iterator[_Step]:
        separators = _SEPARATORS.match(self._text, here.at)
        at = separators.end() if separators else here.at
        if here.listed and self._text.startswith("]", at):
            yield None, _Place("called", at + 1)
        elif at == len(self._text):
            yield None, _Place("end", at)
        else:
            yield None, _Place("call", at, here.listed)

    def _values(self, at: int) -> Iterator[tuple[Any, int]]:
        """Each value that may begin at `at`, and the position after it."""
        opening = self._text[at : at + 1]
        if opening and opening in "'\"":
            string = None
            for string in quoted(self._text, at, self._clean):
                yield string, string.after
            if string is None:
                self.open_string = True
                self._failed(at, "the end of the string")
        elif opening and opening in "[{(":
            try:
                yield read_value(self._text, at)
            except ParseError as error:
                self.open_string |= error.open_string
                if at > self._farthest:
                    self._farthest, self.problem = at, str(error)
        elif word := BARE.match(self._text, at):
            yield Bare(word[0]), word.end()
        else:
            self._failed(at, "a value")


class _Visit:
    """A place on the path, the steps not yet tried from it, and the one that was taken last."""

    def __init__(self, place: _Place, steps: Iterator[_Step]):
        self.place, self.steps = place, steps
        self.event: _Event = None
        self.reached = False  # the end, on some path


def _calls(events: list[_Event]) -> Iterator[WrittenCall]:
    begins = [index for index, event in enumerate(events) if isinstance(event, str)]
    for begin, end in zip(begins, [*begins[1:], len(events)], strict=True):
        arguments = (_argument(*event) for event in events[begin:end] if isinstance(event, tuple))
        yield WrittenCall(str(events[begin]), tuple(arguments))


def _argument(key: str | None, value: Any) -> Argument:
    return Argument(key, *(value.meaning() if isinstance(value, Quoted) else (value, False)))
