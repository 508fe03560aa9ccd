"""A value as the JSON type that is asked for: as it is, or the one it spells ("3" → 3).

Nothing is guessed: a fraction never becomes an integer, and a number that was read already never
becomes text where its spelling (`1.10`) would be lost.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lfm_mlx.tool_calls.literals import NUMBER, WORDS, Bare, ParseError, read_value, skip_space

_TYPES = {"number": (int, float), "string": str, "array": list, "object": dict}


class SchemaError(ValueError):
    """A value that the schema does not allow."""


def as_type(value: Any, kinds: Sequence[str], coerce: bool) -> Any:
    """The value as one of these JSON types; an unknown type takes anything.

    coerce: whether a value may be read anew where it spells one of the types

    Raises SchemaError.
    """
    exact = plain(value)
    for kind in kinds:
        if kind not in _READERS or is_a(exact, kind):
            return int(exact) if kind == "integer" else exact
    for kind in kinds if coerce else ():
        try:
            return _READERS[kind](value)
        except ParseError:
            continue
    raise SchemaError(f"is {shown(value)}; expected {' or '.join(kinds)}")


def plain(value: Any) -> Any:
    """The value itself; a bare word becomes what it spells."""
    return value.value() if isinstance(value, Bare) else value


def shown(value: Any) -> str:
    """The value in an error line, cut where it is long."""
    text = repr(plain(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def is_a(value: Any, kind: str) -> bool:
    """Whether a plain value is of this JSON type; 3.0 is an integer, true is no number."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES.get(kind, ()))


def _number(value: Any) -> int | float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        number = Bare(value).value()
        if isinstance(number, int | float):
            return number
    raise ParseError("no number")


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ParseError("no integer")
    return int(number)


def _word(value: Any, kind: str) -> bool | None:
    if isinstance(value, str) and value in WORDS and is_a(WORDS[value], kind):
        return WORDS[value]
    raise ParseError(f"no {kind}")


def _string(value: Any) -> str:
    spelled = isinstance(value, str) or (is_a(value, "integer") and isinstance(value, int))
    if not spelled or plain(value) is None:
        raise ParseError("no string")
    return str(value)


def _container(value: Any, kind: str) -> Any:
    if isinstance(value, str):
        found, end = read_value(value, 0)
        if skip_space(value, end) == len(value) and is_a(found, kind):
            return found
    raise ParseError(f"no {kind}")


_READERS: dict[str, Callable[[Any], Any]] = {
    "integer": _integer,
    "number": _number,
    "string": _string,
    "boolean": lambda value: _word(value, "boolean"),
    "null": lambda value: _word(value, "null"),
    "array": lambda value: _container(value, "array"),
    "object": lambda value: _container(value, "object"),
}
