"""From logits to tokens: one rule of drawing for every row, alone or with others.

    w = penalties(logits) + bias, among the allowed;  kept = the first of w that the limits leave
    token = where u reaches among exp((w - max w) / temperature) of the kept, in vocabulary order

Weights are float32. Penalties are first Hugging Face's (of a token that was read or drawn: divided
by it if positive, else multiplied), then OpenAI's (presence, and frequency times how often it was
drawn). top_k, top_p and min_p each keep a beginning of the tokens in the order of their weights,
equal ones by index; top_p and min_p look at probabilities at temperature 1. u is one number of a
row, so a draw depends on nothing else. Without temperature the first of w is taken.

The kernel is two launches, however large the vocabulary, without a sort. Limits: float32, float16
or bfloat16 logits, 8 to 262,144 of them, masks and biases of their shape.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from lfm_mlx.kernels import metal

# Neighbouring logits of which the first launch tells the best.
BLOCK = 256
MIN_VOCAB, MAX_VOCAB = 8, 262_144
# Candidates that the second launch ranks by counting, its threads, and the blocks that it looks at
# first where top_p alone limits them.
ROOM, THREADS, TRIED = 1024, 512, 256
# Simdgroups in a threadgroup of the first launch: they share nothing.
SIMDGROUPS = 4
# Floats of a row in the kernel's settings; the last one is not used.
SETTINGS = 8


class RowSampling(NamedTuple):
    """Sampling settings of a row. Each default leaves its part out; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        return self[4:] != (1.0, 0.0, 0.0)


class Seen(NamedTuple):
    """Tokens that rows have read and drawn.

    counts: [B, V] uint16; bit 0: the token was read or drawn; the bits above: how often drawn
    last: [B] int32, the token drawn last, which `counts` lacks; -1 for none
    """

    counts: mx.array
    last: mx.array


class Drawn(NamedTuple):
    """Tokens [B] uint32, the logarithms of the probabilities the logits give them [B] float32.

    seen: for the next draw, None if none was given
    """

    tokens: mx.array
    logprobs: mx.array
    seen: Seen | None


def uniform(seed: int, draw: int) -> float:
    """One of 2^23 numbers between 0 and 1, evenly spaced, that follows from seed and draw.

    Neither end is among them, so that no token is drawn that has next to no share.
    """
    digest = hashlib.blake2b(f"{seed}:{draw}".encode(), digest_size=4).digest()
    return ((int.from_bytes(digest, "little") >> 9) + 0.5) / 2**23


def sample(
    logits: mx.array,
    rows: Sequence[RowSampling],
    uniforms: Sequence[float],
    seen: Seen | None = None,
    bias: mx.array | None = None,
    allowed: mx.array | None = None,
    *,
    use_kernel: bool | None = None,
) -> Drawn:
    """Draw a token for each row, each with its own settings and number.

    seen: what penalties look at; without it there are none

    Shapes:
        logits: [B, V] · rows, uniforms: B · bias: [B, V] float32 · allowed: [B, V] bool, of which
        every row has one
    """
    run = sample_reference
    if metal.choose("sample", use_kernel, _refusal(logits, bias, allowed)):
        run = _sample_metal
    return run(logits, rows, uniforms, seen, bias, allowed)


def sample_reference(
    logits: mx.array,
    rows: Sequence[RowSampling],
    uniforms: Sequence[float],
    seen: Seen | None = None,
    bias: mx.array | None = None,
    allowed: mx.array | None = None,
) -> Drawn:
    """`sample` in MLX operations, a row at a time."""
    values = logits.astype(mx.float32)
    counts = None if seen is None else counted(seen)
    tokens: list[mx.array] = []
    for index, (row, number) in enumerate(zip(rows, uniforms, strict=True)):
        weights = values[index]
        if counts is not None and row.penalizes:
            weights = penalized(weights, counts[index], row)
        if bias is not None:
            weights = weights + bias[index]
        if allowed is not None:
            weights = mx.where(allowed[index], weights, -mx.inf)
        tokens.append(_token(comparable(weights), row, number))
    drawn = mx.stack(tokens).astype(mx.uint32)
    after = None if counts is None else Seen(counts, drawn.astype(mx.int32))
    return Drawn(drawn, log_probabilities(values, drawn), after)


def comparable(weights: mx.array) -> mx.array:
    """Replace NaN by minus infinity, so that it is never drawn."""
    return mx.where(mx.isnan(weights), -mx.inf, weights)


def log_probabilities(logits: mx.array, tokens: mx.array) -> mx.array:
    """Of tokens [B], by logits [B, V] float32."""
    picked = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(logits, axis=-1)


def counted(seen: Seen) -> mx.array:
    """The counts with the token drawn last."""
    drawn = mx.arange(seen.counts.shape[1]) == seen.last[:, None]
    more = mx.minimum((seen.counts | 1).astype(mx.int32) + 2, 65535).astype(mx.uint16)
    return mx.where(drawn, more, seen.counts)


def penalized(weights: mx.array, counts: mx.array, row: RowSampling) -> mx.array:
    """Shapes: weights and counts [V]."""
    if row.repetition_penalty != 1.0:
        penalty = row.repetition_penalty
        lowered = mx.where(weights > 0, weights / penalty, weights * penalty)
        weights = mx.where((counts & 1) != 0, lowered, weights)
    if row.presence_penalty or row.frequency_penalty:
        times = (counts >> 1).astype(mx.float32)
        lowered = weights - (row.presence_penalty + row.frequency_penalty * times)
        weights = mx.where(times > 0, lowered, weights)
    return weights


def _token(weights: mx.array, row: RowSampling, number: float) -> mx.array:
    """A token, from weights [V]."""
    if row.temperature == 0:
        return mx.argmax(weights)
    top, tokens, total = weights.max(), None, None
    if 0 < row.top_k < weights.size:
        # Everything else is about these few.
        tokens = _largest(weights, row.top_k)
        total = mx.logsumexp(weights)
        weights = weights[tokens]
    shares = mx.exp((weights - top) / row.temperature)
    shares = mx.where(weights == top, 1.0, shares)  # else not a number where the top is infinite
    if row.top_p < 1:
        shares = mx.where(_likeliest(weights, total, row.top_p), shares, 0.0)
    if row.min_p > 0:
        shares = mx.where(weights >= top + math.log(row.min_p), shares, 0.0)
    drawn = _reached(shares, number)
    return drawn if tokens is None else tokens[drawn]


def _largest(weights: mx.array, count: int) -> mx.array:
    """Indices of the `count` largest of [V], ascending; of equal ones the first."""
    order = mx.partition(weights, weights.size - count)
    least = order[weights.size - count]
    above, equal = weights > least, weights == least
    kept = above | (equal & (mx.cumsum(equal.astype(mx.int32)) <= count - above.sum()))
    places = mx.where(kept, mx.arange(weights.size), weights.size)
    return mx.sort(mx.partition(places, count - 1)[:count])


def _likeliest(weights: mx.array, total: mx.array | None, top_p: float) -> mx.array:
    """Which of [n] are among the fewest that reach `top_p` together, equal ones by index.

    total: the logarithm of the sum of all exponentials, where there are more than these
    """
    ascending = mx.sort(weights)
    shares = mx.softmax(ascending) if total is None else mx.exp(ascending - total)
    ahead = mx.cumsum(shares, reverse=True, inclusive=False)
    count = mx.maximum((ahead < top_p).sum(), 1)
    least = ascending[weights.size - count]
    above, equal = weights > least, weights == least
    return above | (equal & (mx.cumsum(equal.astype(mx.int32)) <= count - above.sum()))


def _reached(shares: mx.array, number: float) -> mx.array:
    """The first token whose sum with all before it exceeds `number` of the whole sum.

    Summed by blocks: one sum of 128,000 would be too inexact.
    """
    vocab = shares.size
    width = min(BLOCK, vocab)
    blocks = mx.pad(shares, (0, -vocab % width)).reshape(-1, width)
    sums = blocks.sum(axis=-1)
    reach = mx.cumsum(sums)
    target = number * reach[-1]
    # By rounding none may exceed it: then the last that has a share.
    block = mx.minimum((reach <= target).sum(), _last(sums))
    inside = mx.cumsum(blocks[block]) + (reach[block] - sums[block])
    return block * width + mx.minimum((inside <= target).sum(), _last(blocks[block]))


def _last(shares: mx.array) -> mx.array:
    """The last that is not zero."""
    return shares.size - 1 - mx.argmax(shares[::-1] > 0)


def _refusal(logits: mx.array, bias: mx.array | None, allowed: mx.array | None) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    if logits.dtype not in metal.DTYPES:
        return f"it takes logits in float32, float16 or bfloat16, got {logits.dtype}"
    if not MIN_VOCAB <= logits.shape[-1] <= MAX_VOCAB or logits.shape[0] < 1:
        return f"it takes rows of {MIN_VOCAB} to {MAX_VOCAB} logits, got {logits.shape}"
    given = [array.shape for array in (bias, allowed) if array is not None]
    if any(shape != logits.shape for shape in given):
        return f"it takes a bias and a mask for each logit, got {given} for {logits.shape}"
    return None


@functools.lru_cache(maxsize=64)
def _settings(rows: tuple[RowSampling, ...]) -> mx.array:
    """[B, SETTINGS] float32, for the kernel."""
    table = [
        [
            *(row.temperature, row.top_p, math.log(row.min_p) if row.min_p > 0 else -math.inf),
            *(row.repetition_penalty, row.presence_penalty, row.frequency_penalty, row.top_k, 0.0),
        ]
        for row in rows
    ]
    return mx.array(np.array(table, np.float32))  # pyright: ignore[reportArgumentType]


def _sample_metal(
    logits: mx.array,
    rows: Sequence[RowSampling],
    uniforms: Sequence[float],
    seen: Seen | None,
    bias: mx.array | None,
    allowed: mx.array | None,
) -> Drawn:
    """`sample` in two launches: a simdgroup for each BLOCK logits, a threadgroup for each row."""
    batch, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    header = metal.text("sample.h")
    # What is absent needs an array in its place, which the kernel does not read.
    counts, last = (logits, logits) if seen is None else seen
    extra = [logits if array is None else array for array in (bias, allowed)]
    settings = _settings(tuple(rows))
    given = [
        *(("T", logits.dtype), ("V", vocab), ("BLOCK", BLOCK), ("SETTINGS", SETTINGS)),
        *(("HAS_COUNTS", seen is not None), ("HAS_BIAS", bias is not None)),
        ("HAS_MASK", allowed is not None),
    ]
    scan = metal.kernel(
        "sample_scan",
        f"sample_scan_v{MAX_VOCAB}",
        inputs=("logits", "counts", "last", "bias", "allowed", "settings"),
        outputs=("found", "best_place", "next_counts"),
        header=header,
    )
    found, best_place, next_counts = scan(
        inputs=[logits, counts, last, *extra, settings],
        template=given,
        grid=(metal.SIMD_WIDTH, blocks, batch),
        threadgroup=(metal.SIMD_WIDTH, SIMDGROUPS, 1),
        output_shapes=[(4, batch, blocks), (batch, blocks), (1,) if seen is None else logits.shape],
        output_dtypes=[mx.float32, mx.int32, mx.uint16],
    )
    pick = metal.kernel(
        "sample_pick",
        f"sample_pick_v{MAX_VOCAB}",
        inputs=(
            *("logits", "counts", "bias", "allowed", "settings", "uniform"),
            *("found", "best_place"),
        ),
        outputs=("token", "logprob"),
        header=header,
    )
    tokens, logprobs = pick(
        inputs=[
            *(logits, logits if seen is None else next_counts, *extra, settings),
            *(mx.array(list(uniforms), mx.float32), found, best_place),
        ],
        template=[*given, ("ROOM", ROOM), ("THREADS", THREADS), ("TRIED", TRIED)],
        grid=(THREADS, batch, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch,), (batch,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    after = None if seen is None else Seen(next_counts, tokens.view(mx.int32))
    return Drawn(tokens, logprobs, after)
