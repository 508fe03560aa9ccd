"""Prefill in chunks, then pipelined decoding: a stream of Step. Knows token ids only.

The next step is handed to the device before the current token is read, so that the device never
waits for Python. With a large cache the next step is only built, not started: MLX updates keys and
values in place only if no running step still reads them; otherwise it copies the whole cache.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.cache.cache import cache_state, cached_tokens, check_cache, stored_bytes, whole_step
from lfm_mlx.cache.keys_values import KVQuantization, quantize_cache
from lfm_mlx.cache.protocols import Cache
from lfm_mlx.config import Config
from lfm_mlx.engine.constraint import Constraint
from lfm_mlx.engine.sample import Sampler
from lfm_mlx.errors import InputError
from lfm_mlx.model import Model

PREFILL_CHUNK = 2048
# How often buffers that MLX keeps for reuse are given back while decoding.
CLEAR_EVERY = 256
# From this size on a copy of keys and values would cost more than a device that waits for Python.
LARGE_BYTES = 256 << 20


@dataclass(frozen=True)
class Step:
    """One decoded token. `logprob` is the natural logarithm of the model's own probability of it.

    finish_reason: None while it goes on, `stop` at a stop token, `length` at the last one allowed
    """

    token: int
    logprob: float
    finish_reason: str | None = None


@dataclass(frozen=True)
class Reading:
    """Settings for reading tokens into a cache.

    chunk: prompt tokens read in one pass; working memory depends on it
    kv_quantization: of keys and values, those that the cache has already with them
    progress: called with the prompt tokens read so far and their number
    """

    chunk: int = PREFILL_CHUNK
    kv_quantization: KVQuantization | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Beginning:
    """A prompt that is read up to its last token, which decoding starts from.

    last: [1]
    max_tokens: what was asked for, or what the model's maximum leaves
    """

    cache: Cache
    sampler: Sampler
    last: mx.array
    max_tokens: int


def begin(
    model: Model,
    prompt: Sequence[int],
    cache: Cache | None,
    sampler: Sampler | None,
    max_tokens: int,
    reading: Reading,
) -> Beginning:
    """Check the prompt, and read all of it but its last token.

    Raises InputError, with the cache as it was, as `decode` does.
    """
    vocab_size = model.config.vocab_size
    check_prompt(prompt, vocab_size)
    sampler = Sampler(vocab_size, kernels=model.kernels) if sampler is None else sampler
    cache = model.make_cache() if cache is None else cache
    check_cache(model.config, cache)
    room = room_for_answer(model.config, cached_tokens(cache) + len(prompt), max_tokens)
    sampler.observe(prompt)
    tokens = mx.array(list(prompt), mx.int32)
    prefill(model, tokens[:-1], cache, reading)
    return Beginning(cache, sampler, tokens[-1:], room)


def decode(
    model: Model,
    prompt: Sequence[int],
    *,
    cache: Cache | None = None,
    sampler: Sampler | None = None,
    max_tokens: int = 1024,
    stop_ids: Collection[int] = (),
    constraint: Constraint | None = None,
    reading: Reading = Reading(),
) -> Iterator[Step]:
    """Read `prompt`, then yield one Step a token until a stop id or `max_tokens`.

    It ends at the model's maximum as it does at `max_tokens`: nothing that was read is dropped to
    go on.

    cache: continued if given; afterwards it holds prompt and answer, a stop token with them, but
        not the last token that `max_tokens` allowed. Interrupted, it holds all that was read in
        whole passes, and can be used
    sampler: greedy if None
    constraint: says before each token which ones may come, and follows this one answer

    Raises InputError, with the cache as it was, for an empty prompt, one longer than the model can
    read, a token the vocabulary does not have, or a cache of another model.
    """
    begun = begin(model, prompt, cache, sampler, max_tokens, reading)
    cache, sampler = begun.cache, begun.sampler
    if begun.max_tokens < 1:
        return
    logits = read(model, begun.last[None], cache, reading.kv_quantization)[:, -1]
    token, logprob = _draw(sampler, logits, constraint)
    mx.async_eval(token, logprob)
    large = False
    for index in range(1, begun.max_tokens + 1):
        if index % CLEAR_EVERY == 1:
            large = stored_bytes(cache) > LARGE_BYTES
        following = None
        if index < begun.max_tokens:
            logits = read(model, token[:, None], cache, reading.kv_quantization)[:, -1]
            if large:
                mx.eval(token)
            following = _draw(sampler, logits, constraint, token)
            mx.async_eval(*following)
        if index == 1 and reading.progress is not None:
            mx.eval(token)
            reading.progress(len(prompt), len(prompt))
        current = int(number(token))
        stopped = current in stop_ids
        reason = "stop" if stopped else "length" if following is None else None
        yield Step(current, logprob_of(logprob), reason)
        if stopped or following is None:
            return
        token, logprob = following
        if index % CLEAR_EVERY == 0:
            mx.clear_cache()


def _draw(
    sampler: Sampler, logits: mx.array, constraint: Constraint | None, token: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Sample the token after `token` [1] from logits [1, V]; returns it with its log-probability.

    A constraint must know the token first; it makes its mask while the device reads that token.
    """
    if constraint is None:
        return sampler(logits)
    mx.async_eval(logits)
    if token is not None:
        constraint.advance(int(number(token)))
    return sampler(logits, constraint.allowed())


def logprob_of(array: mx.array) -> float:
    """A log-probability as a number. Raises InputError if it is NaN: then the token means nothing.

    Shapes: array [] or [1]
    """
    return checked_logprob(number(array))


def checked_logprob(logprob: float) -> float:
    """The log-probability. Raises InputError if it is NaN."""
    if math.isnan(logprob):
        raise InputError(
            "the model computes NaN: its weights hold NaN or infinity (check when loading tells), "
            "or its activations overflow float16 (dtype bfloat16 or float32 do not)"
        )
    return logprob


def number(array: mx.array) -> float:
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


def room_for_answer(config: Config, prompt_tokens: int, max_tokens: int) -> int:
    """The tokens that may be generated: `max_tokens`, or what the model's maximum leaves.

    Raises InputError if the prompt leaves nothing.
    """
    room = config.max_position_embeddings - prompt_tokens
    if room < 1:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens; the model reads at most "
            f"{config.max_position_embeddings - 1} and then answers"
        )
    return min(max_tokens, room)


def read(
    model: Model,
    tokens: mx.array,
    cache: Cache,
    kv_quantization: KVQuantization | None = None,
) -> mx.array:
    """Logits [1, L, V] for tokens [1, L]; if it is interrupted, no layer has read them."""
    quantize_cache(cache, kv_quantization)
    with whole_step(cache):
        return model(tokens, cache)


def prefill(
    model: Model,
    tokens: mx.array,
    cache: Cache,
    reading: Reading = Reading(),
) -> None:
    """Read tokens [L] into the cache, a chunk at a time; progress counts one more to come.

    Working memory depends on the chunk, not on L. Interrupted, it leaves the chunks read so far.
    """
    for start in range(0, tokens.size, reading.chunk):
        stop = min(start + reading.chunk, tokens.size)
        read(model, tokens[None, start:stop], cache, reading.kv_quantization)
        mx.eval(cache_state(cache))
        if reading.progress is not None:
            reading.progress(stop, tokens.size + 1)
        mx.clear_cache()
