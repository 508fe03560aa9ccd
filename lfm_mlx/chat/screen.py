"""A conversation on a terminal: prompt_toolkit reads, rich draws (the extra `chat`)."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, RenderableType
from rich.live import Live

from lfm_mlx import chatml
from lfm_mlx.chat.blocks import Block, Called, Prose, Tail, Thought
from lfm_mlx.cli.printer import escape_controls

REDRAWS_PER_SECOND = 12


class Screen:
    """The View of a person at a terminal.

    status: what the status line says
    words: completed where a message begins with one
    """

    def __init__(self, show_thinking: bool, status: Callable[[], str], words: Sequence[str]):
        self.show_thinking = show_thinking
        self._status = status
        self._console = Console(highlight=False)
        self._session: PromptSession[str] = PromptSession(
            history=history(), multiline=True, key_bindings=keys(), bottom_toolbar=status,
            completer=WordCompleter(list(words), sentence=True), complete_while_typing=False,
            prompt_continuation="  ",
        )  # fmt: skip
        self._questions: PromptSession[str] = PromptSession()

    def ask(self, default: str = "") -> str:
        try:
            return self._session.prompt("> ", default=default)
        except KeyboardInterrupt:
            self.note("/exit or Ctrl-D leaves")
            return ""

    def confirm(self, question: str) -> str:
        try:
            return self._questions.prompt(escape_controls(question) + " ")
        except (KeyboardInterrupt, EOFError):
            return ""

    def show(self, segments: Iterable[chatml.Segment]) -> None:
        block: Block = Prose()
        live = Live(
            Tail(block, self._status), console=self._console, transient=True,
            refresh_per_second=REDRAWS_PER_SECOND,
        )  # fmt: skip
        # Ctrl-C may come while it starts, which a `with` would not undo: it would draw for ever.
        try:
            live.start(refresh=True)
            for segment in segments:
                if segment.begins:
                    self._close(live, block)
                    block = self._block(segment.kind)
                    live.update(Tail(block, self._status))
                self._settle(block.add(segment.text))
                if segment.reason:
                    self.note(f"(no call: {segment.reason})")
        finally:
            self._close(live, block)
            live.stop()

    def _close(self, live: Live, block: Block) -> None:
        """Settle the block, whose open lines would else be drawn once more below it."""
        live.update("")
        self._settle(block.close())

    def _settle(self, settled: Iterable[RenderableType]) -> None:
        for drawing in settled:
            self._console.print(drawing)

    def _block(self, kind: str) -> Block:
        if kind == chatml.THINKING:
            return Thought(self.show_thinking)
        return Called() if kind == chatml.TOOL_CALL else Prose()

    def say(self, text: str) -> None:
        self._console.print(escape_controls(text), markup=False)

    def note(self, text: str) -> None:
        self._console.print(escape_controls(text), style="dim", markup=False)


def keys() -> KeyBindings:
    """Enter sends; Alt-Enter begins another line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def history() -> History:
    """Lines typed before, from the user's state folder; none if it cannot be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "lfm_mlx"
    file = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)
