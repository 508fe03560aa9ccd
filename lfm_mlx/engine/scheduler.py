"""Scheduling: a step of all rows, a part of a prompt, or nothing. No arrays, no waiting.

While rows decode, prompts get a share of the time and rows the rest, so neither ever waits for long
for the other; alone, either gets all. A part of a prompt is as long as its share of a short while
takes at the speed that was measured. Short prompts pass long ones, but no prompt waits for ever.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from lfm_mlx.errors import InputError

Turn = Literal["step", "chunk", "idle"]

LONGEST_CHUNK = 2048  # tokens
CHUNK_STEP = 64  # tokens; what a chunk is a multiple of
# How long a chunk may keep rows from their next token.
CHUNK_SECONDS = 0.2
# A prompt is due so many seconds after it came as it has left to read by these tokens a second.
# It passes those that are due later; and none waits for ever, since newer ones are due ever later.
DUE_TOKENS_PER_SECOND = 40.0
# Of a new speed against those measured before it.
WEIGHT = 0.3


class Waiting(Protocol):
    """A prompt that is to be read. unread: tokens left · arrived: by the scheduler's clock"""

    @property
    def unread(self) -> int: ...
    @property
    def arrived(self) -> float: ...


T = TypeVar("T", bound=Waiting)


@dataclass
class Scheduler:
    """Shares time between prompts and rows.

    clock: seconds, never going back
    prefill_share: of the time while rows decode and prompts wait, above 0 and below 1
    """

    clock: Callable[[], float]
    prefill_share: float = 0.75
    chunk_seconds: float = CHUNK_SECONDS
    tokens_per_second: float | None = None  # of prompts, measured
    credit: float = 0.0  # seconds that prompts may take before rows are due

    def __post_init__(self) -> None:
        if not 0 < self.prefill_share < 1:
            raise InputError(
                f"prefill_share is {self.prefill_share}; expected above 0, and below 1"
            )

    def turn(self, rows: int, prompts: int) -> Turn:
        """Choose the next turn for this many rows and prompts."""
        if prompts and (not rows or self.credit > 0):
            return "chunk"
        return "step" if rows else "idle"

    def chunk_tokens(self, rows: int) -> int:
        """Number of prompt tokens to read at a time while this many rows wait."""
        if not rows:
            return LONGEST_CHUNK
        if self.tokens_per_second is None:
            return CHUNK_STEP
        fitting = int(self.tokens_per_second * self.chunk_seconds) // CHUNK_STEP * CHUNK_STEP
        return min(max(CHUNK_STEP, fitting), LONGEST_CHUNK)

    def stepped(self, seconds: float) -> None:
        """A step of the rows took so long."""
        earned = seconds * self.prefill_share / (1 - self.prefill_share)
        # Time that no prompt asked for is not saved up: rows would pay for it at once.
        self.credit = min(self.credit + earned, max(earned, self.chunk_seconds))

    def read(self, tokens: int, seconds: float, rows: int) -> None:
        """A chunk of `tokens` took so long, while this many rows waited."""
        self.credit = self.credit - seconds if rows else 0.0
        if seconds > 0 and tokens >= CHUNK_STEP:
            speed, known = tokens / seconds, self.tokens_per_second
            self.tokens_per_second = speed if known is None else known + WEIGHT * (speed - known)

    def in_order(self, waiting: Iterable[T]) -> list[T]:
        """Those that wait, the one to be read first at the beginning."""
        return sorted(
            waiting, key=lambda one: (one.arrived + one.unread / DUE_TOKENS_PER_SECOND, one.arrived)
        )
