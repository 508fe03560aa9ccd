r"""Values as a model writes them: JSON, Python's literals, and what lies between.

A list or mapping is read as JSON where it is JSON, else as Python prints it; an apostrophe that
nobody escaped (`['it's here']`) ends a string only where the string may end. Infinity and NaN are
no values here: arguments must be expressible as JSON.
"""

import json
import math
import re
from typing import Any, NoReturn

from lfm_mlx.text import map_text, well_formed

WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)", re.ASCII)
# No zeros lead: 02139 is a postal code.
NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
# A word without quotes: a number, a date, a path, a name.
BARE = re.compile(r"[^\s,()\[\]{}'\"`=;]+")
_SPACE = re.compile(r"\s*")
_KEY_WORD = re.compile(r"[^\s,()\[\]{}'\"`=;:]+")
_MAY_FOLLOW_STRING = re.compile(r"\s*([,:)\]}]|$)")
# The end of a string, and the beginning of another right after it.
ADJACENT = re.compile(r"""(['"])\s*[rbuf]?['"]""")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "0": "\0"}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


class ParseError(ValueError):
    """The text is not a value or a call: says what was expected, and where.

    open_string: the text ends inside a string
    """

    def __init__(self, problem: str, open_string: bool = False):
        super().__init__(problem)
        self.open_string = open_string


class Bare(str):
    """A value written without quotes: what it is, the tool's schema may say (`zip=02139`)."""

    def is_finite(self) -> bool:
        """Whether it is anything but a number that JSON does not have: NaN, infinity, 1e999."""
        number = NUMBER.fullmatch(self)
        return not _NOT_FINITE.fullmatch(self) and not (number and math.isinf(float(self)))

    def value(self) -> Any:
        """The number, truth value or null it spells, else the word itself."""
        if self in WORDS:
            return WORDS[self]
        if INTEGER.fullmatch(self) and len(self) < 1000:
            return int(self)
        if NUMBER.fullmatch(self) and self.is_finite():
            return float(self)
        return str(self)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a value of JSON")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_constant(text)


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, each of whose names stands in it once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


_JSON = json.JSONDecoder(
    strict=False,
    parse_constant=_refuse_constant,
    parse_float=_finite,
    object_pairs_hook=_unlike,
)


def read_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and the position after it.

    Raises ParseError.
    """
    at = skip_space(text, at)
    try:
        value, end = _JSON.raw_decode(text, at)
    except ValueError:
        value, end = _read_python(text, at)
    return map_text(value), end


def skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _read_python(text: str, at: int) -> tuple[Any, int]:
    at = skip_space(text, at)
    opening = text[at : at + 1]
    if opening == "{":
        return _read_mapping(text, at + 1)
    if opening in _CLOSING:
        return _read_sequence(text, at + 1, _CLOSING[opening])
    if opening and opening in "'\"":
        return _read_string(text, at)
    word = BARE.match(text, at)
    if not word:
        raise ParseError(f"expected a value at {place(text, at)}")
    bare = Bare(word[0])
    if not bare.is_finite():
        raise ParseError(f"expected a value of JSON at {place(text, at)}")
    return bare.value(), word.end()


def _read_sequence(text: str, at: int, closing: str) -> tuple[list[Any], int]:
    items: list[Any] = []
    while True:
        at = skip_space(text, at)
        if text.startswith(closing, at):
            return items, at + 1
        item, at = _read_python(text, at)
        items.append(item)
        at = _after_item(text, at, closing)


def _read_mapping(text: str, at: int) -> tuple[Any, int]:
    """A mapping, or a set of Python's, which becomes a list."""
    pairs: dict[str, Any] = {}
    while True:
        at = skip_space(text, at)
        if text.startswith("}", at):
            return pairs, at + 1
        begin, (key, at) = at, _read_key(text, at)
        at = skip_space(text, at)
        if not text.startswith(":", at):
            if pairs:
                raise ParseError(f"expected ':' at {place(text, at)}")
            return _read_sequence(text, begin, "}")
        if key in pairs:
            raise ParseError(f"{key!r:.40} is given twice, at {place(text, begin)}")
        pairs[key], at = _read_python(text, at + 1)
        at = _after_item(text, at, "}")


def _read_key(text: str, at: int) -> tuple[str, int]:
    word = _KEY_WORD.match(text, at)
    if word:
        return word[0], word.end()
    key, at = _read_python(text, at)
    return str(key), at


def _after_item(text: str, at: int, closing: str) -> int:
    """The position of the next item, or of `closing`."""
    at = skip_space(text, at)
    if text.startswith(",", at):
        return at + 1
    if text.startswith(closing, at):
        return at
    raise ParseError(f"expected ',' or {closing!r} at {place(text, at)}")


def _read_string(text: str, at: int) -> tuple[str, int]:
    for found in re.compile(rf"\\.|{text[at]}", re.DOTALL).finditer(text, at + 1):
        if found[0] != text[at]:
            continue
        if _MAY_FOLLOW_STRING.match(text, found.end()):
            return unescape(text[at + 1 : found.start()]), found.end()
        # Strings side by side: Python joins them, and some forget the comma between.
        if ADJACENT.match(text, found.start()):
            raise ParseError(f"expected ',' between the strings at {place(text, found.start())}")
    raise ParseError(f"expected the end of the string at {place(text, at)}", open_string=True)


def unescape(text: str) -> str:
    r"""Text with the escapes of Python and JSON resolved; what is none (`\d`) stays."""
    resolved = _ESCAPE.sub(_unescaped, text)
    return well_formed(resolved)  # two escapes of UTF-16 may make one character: \ud83d\ude00


def _unescaped(escape: re.Match[str]) -> str:
    name = escape[1]
    if len(name) > 1:
        code = int(name[1:], 16)
        return chr(code) if code <= 0x10FFFF else escape[0]
    if name in "'\"\\/":
        return name
    return _ESCAPED.get(name, escape[0])


def place(text: str, at: int) -> str:
    """Position in the text, for an error line."""
    return f"character {at + 1} ({text[at : at + 12]!r})" if at < len(text) else "the end"
