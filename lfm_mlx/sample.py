"""From logits to the next token: a frozen Sampling, and the sampler it makes.

Temperature 0 is greedy. The repetition penalty is Hugging Face's: every token that the prompt or
the answer has had counts, once, however long ago.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from lfm_mlx.command import InputError


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
        """Seeds MLX's random state when `seed` is given: the same seed draws the same tokens."""
        self.penalty = sampling.repetition_penalty
        self._seen = mx.zeros((vocab_size,), mx.bool_) if self.penalty != 1.0 else None  # [V]
        self._draw = make_sampler(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        )
        if seed is not None:
            mx.random.seed(seed)

    def observe(self, tokens: Sequence[int]) -> None:
        """Count these tokens as had."""
        if self._seen is not None:
            self._seen[mx.array(list(tokens), mx.int32)] = True

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The next token and the logarithm of the probability the model gave it.

        Shapes: logits [1, V], returns token [1] and log-probability [1], both lazy.
        """
        logprobs = normalized(logits.astype(mx.float32))
        if self._seen is None:
            token = self._draw(logprobs)
        else:
            lowered = mx.where(logits > 0, logits / self.penalty, logits * self.penalty)
            token = self._draw(normalized(mx.where(self._seen, lowered, logits)))
            self._seen[token] = True
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities [.., V]."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
