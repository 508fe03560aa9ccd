"""Parts of several prompts read in one pass, each into its own cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.cache.cache import cache_state
from lfm_mlx.cache.joined import JoinedCache
from lfm_mlx.cache.keys_values import KVQuantization, quantize_cache
from lfm_mlx.model import Model

# Of a pass over several prompts at most this share may be padding.
MOST_PADDING = 0.25


@dataclass(frozen=True)
class Part:
    """Tokens, at least one, to be read into a cache."""

    cache: list[Any]
    tokens: Sequence[int]


def read_parts(
    model: Model, parts: Sequence[Part], kv_quantization: KVQuantization | None = None
) -> None:
    """Read each part into its cache in one pass; interrupted, no cache has read any of it.

    Shorter ones are padded after their tokens, where no token sees the padding.
    """
    lengths = [len(part.tokens) for part in parts]
    tokens = np.zeros((len(parts), max(lengths)), np.int32)
    for row, part in zip(tokens, parts, strict=True):
        row[: len(part.tokens)] = part.tokens
    for part in parts:
        quantize_cache(part.cache, kv_quantization)
        model.restore(part.cache)
    joined = JoinedCache([part.cache for part in parts])
    with joined.whole_step(), joined.padded(lengths, max(lengths)):
        model(mx.array(tokens), joined.layers)  # pyright: ignore[reportArgumentType] - NumPy is taken
    joined.change(range(len(parts)))
    mx.eval([cache_state(part.cache) for part in parts])
    mx.clear_cache()


def read_together(lengths: Sequence[int], most: int) -> int:
    """Number of these prompts' parts to read in one pass, from the first one on.

    lengths: tokens of each, the one whose turn it is first
    most: tokens of a pass, padding with them
    """
    count, longest, total = 1, lengths[0], lengths[0]
    for length in lengths[1:]:
        longest, total = max(longest, length), total + length
        area = longest * (count + 1)
        if area > most or area - total > MOST_PADDING * area:
            break
        count += 1
    return count
