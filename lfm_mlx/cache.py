"""The conversation's memory: keys and values of the attention layers, windows of the conv layers.

A cache is a list with one entry a layer, in mlx-lm's protocol, so that its batching, server and
prompt-cache files work on it. Keys and values are mlx-lm's own classes; a convolution's window is
ours, because mlx-lm's batched array cache subtracts its padding lazily at every token, which makes
the graph grow without end.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache

from lfm_mlx.config import Config


class ConvWindow:
    """The last W - 1 columns of B * x that one short convolution has seen, per row of the batch.

    window: [B, W-1, D], None before the first token
    left_padding, lengths: per row, how many of the coming columns are padding before its tokens,
        and how many columns remain until its padding after them; None where no row is padded
    """

    def __init__(self, left_padding: Sequence[int] | None = None):
        self.window: mx.array | None = None
        self.left_padding = list(left_padding) if left_padding and any(left_padding) else None
        self.lengths: list[int] | None = None
        self.rows = len(left_padding) if left_padding else 1

    def bounds(self) -> tuple[mx.array | None, mx.array | None]:
        """First token's and last token's next column among those to come, [B] each, or None."""
        start = None if self.left_padding is None else mx.array(self.left_padding)
        stop = None if self.lengths is None else mx.array(self.lengths)
        return start, stop

    def advance(self, window: mx.array, length: int) -> None:
        """Store the window that follows `length` more columns."""
        self.window = window
        self.rows = window.shape[0]
        # Python's integers, not arrays: a lazy subtraction per token would never be evaluated.
        if self.left_padding is not None:
            self.left_padding = [max(0, padding - length) for padding in self.left_padding]
            if not any(self.left_padding):
                self.left_padding = None
        if self.lengths is not None:
            self.lengths = [remaining - length for remaining in self.lengths]

    def prepare(
        self,
        *,
        lengths: Iterable[int] | None = None,
        left_padding: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padded columns: `lengths` tokens a row, then padding (mlx-lm's protocol)."""
        if left_padding is not None:
            before = self.left_padding or [0] * len(left_padding)
            self.left_padding = [a + b for a, b in zip(before, left_padding, strict=True)]
        if lengths is not None and (right_padding is None or max(right_padding) > 0):
            self.lengths = [int(length) for length in lengths]

    def finalize(self) -> None:
        """The announced padding is over."""
        self.lengths = None
        self.left_padding = None

    @property
    def state(self) -> tuple[Any, ...]:
        return self.window, self.left_padding, self.lengths

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        self.window, self.left_padding, self.lengths = value
        self.rows = 1 if self.window is None else self.window.shape[0]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "ConvWindow":
        cache = cls()
        cache.state = state
        return cache

    @property
    def nbytes(self) -> int:
        return 0 if self.window is None else self.window.nbytes

    def size(self) -> int:
        return 0

    def empty(self) -> bool:
        return self.window is None

    def is_trimmable(self) -> bool:
        return False

    @classmethod
    def merge(cls, caches: Sequence["ConvWindow"]) -> "ConvWindow":
        """One cache whose rows are those of `caches`, in their order."""
        merged = cls()
        merged.window, merged.rows = caches[0].window, caches[0].rows
        for cache in caches[1:]:
            merged.extend(cache)
        return merged

    def extend(self, other: "ConvWindow") -> None:
        """Append the other cache's rows."""
        known = self.window if self.window is not None else other.window
        if known is not None:
            parts = [cache._window_like(known) for cache in (self, other)]
            self.window = mx.concatenate(parts)
        if self.left_padding is not None or other.left_padding is not None:
            zeros = [0] * self.rows, [0] * other.rows
            self.left_padding = (self.left_padding or zeros[0]) + (other.left_padding or zeros[1])
        self.rows += other.rows

    def _window_like(self, known: mx.array) -> mx.array:
        if self.window is not None:
            return self.window
        return mx.zeros((self.rows, *known.shape[1:]), known.dtype)

    def filter(self, batch_indices: Any) -> None:
        """Keep the rows named (a list or an array of indices), in that order."""
        rows: list[int] = np.array(batch_indices).tolist()
        if self.window is not None:
            self.window = self.window[mx.array(rows)]
        if self.left_padding is not None:
            self.left_padding = [self.left_padding[row] for row in rows]
        if self.lengths is not None:
            self.lengths = [self.lengths[row] for row in rows]
        self.rows = len(rows)

    def extract(self, row: int) -> "ConvWindow":
        """One row as a cache of its own."""
        single = ConvWindow()
        single.window = None if self.window is None else mx.contiguous(self.window[row : row + 1])
        return single


def make_cache(config: Config, left_padding: Sequence[int] | None = None) -> list[Any]:
    """An empty cache, one entry a layer; `left_padding` [B] makes it one for a padded batch."""
    if left_padding is None:
        return [
            KVCache() if config.is_attention(layer) else ConvWindow()
            for layer in range(config.num_hidden_layers)
        ]
    return [
        BatchKVCache(list(left_padding)) if config.is_attention(layer) else ConvWindow(left_padding)
        for layer in range(config.num_hidden_layers)
    ]


def attention_mask(cache: Any | None, length: int) -> Any:
    """What `attend` needs to keep `length` new queries causal and off the padding."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None


def attend(
    queries: mx.array, keys: Any, values: Any, cache: Any | None, mask: Any, scale: float
) -> mx.array:
    """Softmax attention over the keys and values `cache` holds, quantized or not.

    Shapes:
        queries: [B, H, L, Dh] · keys, values: [B, Hkv, S, Dh] or their quantized triples
        returns [B, H, L, Dh]
    """
    return scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=mask)


def arrays(cache: Sequence[Any]) -> list[Any]:
    """Everything a cache holds, for `mx.eval`."""
    return [layer.state for layer in cache]
