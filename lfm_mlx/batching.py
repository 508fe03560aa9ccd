"""Many prompts at once: mlx-lm's continuous batching, on this package's model, cache and sampler.

A row joins as soon as another has ended, and each gets the tokens that it would get alone. Knows
token ids only.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from lfm_mlx.decode import check_prompt, room_for_answer
from lfm_mlx.model import Model
from lfm_mlx.sample import Sampler, Sampling

# Prompts that are read at a time, while the other rows wait.
READ_TOGETHER = 8
# Rows that are put in order, the shortest prompt first: those read together are padded to be equal.
IN_ORDER = 64


@dataclass
class Row:
    """A prompt, and the tokens that answer it, the stop token with them.

    key: whatever the caller knows it by
    finish_reason: `stop` or `length` once it has ended
    """

    key: Any
    prompt: Sequence[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


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


def require_fit(model: Model, row: Row) -> None:
    """Check the prompt, and cut `max_tokens` to what the model's maximum leaves.

    Raises InputError for a prompt that cannot be answered.
    """
    check_prompt(row.prompt, model.config.vocab_size)
    row.max_tokens = room_for_answer(model.config, len(row.prompt), row.max_tokens)


def decode_rows(
    model: Model, rows: Iterable[Row], *, stop_ids: Collection[int], sampling: Sampling,
    seed: int | None = None, size: int = 8,
) -> Iterator[Row]:  # fmt: skip
    """Each row when it has ended, in whatever order they end.

    rows: taken as they are needed; each went through `require_fit`
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
                running[response.uid].tokens.append(response.token)
                if response.finish_reason is not None:
                    row = running.pop(response.uid)
                    row.finish_reason = response.finish_reason
                    yield row
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
        sampler = RowSampler(Sampler(model.config.vocab_size, sampling, seed), row.prompt)
        drawing = {"samplers": [sampler.draw], "logits_processors": [[sampler.look]]}
    return generator.insert([list(row.prompt)], [row.max_tokens], **drawing)[0]
