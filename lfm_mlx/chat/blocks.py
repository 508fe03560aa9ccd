"""The blocks of an answer as a terminal shows them: what is settled stays, the rest is redrawn.

Markdown is drawn block by block: once another paragraph, list or fence begins, nothing that follows
can change how the one before it looks. An unclosed fence or emphasis is drawn as far as it goes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment as Drawn
from rich.text import Text

from lfm_mlx.cli.printer import escape_controls

# Characters of a long thought that are drawn again and again while it goes on.
LONGEST_OPEN = 8000


class Block(Protocol):
    """A piece of an answer while it comes."""

    def add(self, text: str) -> Iterator[RenderableType]:
        """Take in more of it; what is settled by that comes out."""
        ...

    def open(self) -> RenderableType:
        """The part that is not settled yet."""
        ...

    def close(self) -> Iterator[RenderableType]:
        """Settle the rest."""
        ...


class Prose:
    """Text in Markdown."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, text: str) -> Iterator[RenderableType]:
        self._text += escape_controls(text)
        if "\n" not in text:
            return
        # What a line is may change until it is whole: `-` can be a list or a heading's underline.
        whole = self._text[: self._text.rindex("\n") + 1]
        *settled, last = markdown_blocks(whole)
        self._text = last + self._text[len(whole) :]
        yield from drawn(settled)

    def open(self) -> RenderableType:
        return Markdown(self._text)

    def close(self) -> Iterator[RenderableType]:
        yield from drawn(markdown_blocks(self._text))


def markdown_blocks(text: str) -> list[str]:
    """The text cut where its outermost Markdown blocks begin: at least one piece."""
    lines = text.split("\n")
    tokens = (token for token in Markdown(text).parsed if token.level == 0 and token.map)
    begins = [token.map[0] for token in tokens if token.map]
    ends = [*begins[1:], len(lines)]
    pieces = ["\n".join(lines[a:b]) for a, b in zip([0, *begins[1:]], ends, strict=False)]
    return [piece + "\n" for piece in pieces[:-1]] + pieces[-1:]


def drawn(blocks: Iterable[str]) -> Iterator[RenderableType]:
    """Each block with a line left free below it."""
    for block in blocks:
        if block.strip():
            yield Markdown(block)
            yield ""


class Thought:
    """Thinking: dim, or folded to one line."""

    def __init__(self, shown: bool):
        self._shown, self._text, self._began = shown, "", time.monotonic()

    def add(self, text: str) -> Iterator[RenderableType]:
        self._text += escape_controls(text)
        return iter(())

    def open(self) -> RenderableType:
        if not self._shown:
            return self._folded("thinking …")
        return Text(self._text[-LONGEST_OPEN:].strip(), style="dim")

    def close(self) -> Iterator[RenderableType]:
        if not self._text.strip():
            return
        seconds = time.monotonic() - self._began
        whole = Text(self._text.strip(), style="dim")
        yield whole if self._shown else self._folded(f"thought for {seconds:.1f} s")
        yield ""

    def _folded(self, what: str) -> Text:
        return Text(f"▸ {what} {len(self._text.split())} words, /think shows them", style="dim")


class Called:
    """A tool call."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, text: str) -> Iterator[RenderableType]:
        self._text += escape_controls(text)
        return iter(())

    def open(self) -> RenderableType:
        return Text(self._text, style="cyan")

    def close(self) -> Iterator[RenderableType]:
        yield self.open()


class Tail:
    """The open part of a block whenever it is drawn: its last lines, and the status below them."""

    def __init__(self, block: Block, status: Callable[[], str]):
        self._block, self._status = block, status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._block.open(), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Drawn.line()
        yield Text(f"{self._status()} · Ctrl-C stops", style="dim")
