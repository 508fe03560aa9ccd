"""Log-likelihood scoring of several answers, by the model's own probabilities: classification."""

import math
from collections.abc import Collection, Sequence

import mlx.core as mx

from lfm_mlx.cache.protocols import Cache
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.model import Model


def score_choices(
    model: Model, cache: Cache, before: Sequence[int], choices: Sequence[Sequence[int]],
    stop_ids: Collection[int],
) -> list[float]:  # fmt: skip
    """The probability of each choice among all of them; they sum to 1.

    cache: begins with the tokens `before`, and is left at all but the last of them
    choices: token sequences; each must be followed by one of `stop_ids`
    """
    logprobs = [loglikelihood(model, cache, before, choice, stop_ids) for choice in choices]
    likeliest = max(logprobs)
    weights = [math.exp(logprob - likeliest) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def loglikelihood(
    model: Model, cache: Cache, before: Sequence[int], answer: Sequence[int],
    stop_ids: Collection[int],
) -> float:  # fmt: skip
    """The log-probability that `answer` and the end of the turn follow `before`."""
    rewind(cache, len(before) - 1)
    tokens = mx.array([[before[-1], *answer]], mx.int32)
    logits = model(tokens, cache)[0].astype(mx.float32)  # [1 + answer, V]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ends = mx.logsumexp(logprobs[-1, mx.array(sorted(stop_ids))])
    read = mx.take_along_axis(logprobs[:-1], tokens[0, 1:, None], axis=-1)
    total = (read.sum() + ends).item()
    rewind(cache, len(before) - 1)
    return float(total)  # pyright: ignore[reportArgumentType] - real numbers only
