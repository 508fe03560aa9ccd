"""Rewinding a cache to any earlier token.

Keys and values are cut. A window that is not at hand any more is rebuilt before the next token is
read: a stack of n convolutions of width W forgets after (W - 1) n tokens, so that many, run from
empty windows against the stored keys and values, give the windows that there were.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, can_trim_prompt_cache, trim_prompt_cache

from lfm_mlx.cache.cache import cached_tokens, token_log
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.protocols import Cache, LayerCache
from lfm_mlx.errors import InputError


class StoredKeysValues:
    """Keys and values as an attention layer sees them when old tokens are run again: read only."""

    def __init__(self, kept: Any, count: int):
        self.kept = kept
        self.offset = kept.offset - count
        if hasattr(kept, "bits"):
            self.bits, self.group_size = kept.bits, kept.group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        return self.kept.keys_and_values()

    def make_mask(self, length: int, **_: Any) -> Any:
        if isinstance(self.kept, BatchKVCache):
            before = self.kept.size() - length
            return create_causal_mask(length, before, left_padding=self.kept.left_padding)
        return "causal" if length > 1 else None


def rewind(cache: Cache, length: int) -> None:
    """Take the cache back to its first `length` tokens, as if no more had been read.

    Costs nothing here, and at the next token at most the tokens that the convolutions remember.
    Raises InputError, and leaves the cache as it was, for a length it never had.
    """
    stored = cached_tokens(cache)
    if not 0 <= length <= stored:
        raise InputError(
            f"cannot rewind to {length} tokens: the cache holds {stored}; expected 0 to {stored}"
        )
    if length < stored and not can_trim_prompt_cache(cache):
        raise InputError(
            "cannot rewind: this cache does not know the ids of the tokens it has read"
        )
    trim_prompt_cache(cache, stored - length)


def restore_windows(
    cache: Sequence[LayerCache], memory: int, run: Callable[[mx.array, Cache], object]
) -> None:
    """Rebuild the windows that a rewind left stale.

    memory: how many tokens the stack of convolutions sees back
    run: the decoder on tokens [B, n] and a cache; its result is not used
    """
    windows = [entry for entry in cache if isinstance(entry, ConvWindow)]
    if not any(window.stale for window in windows):
        return
    log, stored = token_log(cache), cached_tokens(cache)
    count = min(memory, stored)
    assert log is not None, "a cache that was rewound has a log"
    views = replay_views(cache, count)
    if count:
        run(log.last(count), views)
    for entry, view in zip(cache, views, strict=True):
        if isinstance(entry, ConvWindow):
            entry.window, entry.stale = view.window, False


def replay_views(cache: Sequence[LayerCache], count: int) -> list[Any]:
    """A cache for running the last `count` columns again: empty windows, stored keys and values."""
    padding = None
    for entry in cache:
        if isinstance(entry, BatchKVCache):
            before = entry.size() - count
            rows: list[int] = np.array(entry.left_padding).tolist()
            padding = [max(0, row - before) for row in rows]
    return [
        ConvWindow(padding) if isinstance(entry, ConvWindow) else StoredKeysValues(entry, count)
        for entry in cache
    ]


def common_length(cache: Cache, prompt: Sequence[int]) -> int:
    """Length of the longest common prefix of `prompt` and the cached tokens.

    Never all of them: one token is left to read. The cache is not changed: `rewind` it to there.
    """
    log = token_log(cache)
    if log is None or log.tokens is None or not log.complete:
        return 0
    stored = np.array(log.tokens)[0][: max(0, len(prompt) - 1)]
    differ = np.nonzero(stored != np.array(prompt[: len(stored)]))[0]
    return int(differ[0]) if differ.size else len(stored)


def rewind_to(cache: Cache, prompt: Sequence[int]) -> list[int]:
    """Take the cache back to what `prompt` begins with; returns what of it is left to read."""
    known = common_length(cache, prompt)
    rewind(cache, known)
    return list(prompt[known:])
