"""A job under way (Row), and what is drawn for several of them (Drawing)."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.engine.decode import checked_logprob
from lfm_mlx.engine.job import Job, Prefix
from lfm_mlx.engine.sample import Sampler
from lfm_mlx.engine.speculate import Speculation
from lfm_mlx.errors import InputError, one_line

NO_PREFIX = Prefix()


@dataclass(eq=False)
class Row:
    """A job under way.

    tokens: the prompt and what was drawn and told
    left: tokens that may still be told
    arrived: when it was asked for
    read: how many of `tokens` the cache holds
    finish_reason, error: as in `Ended`, once it is over
    """

    number: int
    job: Job
    left: int
    arrived: float = 0.0
    tokens: list[int] = field(default_factory=list)
    cache: list[Any] = field(default_factory=list)
    sampler: Sampler | None = None
    prefix: Prefix = NO_PREFIX
    read: int = 0
    finish_reason: str | None = None
    error: str | None = None
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.job.prompt)

    @property
    def unread(self) -> int:
        """Tokens to read before its first step, which reads the last one."""
        return len(self.tokens) - 1 - self.read

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.job.prompt)

    def known(self) -> np.ndarray:
        """The tokens that its cache holds, int32."""
        return np.array(self.tokens[: self.read], np.int32)

    def fail(self, error: BaseException) -> None:
        self.finish_reason = "error"
        named = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        self.error = named + one_line(error)

    def take(self, token: int) -> None:
        """Tell a token that was drawn; afterwards the constraint knows it."""
        self.tokens.append(token)
        self.left -= 1
        if token in self.job.stop_ids:
            self.finish_reason = "stop"
        elif self.left == 0:
            self.finish_reason = "length"
        elif self.job.constraint is not None:
            try:
                self.job.constraint.advance(token)
            except Exception as error:  # whatever goes wrong in it, other rows go on
                self.fail(error)


@dataclass(frozen=True)
class Taken:
    """A token of a row; `top` as in `Token`."""

    row: Row
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Drawing:
    """Tokens drawn for some rows, still lazy.

    places: where each row's numbers are in `tokens` and `logprobs` [B]
    tops: ids and log-probabilities, [n] each, of the rows that asked for them
    """

    rows: list[Row]
    places: list[int]
    tokens: mx.array
    logprobs: mx.array
    tops: dict[Row, tuple[mx.array, mx.array]] = field(default_factory=dict)

    def of(self, rows: Collection[Row]) -> "Drawing":
        """The part for these of its rows."""
        kept = [pair for pair in zip(self.rows, self.places, strict=True) if pair[0] in rows]
        return Drawing(
            [row for row, _ in kept], [place for _, place in kept],
            self.tokens, self.logprobs, self.tops,
        )  # fmt: skip

    def in_order(self) -> mx.array:
        """Its rows' tokens, [B]."""
        if self.places == list(range(self.tokens.size)):
            return self.tokens
        return self.tokens[mx.array(self.places, mx.int32)]

    def take(self) -> list[Taken]:
        """Wait for the numbers, and tell them to the rows that are not over."""
        rows = [(r, p) for r, p in zip(self.rows, self.places, strict=True) if not r.finish_reason]
        tokens, logprobs = np.array(self.tokens).tolist(), np.array(self.logprobs).tolist()
        taken = []
        for row, place in rows:
            try:
                checked_logprob(logprobs[place])
            except InputError as error:
                row.fail(error)
                continue
            row.take(tokens[place])
            top = in_order(*self.tops[row]) if row in self.tops else ()
            taken.append(Taken(row, tokens[place], logprobs[place], top))
        return taken


def sampler_of(row: Row) -> Sampler:
    assert row.sampler is not None, "a row that decodes has a sampler"
    return row.sampler


def allowed(row: Row) -> mx.array | None:
    """The tokens among which to draw, [V] bool; None for all."""
    if row.job.constraint is None or row.finish_reason:
        return None
    try:
        return row.job.constraint.allowed()
    except Exception as error:  # whatever goes wrong in it, other rows go on
        row.fail(error)
        return None


def likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Ids and log-probabilities [count] of the likeliest tokens by logits [V], in any order."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    ids = mx.argpartition(-logprobs, count)[:count]
    return ids, logprobs[ids]


def in_order(ids: mx.array, logprobs: mx.array) -> tuple[tuple[int, float], ...]:
    """The likeliest first; of equal ones the lower id."""
    pairs = zip(np.array(ids).tolist(), np.array(logprobs).tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
