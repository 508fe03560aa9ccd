"""Protocol of whoever shows a conversation to a person."""

from collections.abc import Iterable
from typing import Protocol

from lfm_mlx.chatml import Segment


class View(Protocol):
    """A terminal, or a pair of pipes.

    show_thinking: whether thoughts are shown, or folded away
    """

    show_thinking: bool

    def ask(self, default: str = "") -> str:
        """The person's next message, `default` where they change nothing. EOFError: there is none.

        Empty where there is nothing to do.
        """
        ...

    def confirm(self, question: str) -> str:
        """The person's answer to a question, empty if there is none."""
        ...

    def show(self, segments: Iterable[Segment]) -> None:
        """An answer, as it comes. What was shown of an interrupted one stays."""
        ...

    def say(self, text: str) -> None:
        """Print a command's result."""
        ...

    def note(self, text: str) -> None:
        """Print a dim remark."""
        ...
