"""Markdown as a terminal shows it, with every word of its source.

What Markdown would hide stays as it was written: HTML, entities, escapes, definitions of links, and
emphasis that may be none (`2*3*4`, `__init__`). Links show their addresses, list items their own
numbers, and lines end as they did. A block that cannot be drawn whole is drawn as its source.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any, ClassVar, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.emphasis import tokenize as emphasis
from markdown_it.token import Token
from rich import box
from rich import markdown as rich_markdown
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

# Rules of Markdown that would hide something of the text.
HIDING = ["autolink", "entity", "escape", "image", "reference"]
ADDRESS = re.compile(r"(https?|ftp|file)://|mailto:", re.IGNORECASE)
# What stands before emphasis that opens, and after emphasis that closes.
OPENS_AFTER = set("([{<\"'“‘«»„¿¡*_~-–—|>:")
CLOSES_BEFORE = set(")]}>\"'”’«».,:;!?…*_~-–—|")
ENDS_INSIDE = set(".,:;!?…%)\"'”’»`")
BEGINS_INSIDE = set("(\"'“‘«„¿¡`$€£")
# A column is not made narrower than this many cells before others are.
NARROWEST = 3


class Parser(MarkdownIt):
    """CommonMark and tables, less the rules that hide text."""

    def __init__(self) -> None:
        super().__init__("commonmark", {"html": False})
        self.enable("table").disable(HIDING)
        self.inline.ruler.at("emphasis", certain_emphasis)
        self.core.ruler.push("line_ends", keep_line_ends)

    def validateLink(self, url: str) -> bool:
        return bool(ADDRESS.match(url))

    def normalizeLink(self, url: str) -> str:
        return url


def certain_emphasis(state: StateInline, silent: bool) -> bool:
    """Let `*` and `**` emphasize where they stand around words; elsewhere they are text."""
    begin, added = state.pos, len(state.delimiters)
    if state.src[begin] == "_" or not emphasis(state, silent):
        return False
    before, after = state.src[:begin][-1:], state.src[state.pos :][:1]
    opens = (not before or before.isspace() or before in OPENS_AFTER) and (
        after.isalnum() or after in BEGINS_INSIDE
    )
    closes = (not after or after.isspace() or after in CLOSES_BEFORE) and (
        before.isalnum() or before in ENDS_INSIDE
    )
    for delimiter in state.delimiters[added:]:
        delimiter.open, delimiter.close = delimiter.open and opens, delimiter.close and closes
    return True


def keep_line_ends(state: StateCore) -> None:
    """Make each line end of a paragraph one that is drawn."""
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"


PARSER = Parser()


class Part(NamedTuple):
    """The link of a drawing to those of the same block above it.

    before: lines of code that were drawn, from which colours follow
    widths: of a table's columns, in terminal cells; empty if they follow from the rows
    goes_on: whether the block's beginning was drawn
    """

    before: str = ""
    widths: tuple[int, ...] = ()
    goes_on: bool = False


class Heading(rich_markdown.Heading):
    """A heading at the left: also in a narrow terminal it is one line."""

    LEVEL_ALIGN = dict.fromkeys(rich_markdown.Heading.LEVEL_ALIGN, "left")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class Code(rich_markdown.MarkdownElement):
    """Lines of code, their language above the first of them."""

    def __init__(self, language: str, part: Part):
        self.language, self.part, self.code = language, part, ""

    @classmethod
    def create(cls, markdown: Any, token: Token) -> "Code":
        return cls(token.info.strip(), markdown.part)

    def on_text(self, context: Any, text: Any) -> None:
        self.code = str(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.language and not self.part.goes_on:
            yield Text(f" {self.language}", style="dim")
        code = self.code.removesuffix("\n")
        if not code and self.part.goes_on:
            return
        before = self.part.before.count("\n")
        yield Syntax(
            self.part.before + code, (self.language.split() or ["text"])[0], theme="monokai",
            word_wrap=True, padding=(0, 1), line_range=(before + 1, None),
        )  # fmt: skip


class Item(rich_markdown.ListItem):
    """An item of a list, behind its bullet or its own number."""

    def __init__(self, marker: str):
        super().__init__()
        self.marker = marker

    @classmethod
    def create(cls, markdown: Any, token: Token) -> "Item":
        return cls(f"{token.info}{token.markup}" if token.info else "•")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = len(self.marker) + 2
        lines = console.render_lines(
            self.elements, options.update(width=options.max_width - width), style=self.style
        )
        style = console.get_style("markdown.item.bullet")
        first = Segment(f" {self.marker} ", style)
        for at, line in enumerate(lines or [[]]):
            yield Segment(" " * width) if at else first
            yield from line
            yield Segment.line()


class Items(rich_markdown.ListElement):
    """A list."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.items


class Rows(rich_markdown.TableElement):
    """A table whose cells are folded if it is wider than the terminal."""

    def __init__(self, part: Part):
        super().__init__()
        self.part = part

    @classmethod
    def create(cls, markdown: Any, token: Token) -> "Rows":
        return cls(markdown.part)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = self.header.row.cells if self.header and self.header.row else []
        widths = [None] * len(head)
        if self.part.widths:
            widths = narrowed(self.part.widths, options.max_width - 2 * len(head))
        table = Table(
            box=box.SIMPLE, pad_edge=False, style="markdown.table.border", collapse_padding=True,
            show_header=not self.part.goes_on, show_edge=False,
        )  # fmt: skip
        for cell, width in zip(head, widths, strict=True):
            title = cell.content.copy()
            title.stylize("markdown.table.header")
            table.add_column(title, width=width, overflow="fold")
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


def column_widths(tokens: Sequence[Token]) -> tuple[int, ...]:
    """The widest cell of each column of a table, in terminal cells."""
    widths: list[int] = []
    column = 0
    for token in tokens:
        if token.type == "tr_open":
            column = 0
        elif token.type == "inline":
            shown = "".join(child.content for child in token.children or ())
            widths += [1] * (column + 1 - len(widths))
            widths[column] = max(widths[column], cell_len(shown))
            column += 1
    return tuple(widths)


def narrowed(widths: Sequence[int], room: int) -> list[int]:
    """The widths made to fit: the widest columns give first."""
    found = [*widths]
    while sum(found) > room and max(found) > NARROWEST:
        widest = max(found)
        found[found.index(widest)] -= max(1, min(sum(found) - room, widest - NARROWEST) // 2)
    return found


class Markdown(rich_markdown.Markdown):
    """The drawing of some Markdown, or of a part of a block."""

    elements: ClassVar = rich_markdown.Markdown.elements | {
        "heading_open": Heading, "fence": Code, "code_block": Code, "list_item_open": Item,
        "bullet_list_open": Items, "ordered_list_open": Items, "table_open": Rows,
    }  # fmt: skip

    def __init__(self, source: str, part: Part = Part()):  # noqa: B008 - immutable
        super().__init__("", hyperlinks=False)
        self.markup, self.part = source, part
        self.parsed = PARSER.parse(source)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = super().__rich_console__(console, options)
        pieces = [piece for piece in found if isinstance(piece, Segment)]
        drawn = [*dropwhile(lambda piece: piece.text == "\n", pieces)]
        if self._is_whole(drawn, options.max_width):
            yield from drawn
        else:
            yield Text(self.markup.strip("\n"))

    def _is_whole(self, drawn: Sequence[Segment], width: int) -> bool:
        """Whether every letter and digit of the source is drawn, within the terminal."""
        if any(Segment.get_line_length(line) > width for line in Segment.split_lines(drawn)):
            return False
        if self.part.goes_on:  # its first lines were drawn, and need not be again
            return True
        letters = Counter(filter(str.isalnum, self.markup))
        return not letters - Counter("".join(piece.text for piece in drawn))
