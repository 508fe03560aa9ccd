"""A chat on a pseudo-terminal, seen as a person sees it: as lines on a screen."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

LINES, COLUMNS = 40, 100
PATIENCE = 60.0


class Terminal:
    """A chat with the demo model, its keys, and what stands on its screen."""

    def __init__(self, state: Path, *options: str):
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm-256color"}
        self.process = pexpect.spawn(
            sys.executable, ["-m", "lfm_mlx.chat", "--model", "demo", *options],
            env=environment, dimensions=(LINES, COLUMNS), timeout=PATIENCE,  # pyright: ignore
        )  # fmt: skip
        self.screen = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
        # Programs ask a terminal where its cursor is.
        self.screen.write_process_input = self.type
        self.stream = pyte.ByteStream(self.screen)

    def shown(self) -> str:
        """All that stands there, and what was scrolled away above it."""
        above = [
            "".join(line[at].data for at in range(COLUMNS)) for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait until `text` stands there `count` times; returns all that stands there."""
        self._read_until(lambda: self.shown().count(text) >= count, repr(text))
        return self.shown()

    def wait_for_prompt(self) -> None:
        """Wait until a message can be typed: there is nothing below the prompt but the status."""

        def ready() -> bool:
            lines = [line.rstrip() for line in self.screen.display if line.strip()]
            return lines[-2:-1] == [">"] and "tokens/s · context" in lines[-1]

        self._read_until(ready, "the prompt")

    def _read_until(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < end, f"{what} never came:\n{self.shown()}"
            with contextlib.suppress(pexpect.TIMEOUT):
                self.stream.feed(self.process.read_nonblocking(4096, timeout=0.2))

    def type(self, text: str) -> None:
        self.process.send(text)

    def enter(self, text: str) -> None:
        """Type a message, once there is a prompt for it."""
        self.wait_for_prompt()
        self.type(text + "\r")

    def exit_code(self) -> int | None:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close(force=True)
