"""A conversation through pipes: a message a line in, text out, asides on stderr."""

import sys
from collections.abc import Iterable

from lfm_mlx.chatml import Segment
from lfm_mlx.cli.printer import Printer, escape_controls
from lfm_mlx.text import well_formed


class Plain:
    """The View without a terminal. A line that ends in a backslash goes on in the next."""

    def __init__(self, show_thinking: bool):
        self.show_thinking = show_thinking

    def ask(self, default: str = "") -> str:
        lines = [line()]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(line())
        return "\n".join(lines) or default

    def confirm(self, question: str) -> str:
        self.note(question)
        try:
            return line()
        except EOFError:
            return ""

    def show(self, segments: Iterable[Segment]) -> None:
        printer = Printer(self.show_thinking)
        try:
            for segment in segments:
                printer.segment(segment)
        finally:
            printer.end()

    def say(self, text: str) -> None:
        print(escape_controls(text) if sys.stdout.isatty() else text, flush=True)

    def note(self, text: str) -> None:
        print(escape_controls(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def line() -> str:
    """A line of stdin. Raises EOFError where it ends."""
    text = sys.stdin.readline()
    if not text:
        raise EOFError
    return well_formed(text.removesuffix("\n").removesuffix("\r"))
