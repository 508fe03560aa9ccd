"""The tags around thinking and tool calls, and how they are found in text that arrives in pieces.

A tag the model means is one token, which a TextStream delivers as a Tag; ordinary tokens that spell
one (Words) are text. In text that lost its tokens (plain str) a spelling counts as the tag, however
the text is cut. Either way a tag directly inside quotes, like '<think>', is only spoken of.
"""

import re
from collections.abc import Iterable, Iterator

THINKING, TEXT, TOOL_CALL = "thinking", "text", "tool_call"
CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
# What opens and closes a segment that is not plain text.
TAGS = {"<think>": ("</think>", THINKING), CALL_START: (CALL_END, TOOL_CALL)}
ALL_TAGS = (*TAGS, *(closing for closing, _ in TAGS.values()))
_ANY_TAG = re.compile(f"({'|'.join(map(re.escape, ALL_TAGS))})")
# A quote that opens: behind a letter it would close.
_OPENING_QUOTE = re.compile(r"(?:^|[\s(\[{=:,])['\"`]$")


class Tag(str):
    """A tag that is certainly one."""


class Words(str):
    """Text that is certainly no tag."""


class TagFinder:
    """Finds the tags in text that arrives in pieces, cut anywhere."""

    def __init__(self) -> None:
        self._held = ""  # plain text that could be the beginning of a tag
        self._before = ""  # the last two characters that came out
        self._waiting = ""  # a tag behind a quote: the next piece says whether it is quoted

    def add(self, piece: str) -> Iterator[str]:
        """The parts that this piece completes, each tag that counts a Tag of its own."""
        for part in self._found(piece):
            yield from self._unless_quoted(part)

    def finish(self) -> Iterator[str]:
        """The text that was held back."""
        if self._held:
            yield from self._unless_quoted(self._held)
        if self._waiting:
            yield Tag(self._waiting)
        self._held = self._waiting = ""

    def _found(self, piece: str) -> Iterator[str]:
        held, self._held = self._held, ""
        if isinstance(piece, Tag | Words):
            yield from filter(None, (held, piece))
            return
        *whole, rest = _ANY_TAG.split(held + piece)
        for part in filter(None, whole):
            yield Tag(part) if part in ALL_TAGS else part
        ready = len(rest) - longest_beginning(rest, ALL_TAGS)
        if ready:
            yield rest[:ready]
        self._held = rest[ready:]

    def _unless_quoted(self, part: str) -> Iterator[str]:
        """The part; a tag between two quotes of one kind is text."""
        if self._waiting:
            waiting, self._waiting = self._waiting, ""
            quoted = part[0] == self._before[-1] and not isinstance(part, Tag)
            yield Words(waiting) if quoted else Tag(waiting)
            self._before = waiting
        if isinstance(part, Tag) and _OPENING_QUOTE.search(self._before):
            self._waiting = part
            return
        yield part
        self._before = (self._before + part)[-2:]


def longest_beginning(text: str, tags: Iterable[str]) -> int:
    """Number of characters at the end of `text` that could begin a tag."""
    longest = max(map(len, tags)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(tag.startswith(text[-n:]) for tag in tags)), 0)
