"""Many prompts at once: mlx-lm's continuous batching, on this package's model, cache and sampler.

A row joins as soon as another has ended, and each gets the tokens that it would get alone. Knows
token ids only.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from lfm_mlx.engine.decode import Step, logprob_of
from lfm_mlx.engine.sample import Sampler, Sampling
from lfm_mlx.model import Model

# Prompts that are read at a time, while the other rows wait.
READ_TOGETHER = 8
# Rows that are put in order, the shortest prompt first: those read together are padded to be equal.
IN_ORDER = 64


@dataclass
class Row:
    """A prompt, and the steps that answer it; log-probabilities are not computed.

    key: whatever the caller knows it by
    """

    key: Any
    prompt: Sequence[int]
    max_tokens: int
    steps: list[Step] = field(default_factory=list)


class RowSampler:
    """Our Sampler in the two places that mlx-lm has for it.

    It wants the logits as the model gave them, which mlx-lm shows to processors only.
    """

    def __init__(self, sampler: Sampler, prompt: Sequence[int]):
        self._sampler = sampler
        self._sampler.observe(prompt)
        self._logits: mx.array | None = None

    def look(self, _: Any, logits: mx.array) -> mx.array:
        self._logits = logits
        return logits

    def draw(self, _: mx.array) -> mx.array:
        assert self._logits is not None, "processors come before the sampler"
        return self._sampler(self._logits)[0]


def decode_rows(
    model: Model, rows: Iterable[Row], *, stop_ids: Collection[int], sampling: Sampling,
    seed: int | None = None, size: int = 8,
) -> Iterator[Row]:  # fmt: skip
    """Each row when it has ended, in whatever order they end.

    rows: taken as they are needed; their prompts are checked, and their max_tokens fit the model
    seed: of each row's draws, as of a run of its own
    size: rows decoded together
    """
    generator = BatchGenerator(
        model, stop_tokens=[[token] for token in stop_ids], completion_batch_size=size,
        prefill_batch_size=min(size, READ_TOGETHER),
    )  # fmt: skip
    waiting = _shortest_first(rows)
    running: dict[int, Row] = {}
    try:
        while True:
            # Twice the size, so that a row that ends is followed at once.
            for row in islice(waiting, 2 * size - len(running)):
                running[_insert(generator, model, row, sampling, seed)] = row
            if not running:
                return
            for response in generator.next_generated():
                row = running[response.uid]
                if not row.steps:
                    logprob_of(response.logprobs[response.token])  # NaN from the start is said
                row.steps.append(Step(response.token, math.nan, response.finish_reason))
                if response.finish_reason is not None:
                    yield running.pop(response.uid)
    finally:
        generator.close()


def _shortest_first(rows: Iterable[Row]) -> Iterator[Row]:
    rows = iter(rows)
    while group := list(islice(rows, IN_ORDER)):
        yield from sorted(group, key=lambda row: len(row.prompt))


def _insert(
    generator: BatchGenerator, model: Model, row: Row, sampling: Sampling, seed: int | None
) -> int:
    """Hand the row over; returns mlx-lm's number for it."""
    drawing: dict[str, Any] = {}
    # Without samplers of their own the rows share one argmax, which is the same and cheaper.
    if sampling.temperature > 0 or sampling.repetition_penalty != 1:
        sampler = RowSampler(
            Sampler(model.config.vocab_size, sampling, seed, model.kernels), row.prompt
        )
        drawing = {"samplers": [sampler.draw], "logits_processors": [[sampler.look]]}
    return generator.insert([list(row.prompt)], [row.max_tokens], **drawing)[0]
