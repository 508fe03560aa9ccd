"""From logits to the next token: a frozen Sampling, and who draws by it, alone or for many rows.

Temperature 0 is greedy. The repetition penalty is Hugging Face's: every token that the prompt or
the answer has had counts, once, however long ago. How a token is drawn says `kernels/sample.py`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal
from lfm_mlx.kernels.metal import Kernels
from lfm_mlx.kernels.sample import RowSampling, Seen, sample, uniform
from lfm_mlx.kernels.self_check import working

# The last token drawn, of a row that has not drawn any.
NONE_DRAWN = -1


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults are what Liquid AI recommends for LFM2.5-8B-A1B.

    temperature: 0 or more; 0 takes the likeliest token
    top_k: draw among this many likeliest tokens, 0 for all · top_p, min_p: 0 to 1, 0 or 1 for off
    repetition_penalty: above 0; 1 for none
    presence_penalty, frequency_penalty: taken from the logit of a token that the answer has, once
        and for each time; 0 for none
    logit_bias: what is added to the logits of tokens, after the penalties
    """

    temperature: float = 0.2
    top_k: int = 80
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")
        # Minus infinity forbids a token; plus infinity would leave nothing to compare.
        odd = [bias for bias in self.logit_bias.values() if not bias < math.inf]
        if odd:
            raise InputError(f"logit_bias is {odd[0]}; expected a number below infinity")

    @functools.cached_property
    def row(self) -> RowSampling:
        """The settings as the kernel takes them."""
        return RowSampling(*(getattr(self, name) for name in RowSampling._fields))

    @classmethod
    def of_checkpoint(cls, generation_config: Mapping[str, Any]) -> "Sampling":
        """The defaults in a checkpoint's generation_config.json, or the recommended ones."""
        if generation_config.get("do_sample") is False:
            return GREEDY
        names = {field.name for field in fields(cls)}
        given = {
            key: value
            for key, value in generation_config.items()
            if key in names and value is not None
        }
        if not given:
            return cls()
        # A file that sets some of them means Hugging Face's neutral value for the others.
        return cls(**{"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0} | given)


GREEDY = Sampling(temperature=0.0, top_k=0, repetition_penalty=1.0)


class Draws:
    """Draws the next tokens of several sequences: rows, each with its own settings and seed.

    A row draws the same tokens alone and beside others.
    """

    def __init__(self, vocab_size: int, kernels: Kernels | None = None):
        """kernels: the operations that may run theirs; None: what the environment says"""
        self.vocab_size = vocab_size
        self.kernels = metal.chosen() if kernels is None else kernels
        self.rows: list[Row] = []
        # What every row has read and drawn, where one is penalized; and the rows' biases [B, V].
        self.seen: Seen | None = None
        self._bias: mx.array | None = None

    def add(self, sampling: Sampling, seed: int | None = None, read: Sequence[int] = ()) -> None:
        """Append a row.

        seed: the same one draws the same tokens; None: MLX's random state gives one
        read: the tokens before its first draw

        Raises InputError for a bias of a token that the vocabulary does not have.
        """
        strange = [token for token in sampling.logit_bias if not 0 <= token < self.vocab_size]
        if strange:
            raise InputError(
                f"logit_bias has token {strange[0]}; expected 0 to {self.vocab_size - 1}"
            )
        given: Any = mx.random.randint(0, 2**31 - 1).item() if seed is None else seed
        self.rows.append(Row(sampling, given))
        if self.seen is not None or sampling.row.penalizes:
            have = 0 if self.seen is None else len(self.rows) - 1
            fresh = self._nothing_seen(len(self.rows) - have)
            parts = [fresh] if self.seen is None else [self.seen, fresh]
            self.seen = Seen(*(mx.concatenate(list(part)) for part in zip(*parts, strict=True)))
            self.observe(len(self.rows) - 1, read)
        self._rebias()

    def _nothing_seen(self, rows: int) -> Seen:
        counts = mx.zeros((rows, self.vocab_size), mx.uint16)
        return Seen(counts, mx.full((rows,), NONE_DRAWN, mx.int32))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = [self.rows[row] for row in rows]
        penalized = any(row.sampling.row.penalizes for row in self.rows)
        if self.seen is not None:
            kept = mx.array(list(rows), mx.int32)
            self.seen = Seen(*(part[kept] for part in self.seen)) if penalized else None
        self._rebias()

    @classmethod
    def merge(cls, parts: Sequence["Draws"]) -> "Draws":
        """The rows of all of these, in their order, each where it was. One alone is itself."""
        if len(parts) == 1:
            return parts[0]
        merged = cls(parts[0].vocab_size, parts[0].kernels)
        merged.rows = [row for part in parts for row in part.rows]
        if any(part.seen is not None for part in parts):
            seen = [part.seen or part._nothing_seen(len(part.rows)) for part in parts]
            merged.seen = Seen(
                *(mx.concatenate(list(arrays)) for arrays in zip(*seen, strict=True))
            )
        merged._rebias()
        return merged

    def extract(self, row: int) -> "Draws":
        """One row by itself, as it is now."""
        single = Draws(self.vocab_size, self.kernels)
        single.rows, single.seen = self.rows[:], self.seen
        single.keep([row])
        return single

    def _rebias(self) -> None:
        self._bias = None
        if any(row.sampling.logit_bias for row in self.rows):
            table = np.zeros((len(self.rows), self.vocab_size), np.float32)
            for line, row in zip(table, self.rows, strict=True):
                line[list(row.sampling.logit_bias)] = list(row.sampling.logit_bias.values())
            self._bias = mx.array(table)  # pyright: ignore[reportArgumentType] - NumPy is taken

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        """Mark tokens as read by a row, for its repetition penalty."""
        if self.seen is None or not tokens:
            return
        marks = np.zeros((len(self.rows), self.vocab_size), np.uint16)
        marks[row, list(tokens)] = 1
        read: Any = mx.array(marks)  # pyright: ignore[reportArgumentType] - NumPy is taken
        self.seen = self.seen._replace(counts=self.seen.counts | read)

    def __call__(
        self, logits: mx.array, allowed: Sequence[mx.array | None] = ()
    ) -> tuple[mx.array, mx.array]:
        """Every row's next token, and the logarithm of the probability the model gave it.

        allowed: for each row the tokens to draw among, [V] bool; None for all

        Shapes: logits [B, V], returns tokens [B] and log-probabilities [B], both lazy.
        """
        numbers = [row.next_number() for row in self.rows]
        settings = [row.sampling.row for row in self.rows]
        mask = self._mask(allowed)
        drawn = sample(
            logits, settings, numbers, self.seen, self._bias, mask, use_kernel=self.use_kernel()
        )
        self.seen = drawn.seen
        return drawn.tokens, drawn.logprobs

    def remembers_nothing(self) -> bool:
        """Whether a draw depends on its logits alone."""
        return self.seen is None and self._bias is None

    def repeated(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Draws of the only row, which remembers nothing, one for each of logits [L, V]."""
        (row,) = self.rows
        numbers = [row.next_number() for _ in range(logits.shape[0])]
        settings = [row.sampling.row] * len(numbers)
        drawn = sample(logits, settings, numbers, use_kernel=self.use_kernel())
        return drawn.tokens, drawn.logprobs

    def use_kernel(self) -> bool | None:
        """As the door takes it."""
        if not metal.available():
            return False
        return metal.among(working(self.kernels & {"sample"}), "sample")

    def _mask(self, allowed: Sequence[mx.array | None]) -> mx.array | None:
        """[B, V] bool, None where every row may draw every token."""
        if all(mask is None for mask in allowed):
            return None
        shape, everything = (self.vocab_size,), mx.array(True)
        masks = [everything if mask is None else mask for mask in allowed]
        return mx.stack([mx.broadcast_to(mask, shape) for mask in masks])


@dataclass
class Row:
    """A sequence that is drawn beside others; `drawn` tokens so far."""

    sampling: Sampling
    seed: int
    drawn: int = 0

    def next_number(self) -> float:
        """The number between 0 and 1 from which the next draw follows."""
        self.drawn += 1
        return 0.0 if self.sampling.temperature == 0 else uniform(self.seed, self.drawn - 1)


class Sampler:
    """Draws the tokens of one sequence, and remembers the tokens seen."""

    def __init__(
        self, vocab_size: int, sampling: Sampling = GREEDY, seed: int | None = None,
        kernels: Kernels | None = None,
    ):  # fmt: skip
        """As a row of Draws; `draws` may take part in those of several rows (`Draws.merge`)."""
        self.draws = Draws(vocab_size, kernels)
        self.draws.add(sampling, seed)
        # What had been seen after each draw of the last `each`, and their number.
        self._seen_after: list[Seen | None] = []

    @property
    def seen(self) -> Seen | None:
        """The tokens that penalties look at; None without penalties."""
        return self.draws.seen

    def observe(self, tokens: Sequence[int]) -> None:
        """Mark these tokens as seen, for the repetition penalty."""
        self.draws.observe(0, tokens)

    def __call__(
        self, logits: mx.array, allowed: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The next token and the logarithm of the probability the model gave it.

        allowed: the tokens to draw among, [V] bool; None for all

        Shapes: logits [1, V], returns token [1] and log-probability [1], both lazy.
        """
        return self.draws(logits, [allowed])

    def each(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Draw at consecutive positions, at each as if those before it had been drawn alone.

        Shapes: logits [L, V], returns tokens [L] and log-probabilities [L], both lazy.
        """
        self._seen_after, drawn = [], []
        if self.draws.remembers_nothing():
            self._seen_after = [None] * logits.shape[0]
            return self.draws.repeated(logits)
        for position in range(logits.shape[0]):
            drawn.append(self.draws(logits[position : position + 1]))
            self._seen_after.append(self.draws.seen)
        tokens, logprobs = zip(*drawn, strict=True)
        return mx.concatenate(list(tokens)), mx.concatenate(list(logprobs))

    def keep(self, count: int) -> None:
        """Undo what the last `each` drew after its first `count` tokens, 1 or more."""
        if self._seen_after:
            self.draws.seen = self._seen_after[count - 1]
            (row,) = self.draws.rows
            row.drawn -= len(self._seen_after) - count
            self._seen_after = []
