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


def tags_apart(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, each tag that counts a Tag of its own."""
    return _without_quoted(_found(pieces))


def _found(pieces: Iterable[str]) -> Iterator[str]:
    """Tags apart from text; plain text is held back while it could be the beginning of a tag."""
    held = ""
    for piece in pieces:
        if isinstance(piece, Tag | Words):
            yield from filter(None, (held, piece))
            held = ""
            continue
        *whole, rest = _ANY_TAG.split(held + piece)
        for part in filter(None, whole):
            yield Tag(part) if part in ALL_TAGS else part
        ready = len(rest) - longest_beginning(rest, ALL_TAGS)
        if ready:
            yield rest[:ready]
        held = rest[ready:]
    if held:
        yield held


def _without_quoted(parts: Iterable[str]) -> Iterator[str]:
    """The same parts; a tag between two quotes of one kind is text."""
    before, waiting = "", ""
    for part in parts:
        if waiting:
            quoted = part[0] == before[-1] and not isinstance(part, Tag)
            yield Words(waiting) if quoted else Tag(waiting)
            before, waiting = waiting, ""
        if isinstance(part, Tag) and _OPENING_QUOTE.search(before):
            waiting = part
            continue
        yield part
        before = (before + part)[-2:]
    if waiting:
        yield Tag(waiting)


def longest_beginning(text: str, tags: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a tag."""
    longest = max(map(len, tags)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(tag.startswith(text[-n:]) for tag in tags)), 0)
