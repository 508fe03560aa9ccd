"""Decoding several tokens a pass: drafts are read ahead, and rewound where they were wrong.

One pass reads the newest token and a draft of what follows, and a token is drawn at each position.
The longest prefix of the draft that equals the sampled tokens is accepted, and the cache is rewound
to there. So a drafted token x is accepted with probability p(x), and its replacement is sampled
from p with x removed: speculative sampling with a proposal that is certain of x. The answer is that
of `decode`, with the same seed the same tokens, as far as rounding does not depend on how many
tokens a pass reads.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from lfm_mlx.cache.cache import cached_tokens, stored_bytes, tokens_read
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.cache.protocols import Cache
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.engine.decode import (
    CLEAR_EVERY,
    LARGE_BYTES,
    Reading,
    Step,
    begin,
    logprob_of,
    number,
    read,
)
from lfm_mlx.engine.lookup import PromptLookup
from lfm_mlx.engine.sample import Sampler
from lfm_mlx.model import Model


def decode_with_lookup(
    model: Model,
    prompt: Sequence[int],
    *,
    cache: Cache | None = None,
    lookup: PromptLookup | None = None,
    sampler: Sampler | None = None,
    max_tokens: int = 1024,
    stop_ids: Collection[int] = (),
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> Iterator[Step]:
    """`decode`, in fewer passes where the text repeats itself.

    lookup: a fresh one; it takes in the tokens of cache, prompt and answer, and keeps the counts

    A cache that cannot be rewound is decoded from without drafts. Wherever the caller stops, the
    cache holds no token that the caller was not given. Everything else is as in `decode`.
    """
    lookup = PromptLookup() if lookup is None else lookup
    lookup.text.extend([*([] if cache is None else tokens_read(cache)), *prompt])
    begun = begin(model, prompt, cache, sampler, max_tokens, reading)
    if begun.max_tokens < 1:
        return
    speculation = Speculation(
        model, begun.cache, begun.sampler, lookup, stop_ids, reading.kv_quantization
    )
    given = cached_tokens(begun.cache) + 1
    progress = reading.progress
    try:
        for step in speculation.steps(begun.last, begun.max_tokens):
            if progress is not None:
                progress(len(prompt), len(prompt))
                progress = None
            given += 1
            yield step
    finally:
        if cached_tokens(begun.cache) > given:
            rewind(begun.cache, given)


@dataclass(frozen=True)
class Pass:
    """A pass over the newest token and a draft: what was drawn after each of them, still lazy."""

    tokens: mx.array  # [1 + drafted]
    logprobs: mx.array  # [1 + drafted]
    draft: list[int]

    def accepted(self) -> int:
        """Number of drafted tokens that equal those drawn."""
        if not self.draft:
            return 0
        drawn = np.array(self.tokens[:-1])
        return int(np.cumprod(drawn == np.array(self.draft)).sum())


@dataclass
class Speculation:
    """One answer being decoded."""

    model: Model
    cache: Cache
    sampler: Sampler
    lookup: PromptLookup
    stop_ids: Collection[int]
    kv_quantization: KVQuantization | None = None
    large: bool = False  # keys and values, for which see decode.py

    def steps(self, token: mx.array, left: int) -> Iterator[Step]:
        """At most `left` steps, the first of them after `token` [1]."""
        running = self.read(token, [])
        while True:
            accepted = self.verify(running)
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
        """Tokens to read after `token` if `left` steps remain, and whether `token` was waited for.

        Waiting leaves the device idle, so it is for a match only; and of those it lets through the
        ones that foretold this token.
        """
        if left < 3 or not self.lookup.should_draft() or not self.trimmable():
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
        logits = read(self.model, tokens[None], self.cache, self.kv_quantization)
        if self.large:
            mx.eval(token)
        drawn, logprobs = self.sampler.each(logits[0])
        mx.async_eval(drawn, logprobs)
        return Pass(drawn, logprobs, draft)

    def verify(self, done: Pass) -> int:
        """Undo what a pass read in vain; returns how many drafted tokens it was right about."""
        drafted, accepted = len(done.draft), done.accepted()
        self.lookup.passes += 1
        if self.lookup.passes % CLEAR_EVERY == 1:
            self.large = stored_bytes(self.cache) > LARGE_BYTES
            mx.clear_cache()
        if drafted:
            self.sampler.keep(accepted + 1)
            self.lookup.record(drafted, accepted)
        if accepted < drafted:
            rewind(self.cache, cached_tokens(self.cache) - (drafted - accepted))
        return accepted

    def step(self, done: Pass, index: int, last: bool = False) -> Step:
        token = int(number(done.tokens[index]))
        reason = "stop" if token in self.stop_ids else "length" if last else None
        return Step(token, logprob_of(done.logprobs[index]), reason)
