"""Tool calls written as JSON: `[{"name": …, "arguments": {…}}, …]`, one object, or several."""

import re
from typing import Any

from lfm_mlx.tool_calls.literals import ParseError, place, read_value, skip_space
from lfm_mlx.tool_calls.python_calls import Argument, WrittenCall

_SEPARATORS = re.compile(r"[\s,;]*")


def read_json_calls(text: str) -> list[WrittenCall]:
    """The calls of a block.

    Raises ParseError.
    """
    entries: list[Any] = []
    at = 0
    while at < len(text):
        value, at = read_value(text, at)
        entries += value if isinstance(value, list) else [value]
        separators = _SEPARATORS.match(text, at)
        at = separators.end() if separators else at
        if at < len(text) and text[at] not in "[{":
            raise ParseError(f"expected the end of the calls at {place(text, at)}")
    return [_call(entry) for entry in entries]


def _call(entry: Any) -> WrittenCall:
    if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
        entry = entry["function"]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ParseError("expected objects with name and arguments")
    given = [key for key in ("arguments", "parameters") if key in entry]
    unknown = entry.keys() - {"name", "id", "type", *given}
    if len(given) > 1 or unknown:
        raise ParseError("expected name and arguments only; got " + ", ".join(entry))
    arguments = entry[given[0]] if given else {}
    if isinstance(arguments, str):
        arguments = _spelled(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ParseError(f"arguments of {entry['name']}: expected an object")
    named = tuple(Argument(key, value) for key, value in arguments.items())
    return WrittenCall(entry["name"], named)


def _spelled(text: str) -> Any:
    """The value that a text spells, and nothing behind it."""
    value, end = read_value(text, 0)
    if skip_space(text, end) < len(text):
        raise ParseError(f"arguments: expected their end at {place(text, end)}")
    return value
