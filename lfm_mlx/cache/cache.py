"""The conversation's memory: keys and values of the attention layers, windows of the conv layers.

A cache is a list with one entry a layer, in mlx-lm's protocol, so that its batching, server and
prompt-cache files work on it.

A cache can be rewound to any earlier token (`rewind`, or mlx-lm's `trim_prompt_cache`). Keys and
values are cut. A window that is not at hand any more is rebuilt before the next token is read: a
stack of n convolutions of width W forgets after (W - 1) n tokens, so that many, run from empty
windows against the stored keys and values, give the windows that there were.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.keys_values import GrowingKVCache
from lfm_mlx.cache.protocols import Cache, LayerCache
from lfm_mlx.cache.token_log import TokenLog
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError


def make_cache(config: Config, left_padding: Sequence[int] | None = None) -> Cache:
    """An empty cache, one entry a layer; `left_padding` [B] makes it one for a padded batch."""
    cache: Cache = []
    log: TokenLog | None = TokenLog()
    for layer in range(config.num_hidden_layers):
        if config.is_attention(layer):
            batched = left_padding is not None
            cache.append(BatchKVCache(list(left_padding)) if batched else GrowingKVCache())
        else:
            cache.append(ConvWindow(left_padding, log))
            log = None
    return cache


def token_log(cache: Sequence[LayerCache]) -> TokenLog | None:
    """The log that one of the cache's windows has."""
    logs = (entry.log for entry in cache if isinstance(entry, ConvWindow))
    return next((log for log in logs if log is not None), None)


def log_tokens(cache: Sequence[LayerCache], tokens: mx.array | None) -> None:
    """Write down the tokens [B, L] about to be read; None: something without ids."""
    log = token_log(cache)
    if log is None:
        return
    if tokens is None:
        log.complete = False
    elif log.complete:
        log.append(tokens)


def cached_tokens(cache: Sequence[LayerCache]) -> int:
    """Number of columns in the cache: tokens, and the padding of a batch."""
    for entry in cache:
        if not isinstance(entry, ConvWindow):
            return entry.offset if isinstance(entry.offset, int) else entry.size()
    log = token_log(cache)
    return 0 if log is None else log.length


def check_cache(config: Config, cache: Sequence[LayerCache]) -> None:
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


def stored_shape(entry: LayerCache) -> tuple[int, ...] | None:
    """[W-1, D] of a window, [Hkv, Dh] of keys; None while there are none."""
    if isinstance(entry, ConvWindow):
        return None if entry.window is None else entry.window.shape[1:]
    keys = getattr(entry, "keys", None)
    if keys is None:
        return None
    bits = getattr(entry, "bits", None)
    if bits is not None:
        _, heads, _, packed = keys[0].shape
        return heads, packed * 32 // bits
    return keys.shape[1], keys.shape[3]


def cache_state(cache: Sequence[LayerCache]) -> list[Any]:
    """Everything a cache holds, for `mx.eval`."""
    return [layer.state for layer in cache]


def stored_bytes(cache: Sequence[LayerCache]) -> int:
    """Bytes of keys and values, with the room they grow into."""
    return sum(entry.nbytes for entry in cache if not isinstance(entry, ConvWindow))


@contextlib.contextmanager
def whole_step(cache: Sequence[LayerCache]) -> Iterator[None]:
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


def tokens_read(cache: Sequence[LayerCache]) -> list[int]:
    """The tokens that the cache holds, none if it does not know them."""
    log = token_log(cache)
    if log is None or not log.complete or log.tokens is None:
        return []
    return np.array(log.tokens)[0].tolist()
