"""Prefill in chunks, then pipelined decoding: a stream of Step. Knows token ids only.

The next step is handed to the device before the current token is read, so that the device never
waits for Python.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from lfm_mlx.cache import arrays
from lfm_mlx.command import InputError
from lfm_mlx.model import Model
from lfm_mlx.sample import Sampler

PREFILL_CHUNK = 2048
# How often buffers that MLX keeps for reuse are given back while decoding.
CLEAR_EVERY = 256


@dataclass(frozen=True)
class Step:
    """One decoded token. `logprob` is the natural logarithm of the model's own probability of it.

    finish_reason: None while it goes on, `stop` at a stop token, `length` at the last one allowed
    """

    token: int
    logprob: float
    finish_reason: str | None = None


def decode(
    model: Model,
    prompt: Sequence[int],
    *,
    sampler: Sampler | None = None,
    max_tokens: int = 1024,
    stop_ids: Collection[int] = (),
    cache: list[Any] | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Read `prompt`, then yield one Step a token until a stop id or `max_tokens`.

    sampler: greedy when None
    cache: continued when given; afterwards it holds prompt and answer, a stop token with them, but
        not the last token that `max_tokens` allowed
    chunk: prompt tokens read in one pass
    progress: called with the prompt tokens read so far and their number

    Raises InputError for an empty prompt, or a token the vocabulary does not have.
    """
    vocab_size = model.config.vocab_size
    check_prompt(prompt, vocab_size)
    sampler = sampler or Sampler(vocab_size)
    cache = model.make_cache() if cache is None else cache
    sampler.observe(prompt)
    tokens = mx.array(list(prompt), mx.int32)
    prefill(model, tokens[:-1], cache, chunk, progress)
    if max_tokens < 1:
        return
    token, logprob = sampler(model(tokens[None, -1:], cache)[:, -1])
    mx.async_eval(token, logprob)
    for index in range(1, max_tokens + 1):
        following = None
        if index < max_tokens:
            following = sampler(model(token[:, None], cache)[:, -1])
            mx.async_eval(*following)
        if index == 1 and progress is not None:
            mx.eval(token)
            progress(len(prompt), len(prompt))
        current = int(_number(token))
        stopped = current in stop_ids
        reason = "stop" if stopped else "length" if following is None else None
        yield Step(current, _number(logprob), reason)
        if stopped or following is None:
            return
        token, logprob = following
        if index % CLEAR_EVERY == 0:
            mx.clear_cache()


def _number(array: mx.array) -> float:
    return array.item()  # pyright: ignore[reportReturnType] - real numbers only


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Raise InputError unless there is a token to start from and the model knows them all."""
    if not prompt:
        raise InputError("the prompt is empty; give at least one token")
    strange = [token for token in prompt if not 0 <= token < vocab_size]
    if strange:
        raise InputError(
            f"the prompt has token {strange[0]}, and the model knows 0 to {vocab_size - 1}; "
            "the tokenizer belongs to another model"
        )


def prefill(
    model: Model,
    tokens: mx.array,
    cache: list[Any],
    chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read tokens [L] into the cache, `chunk` at a time; `progress` counts one more to come."""
    for begin in range(0, tokens.size, chunk):
        model(tokens[None, begin : begin + chunk], cache)
        mx.eval(arrays(cache))
        if progress is not None:
            progress(min(begin + chunk, tokens.size), tokens.size + 1)
        mx.clear_cache()
