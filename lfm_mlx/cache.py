"""The conversation's memory: keys and values of the attention layers, windows of the conv layers.

A cache is a list with one entry a layer, in mlx-lm's protocol, so that its batching, server and
prompt-cache files work on it.

A cache can be rewound to any earlier token (`rewind`, or mlx-lm's `trim_prompt_cache`). Keys and
values are cut. A window that is not at hand any more is rebuilt before the next token is read: a
stack of n convolutions of width W forgets after (W - 1) n tokens, so that many, run from empty
windows against the stored keys and values, give the windows that there were.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, can_trim_prompt_cache, trim_prompt_cache

from lfm_mlx.command import InputError
from lfm_mlx.config import Config
from lfm_mlx.conv_window import KEPT_COLUMNS as KEPT_COLUMNS
from lfm_mlx.conv_window import ConvWindow
from lfm_mlx.keys_values import GrowingKVCache
from lfm_mlx.token_log import TokenLog


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


def make_cache(config: Config, left_padding: Sequence[int] | None = None) -> list[Any]:
    """An empty cache, one entry a layer; `left_padding` [B] makes it one for a padded batch."""
    cache: list[Any] = []
    log: TokenLog | None = TokenLog()
    for layer in range(config.num_hidden_layers):
        if config.is_attention(layer):
            batched = left_padding is not None
            cache.append(BatchKVCache(list(left_padding)) if batched else GrowingKVCache())
        else:
            cache.append(ConvWindow(left_padding, log))
            log = None
    return cache


def token_log(cache: Sequence[Any]) -> TokenLog | None:
    """The log that one of the cache's windows has."""
    logs = (entry.log for entry in cache if isinstance(entry, ConvWindow))
    return next((log for log in logs if log is not None), None)


def log_tokens(cache: Sequence[Any], tokens: mx.array | None) -> None:
    """Write down the tokens [B, L] about to be read; None: something without ids."""
    log = token_log(cache)
    if log is None:
        return
    if tokens is None:
        log.complete = False
    elif log.complete:
        log.append(tokens)


def stored_length(cache: Sequence[Any]) -> int:
    """How many columns (tokens, and the padding of a batch) the cache holds."""
    for entry in cache:
        if not isinstance(entry, ConvWindow):
            return entry.offset if isinstance(entry.offset, int) else entry.size()
    log = token_log(cache)
    return 0 if log is None else log.length


def check_cache(config: Config, cache: Sequence[Any]) -> None:
    """Raise InputError unless the cache's layers are the model's, in number, kind and width."""
    if len(cache) != config.num_hidden_layers:
        raise InputError(
            f"the cache has {len(cache)} layers, and the model {config.num_hidden_layers}: "
            "it belongs to another model"
        )
    heads = (config.num_key_value_heads, config.head_dim)
    window = (config.conv_L_cache - 1, config.hidden_size)
    for layer, entry in enumerate(cache):
        attention = config.is_attention(layer)
        expected = heads if attention else window
        of_kind = isinstance(entry, ConvWindow) != attention
        if not of_kind or stored_shape(entry) not in (None, expected):
            raise InputError(
                f"layer {layer} of the cache is not what this model stores: it belongs to another "
                "model, or was not made by make_cache"
            )


def stored_shape(entry: Any) -> tuple[int, ...] | None:
    """[W-1, D] of a window, [Hkv, Dh] of keys; None while there are none."""
    if isinstance(entry, ConvWindow):
        return None if entry.window is None else entry.window.shape[1:]
    keys = getattr(entry, "keys", None)
    if keys is None:
        return None
    if hasattr(entry, "bits"):
        _, heads, _, packed = keys[0].shape
        return heads, packed * 32 // entry.bits
    return keys.shape[1], keys.shape[3]


def rewind(cache: list[Any], length: int) -> None:
    """Take the cache back to its first `length` tokens, as if no more had been read.

    Costs nothing here, and at the next token at most the tokens that the convolutions remember.
    Raises InputError, and leaves the cache as it was, for a length it never had.
    """
    stored = stored_length(cache)
    if not 0 <= length <= stored:
        raise InputError(
            f"cannot rewind to {length} tokens; the cache holds {stored}: give 0 to that"
        )
    if length < stored and not can_trim_prompt_cache(cache):
        raise InputError(
            "cannot rewind: this cache does not know the ids of the tokens it has read"
        )
    trim_prompt_cache(cache, stored - length)


def restore_windows(
    cache: Sequence[Any], memory: int, run: Callable[[mx.array, list[Any]], Any]
) -> None:
    """Rebuild the windows that a rewind left stale.

    memory: how many tokens the stack of convolutions sees back
    run: the decoder on tokens [B, n] and a cache; what it returns is not looked at
    """
    windows = [entry for entry in cache if isinstance(entry, ConvWindow)]
    if not any(window.stale for window in windows):
        return
    log, stored = token_log(cache), stored_length(cache)
    count = min(memory, stored)
    assert log is not None, "a cache that was rewound has a log"
    views = replay_views(cache, count)
    if count:
        run(log.last(count), views)
    for entry, view in zip(cache, views, strict=True):
        if isinstance(entry, ConvWindow):
            entry.window, entry.stale = view.window, False


def replay_views(cache: Sequence[Any], count: int) -> list[Any]:
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


def arrays(cache: Sequence[Any]) -> list[Any]:
    """Everything a cache holds, for `mx.eval`."""
    return [layer.state for layer in cache]


def stored_bytes(cache: Sequence[Any]) -> int:
    """What keys and values take, with the room they grow into."""
    return sum(entry.nbytes for entry in cache if not isinstance(entry, ConvWindow))


@contextlib.contextmanager
def whole_step(cache: Sequence[Any]) -> Iterator[None]:
    """Leave the cache as it was before the block when an error or Ctrl-C ends the block halfway.

    Some layers would else have read tokens that others have not.
    """
    before = [entry.__dict__.copy() for entry in cache if isinstance(entry, ConvWindow)]
    log = token_log(cache)
    parts = None if log is None else (log.parts[:], log.complete)
    offsets = [entry.offset for entry in cache if not isinstance(entry, ConvWindow)]
    try:
        yield
    except BaseException:
        windows = (entry for entry in cache if isinstance(entry, ConvWindow))
        for window, state in zip(windows, before, strict=True):
            window.__dict__.update(state)
        if log is not None and parts is not None:
            log.parts, log.complete = parts
        stored = (entry for entry in cache if not isinstance(entry, ConvWindow))
        for entry, offset in zip(stored, offsets, strict=True):
            entry.offset = offset
        raise
