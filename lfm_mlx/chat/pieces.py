"""Markdown cut into pieces that are drawn once each, while more of it comes.

A piece is a block, an item of a list, or so many lines of a long code block or table: what follows
a piece never changes how it looks. However the text is cut on its way, its pieces are the same.
"""

import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

from markdown_it.token import Token

from lfm_mlx.chat.markdown import PARSER, Part, column_widths

# Lines of code, or rows of a table, in a piece.
TOGETHER = 20
# Lines of code from which the colours of those below them follow.
CONTEXT = 40
# An open block of this many characters is read again when it has grown by a quarter.
OFTEN = 2000


class Piece(NamedTuple):
    """Some lines of Markdown; `joins` if no blank line parts them from the piece above."""

    source: str
    part: Part = Part()
    joins: bool = False


class Block(NamedTuple):
    """The lines of an outermost block or list item, to where the next begins.

    at: the line in which the block begins; those before it are blank
    joins: whether it is an item of the list above it
    """

    lines: list[str]
    token: Token | None = None
    at: int = 0
    joins: bool = False

    def divided(self) -> tuple[str, list[str], str]:
        """The opening lines, those that look the same without the ones below them, and the rest."""
        kind = self.token.type if self.token else ""
        first = self.at + {"fence": 1, "table_open": 2}.get(kind, len(self.lines) - self.at)
        last = len(self.lines)
        if kind == "fence" and self.token:
            mark = re.escape(self.token.markup)
            closing = re.compile(rf" {{0,3}}{mark}{mark[-1]}*[ \t]*\n?")
            ends = (at for at in range(first, last) if closing.fullmatch(self.lines[at]))
            last = next(ends, last - (self.lines[-1] == ""))
        elif kind == "table_open" and self.token and self.token.map:
            last = self.at + self.token.map[1] - self.token.map[0]
        return ("".join(self.lines[:first]), self.lines[first:last], "".join(self.lines[last:]))


def blocks(text: str) -> list[Block]:
    """The text cut where its outermost blocks and list items begin: at least one."""
    lines = text.split("\n")
    lines = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
    starts: list[tuple[int, Token, bool]] = []
    in_list = False
    for token in PARSER.parse(text):
        is_item = token.level == 1 and token.type == "list_item_open"
        is_block = token.level == 0 and not token.type.endswith("list_open")
        if token.map and (is_item or is_block):
            starts.append((token.map[0], token, is_item and in_list))
        in_list = is_item or (in_list and token.level > 0)
    if not starts:
        return [Block(lines)]
    ends = [*(start for start, _, _ in starts[1:]), len(lines)]
    begins = [0, *ends[:-1]]
    return [
        Block(lines[begin:end], token, start - begin, joins)
        for begin, end, (start, token, joins) in zip(begins, ends, starts, strict=True)
    ]


class Cutter:
    """Takes in Markdown as it comes, and gives the pieces that are settled."""

    def __init__(self) -> None:
        self._text, self._due = "", 0
        self._joins = False  # whether the text goes on with an item of the list above it
        # Of a block whose first pieces were given: its opening lines, and how it goes on.
        self._head, self._part = "", Part()

    def add(self, text: str) -> Iterator[Piece]:
        """Take in more of the text."""
        self._text += text
        end = self._text.rfind("\n") + 1
        # What a line is may change until it is whole: `-` can be a list or a heading's underline.
        if "\n" in text and end >= self._due:
            yield from self._cut(self._text[:end], self._text[end:])
            self._due = len(self._text) * 5 // 4 if len(self._text) > OFTEN else 0

    def open(self, most: int) -> Piece:
        """The unsettled text; the last `most` characters of a long one."""
        shown = self._text[-most:]
        if len(shown) < len(self._text) and "\n" in shown:
            shown = shown[shown.index("\n") + 1 :]
        return Piece(self._head + shown, self._part, self._part.goes_on)

    def close(self) -> Iterator[Piece]:
        """Settle the rest."""
        yield from self._cut(self._text, None)

    def _cut(self, text: str, rest: str | None) -> Iterator[Piece]:
        """Give all blocks but the last, which is given too if `rest`, what follows it, is None."""
        first, *others = blocks(self._head + text)
        *settled, last = first._replace(joins=self._joins), *others
        for block in settled:
            yield from self._whole(block)
        self._joins = last.joins
        if rest is None:
            yield from self._whole(last)
            self._head = self._text = ""
            return
        head, lines, tail = yield from self._long(last)
        self._head, opening = (head, "") if self._part.goes_on else ("", head)
        self._text = opening + "".join(lines) + tail + rest

    def _whole(self, block: Block) -> Iterator[Piece]:
        """Give all of a block."""
        head, lines, tail = yield from self._long(block)
        part, self._part = self._part, Part()
        source = head + "".join(lines) + tail
        if source.strip() and (lines or not part.goes_on):
            yield Piece(source, part, block.joins or part.goes_on)

    def _long(self, block: Block) -> Generator[Piece, None, tuple[str, list[str], str]]:
        """Give the first lines of a long block; returns what is left of it."""
        head, lines, tail = block.divided()
        while len(lines) > TOGETHER:
            given, lines = lines[:TOGETHER], lines[TOGETHER:]
            part = self._part
            if block.token and block.token.type == "table_open" and not part.widths:
                part = part._replace(widths=column_widths(PARSER.parse(head + "".join(given))))
            yield Piece(head + "".join(given), part, block.joins or part.goes_on)
            before = part.before.splitlines(keepends=True) + given
            self._part = part._replace(before="".join(before[-CONTEXT:]), goes_on=True)
        return head, lines, tail
