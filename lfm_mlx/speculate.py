"""Decoding several tokens a pass: drafts are read ahead, and rewound where they were wrong.

One pass reads the newest token and a draft of what follows, and a token is drawn at each position.
The draft is accepted as far as it is what was drawn, and the cache is rewound to there. A drafted x
is so accepted with its probability p(x), and what replaces it follows p without x, renormalised:
speculative sampling with a proposal that is certain of x. The answer is that of `decode`, with the
same seed the same tokens, as far as rounding does not depend on how many tokens a pass reads.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.cache import check_cache, rewind, stored_bytes, stored_length, token_log
from lfm_mlx.decode import (
    CLEAR_EVERY,
    LARGE_BYTES,
    PREFILL_CHUNK,
    Step,
    check_prompt,
    number,
    prefill,
    read,
    room_for_answer,
)
from lfm_mlx.keys_values import Packing
from lfm_mlx.lookup import Lookup
from lfm_mlx.model import Model
from lfm_mlx.sample import Sampler


def decode_with_lookup(
    model: Model,
    prompt: Sequence[int],
    *,
    lookup: Lookup | None = None,
    sampler: Sampler | None = None,
    max_tokens: int = 1024,
    stop_ids: Collection[int] = (),
    cache: list[Any] | None = None,
    packing: Packing | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """`decode`, in fewer passes where the text repeats itself.

    lookup: a fresh one; it takes in the tokens of cache, prompt and answer, and keeps the counts

    A cache that cannot be rewound is decoded from without drafts. Wherever the caller stops, the
    cache holds no token that the caller was not given. Everything else is as in `decode`.
    """
    check_prompt(prompt, model.config.vocab_size)
    lookup = Lookup() if lookup is None else lookup
    sampler = Sampler(model.config.vocab_size) if sampler is None else sampler
    cache = model.make_cache() if cache is None else cache
    check_cache(model.config, cache)
    max_tokens = room_for_answer(model.config, stored_length(cache) + len(prompt), max_tokens)
    sampler.observe(prompt)
    lookup.text.extend([*tokens_read(cache), *prompt])
    tokens = mx.array(list(prompt), mx.int32)
    prefill(model, tokens[:-1], cache, chunk, progress, packing)
    if max_tokens < 1:
        return
    speculation = Speculation(model, cache, sampler, lookup, stop_ids, packing)
    given = stored_length(cache) + 1
    try:
        for step in speculation.steps(tokens[-1:], max_tokens):
            if progress is not None:
                progress(len(prompt), len(prompt))
                progress = None
            given += 1
            yield step
    finally:
        if stored_length(cache) > given:
            rewind(cache, given)


def tokens_read(cache: Sequence[Any]) -> list[int]:
    """The tokens that the cache holds, none where it does not know them."""
    log = token_log(cache)
    if log is None or not log.complete or log.tokens is None:
        return []
    return np.array(log.tokens)[0].tolist()


@dataclass(frozen=True)
class Pass:
    """A pass over the newest token and a draft: what was drawn after each of them, still lazy."""

    tokens: mx.array  # [1 + drafted]
    logprobs: mx.array  # [1 + drafted]
    draft: list[int]

    def accepted(self) -> int:
        """How many drafted tokens are those that were drawn."""
        if not self.draft:
            return 0
        drawn = np.array(self.tokens[:-1])
        return int(np.cumprod(drawn == np.array(self.draft)).sum())


@dataclass
class Speculation:
    """One answer being decoded."""

    model: Model
    cache: list[Any]
    sampler: Sampler
    lookup: Lookup
    stop_ids: Collection[int]
    packing: Packing | None = None
    large: bool = False  # keys and values, for which see decode.py

    def steps(self, token: mx.array, left: int) -> Iterator[Step]:
        """At most `left` steps, the first of them after `token` [1]."""
        running = self.read(token, [])
        while True:
            accepted = self.settle(running)
            for index in range(accepted):
                step = self.step(running, index)
                self.lookup.text.append(step.token)
                left -= 1
                yield step
                if step.finish_reason is not None:
                    return
            token = running.tokens[accepted : accepted + 1]
            draft, taken_in = self.draft(token, left)
            following = self.read(token, draft) if left > 1 else None
            step = self.step(running, accepted, last=following is None)
            if not taken_in:
                self.lookup.text.append(step.token)
            left -= 1
            yield step
            if step.finish_reason is not None or following is None:
                return
            running = following

    def draft(self, token: mx.array, left: int) -> tuple[list[int], bool]:
        """What to read after `token` when `left` steps remain, and whether it was waited for.

        Waiting leaves the device idle, so it is for a match only; and of those it lets through the
        ones that foretold this token.
        """
        if left < 3 or not self.lookup.promising() or not self.trimmable():
            return [], False
        value = int(number(token))
        draft = self.lookup.draft(value, left - 2)
        ends = [index for index, drafted in enumerate([value, *draft]) if drafted in self.stop_ids]
        return draft[: ends[0]] if ends else draft, True

    def trimmable(self) -> bool:
        return all(entry.is_trimmable() for entry in self.cache)

    def read(self, token: mx.array, draft: list[int]) -> Pass:
        """Start a pass; returns without waiting for it."""
        tokens = mx.concatenate([token.astype(mx.int32), mx.array(draft, mx.int32)])
        logits = read(self.model, tokens[None], self.cache, self.packing)
        if self.large:
            mx.eval(token)
        drawn, logprobs = self.sampler.each(logits[0])
        mx.async_eval(drawn, logprobs)
        return Pass(drawn, logprobs, draft)

    def settle(self, done: Pass) -> int:
        """Undo what a pass read in vain; returns how many drafted tokens it was right about."""
        drafted, accepted = len(done.draft), done.accepted()
        self.lookup.passes += 1
        if self.lookup.passes % CLEAR_EVERY == 1:
            self.large = stored_bytes(self.cache) > LARGE_BYTES
            mx.clear_cache()
        if drafted:
            self.sampler.keep(accepted + 1)
            self.lookup.judge(drafted, accepted)
        if accepted < drafted:
            rewind(self.cache, stored_length(self.cache) - (drafted - accepted))
        return accepted

    def step(self, done: Pass, index: int, last: bool = False) -> Step:
        token = int(number(done.tokens[index]))
        reason = "stop" if token in self.stop_ids else "length" if last else None
        return Step(token, number(done.logprobs[index]), reason)
