"""From logits to the next token: a frozen Sampling, and the sampler it makes.

Temperature 0 is greedy. The repetition penalty is Hugging Face's: every token that the prompt or
the answer has had counts, once, however long ago.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from lfm_mlx.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are what Liquid AI recommends for LFM2.5-8B-A1B.

    temperature: 0 or more; 0 takes the likeliest token
    top_k: draw among this many likeliest tokens, 0 for all · top_p, min_p: 0 to 1, 0 or 1 for off
    repetition_penalty: above 0; 1 for none
    """

    temperature: float = 0.2
    top_k: int = 80
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.05

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")

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


class Sampler:
    """Draws the tokens of one sequence, and remembers which tokens it has had."""

    def __init__(self, vocab_size: int, sampling: Sampling = GREEDY, seed: int | None = None):
        """The same seed draws the same tokens; without one, MLX's random state gives a seed."""
        self.sampling = sampling
        self.top_k = sampling.top_k if sampling.top_k < vocab_size else 0
        drawn: Any = mx.random.randint(0, 2**31 - 1).item() if seed is None else seed
        self.seed: int = drawn
        self.drawn = 0
        penalized = sampling.repetition_penalty != 1.0
        self._seen = mx.zeros((vocab_size,), mx.bool_) if penalized else None  # [V]
        # What had been seen after each draw of the last `each`.
        self._seen_after: list[mx.array | None] = []

    def observe(self, tokens: Sequence[int]) -> None:
        """Count these tokens as had."""
        if self._seen is not None:
            self._seen[mx.array(list(tokens), mx.int32)] = True

    def __call__(
        self, logits: mx.array, allowed: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The next token and the logarithm of the probability the model gave it.

        allowed: the tokens to draw among, [V] bool; None for all

        Shapes: logits [1, V], returns token [1] and log-probability [1], both lazy.
        """
        logprobs = normalized(logits.astype(mx.float32))
        weights = logprobs
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            lowered = mx.where(logits > 0, logits / penalty, logits * penalty)
            weights = normalized(mx.where(self._seen, lowered, logits))
        if allowed is not None:
            weights = mx.where(allowed, weights, -mx.inf)
            # Without rounding anew, so that greedy draws what it drew where that is allowed.
            weights = normalized(weights) if self.sampling.temperature > 0 else weights
        token = self._draw(weights)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token, mx.array(True), axis=0)
        self.drawn += 1
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    def each(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Draw at consecutive positions, at each as if those before it had been drawn alone.

        Shapes: logits [L, V], returns tokens [L] and log-probabilities [L], both lazy.
        """
        self._seen_after = []
        if self.sampling.temperature == 0 and self._seen is None:
            return self(logits)
        drawn = []
        for position in range(logits.shape[0]):
            drawn.append(self(logits[position : position + 1]))
            self._seen_after.append(self._seen)
        tokens, logprobs = zip(*drawn, strict=True)
        return mx.concatenate(list(tokens)), mx.concatenate(list(logprobs))

    def keep(self, count: int) -> None:
        """Undo what the last `each` drew after its first `count` tokens, 1 or more."""
        if self._seen_after:
            self._seen = self._seen_after[count - 1]
            self.drawn -= len(self._seen_after) - count
            self._seen_after = []

    def _draw(self, logprobs: mx.array) -> mx.array:
        """A token [1] from log-probabilities [1, V], which the choices of `sampling` narrow."""
        chosen = self.sampling
        if chosen.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        if chosen.top_p < 1:
            logprobs = apply_top_p(logprobs, chosen.top_p)
        if chosen.min_p > 0:
            logprobs = apply_min_p(logprobs, chosen.min_p)
        if self.top_k > 0:
            logprobs = apply_top_k(logprobs, self.top_k)
        # A draw depends on the seed and on its number, not on what else was drawn.
        key = mx.array([self.seed % 2**32, self.drawn], mx.uint32)
        return mx.random.categorical(logprobs / chosen.temperature, key=key)


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities [.., V]."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
