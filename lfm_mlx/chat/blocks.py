"""The blocks of an answer as a terminal shows them: what is settled stays, the rest is redrawn.

An unclosed fence or emphasis is drawn as far as it goes. What a redraw costs has a bound, however
long the block is.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment as Drawn
from rich.text import Text

from lfm_mlx.chat.markdown import Markdown
from lfm_mlx.chat.pieces import Cutter, Piece
from lfm_mlx.cli.printer import escape_controls

# Characters at the end of an open block that are drawn again and again while it goes on.
LONGEST_OPEN = 2000


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
        self._cutter = Cutter()
        self._is_first = True

    def add(self, text: str) -> Iterator[RenderableType]:
        yield from self._drawn(self._cutter.add(escape_controls(text)))

    def open(self) -> RenderableType:
        piece = self._cutter.open(LONGEST_OPEN)
        drawing = Markdown(piece.source, piece.part)
        return drawing if self._is_first or piece.joins else Group("", drawing)

    def close(self) -> Iterator[RenderableType]:
        yield from self._drawn(self._cutter.close())
        if not self._is_first:
            yield ""

    def _drawn(self, pieces: Iterable[Piece]) -> Iterator[RenderableType]:
        for piece in pieces:
            if not (self._is_first or piece.joins):
                yield ""
            self._is_first = False
            yield Markdown(piece.source, piece.part)


class Thought:
    """Thinking: dim, or folded to one line."""

    def __init__(self, shown: bool):
        self._shown, self._began = shown, time.monotonic()
        self._pieces: list[str] = []
        self._end, self._words = "", 0

    def add(self, text: str) -> Iterator[RenderableType]:
        text = escape_controls(text)
        # A word that goes on in the next piece was counted with its beginning.
        goes_on = self._end[-1:].strip() and text[:1].strip()
        self._words += len(text.split()) - bool(goes_on)
        self._pieces.append(text)
        self._end = (self._end + text)[-LONGEST_OPEN:]
        return iter(())

    def open(self) -> RenderableType:
        if not self._shown:
            return self._folded("thinking …")
        return Text(self._end.strip(), style="dim")

    def close(self) -> Iterator[RenderableType]:
        text = "".join(self._pieces).strip()
        if not text:
            return
        seconds = time.monotonic() - self._began
        yield (
            Text(text, style="dim") if self._shown else self._folded(f"thought for {seconds:.1f} s")
        )
        yield ""

    def _folded(self, what: str) -> Text:
        return Text(f"▸ {what} {self._words} words, /think shows them", style="dim")


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
