r"""Strings in quotes: where they may end, and what they mean.

Single quotes hold text as it is, for the template escapes nothing: `'it's here'`. Double quotes are
Python's or JSON's, with escapes. Where every quote inside single quotes is escaped, the escapes
were meant as such: `'it\'s here'`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lfm_mlx.tool_calls.literals import ADJACENT, unescape

_MAY_FOLLOW = re.compile(r"\s*[,)]")
_ESCAPE = re.compile(r"\\['\"nrt\\]")


@dataclass(frozen=True)
class Quoted:
    """A string that may stand in `text`: its quote, and where what it holds begins and ends."""

    text: str
    quote: str
    begin: int
    end: int

    @property
    def after(self) -> int:
        return self.end + len(self.quote)

    def meaning(self) -> tuple[str, bool]:
        """The string's value, and whether its escapes could be meant otherwise."""
        body = self.text[self.begin : self.end]
        # Python joins strings that stand side by side: 'a' 'b'.
        joined = any(found[1] == self.quote[0] for found in ADJACENT.finditer(body))
        if self.quote[0] == '"':
            return unescape(body), joined or len(self.quote) == 3
        if len(self.quote) == 3:
            return body, True
        doubtful = joined or bool(_ESCAPE.search(body))
        return (unescape(body) if self._escapes_quotes() else body), doubtful

    def _escapes_quotes(self) -> bool:
        """Whether there are quotes inside, all of them escaped."""
        places = re.finditer("'", self.text[self.begin : self.end])
        escaped = [_is_escaped(self.text, self.begin, self.begin + it.start()) for it in places]
        return bool(escaped) and all(escaped) and not _is_escaped(self.text, self.begin, self.end)


def quoted(text: str, at: int, clean: bool) -> Iterator[Quoted]:
    """Each string that may begin at `at` as an argument, the shortest first.

    clean: only the one that ends with the first quote that is not escaped
    """
    for quote in (text[at] * 3, text[at]):
        if not text.startswith(quote, at):
            continue
        begin = at + len(quote)
        end = text.find(quote, begin)
        while end >= 0:
            escaped = clean and _is_escaped(text, begin, end)
            if not escaped and _MAY_FOLLOW.match(text, end + len(quote)):
                yield Quoted(text, quote, begin, end)
            if clean and not escaped:
                break
            end = text.find(quote, end + 1)


def _is_escaped(text: str, begin: int, at: int) -> bool:
    """Whether an odd number of backslashes stands before `at`."""
    first = at
    while first > begin and text[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1
