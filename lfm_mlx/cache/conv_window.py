"""One short convolution's memory: the window of its last columns, in mlx-lm's cache protocol.

It is ours because mlx-lm's batched array cache subtracts its padding lazily at every token, which
makes the graph grow without end.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.cache.token_log import TokenLog
from lfm_mlx.errors import InputError

# The length of a row that has no padding after its tokens.
ENDLESS = 2**31 - 1
# Columns of the last step that are kept beside the window, so that undoing up to this many tokens
# of it costs nothing.
KEPT_COLUMNS = 32


class ConvWindow:
    """The last W - 1 columns of B * x that one short convolution has seen, per row of the batch.

    window: [B, W-1, D], None before the first token, and while it is `stale`
    stale: the cache was rewound to where the window is not at hand; `restore_windows` rebuilds it
    left_padding, lengths: per row, how many of the coming columns are padding before its tokens,
        and how many columns remain until its padding after them; None if no row is padded
    log: the tokens read; the first convolution of a cache has it for all of them
    """

    def __init__(self, left_padding: Sequence[int] | None = None, log: TokenLog | None = None):
        self.window: mx.array | None = None
        self.stale = False
        self.log = log
        # Columns that end `earlier_by` tokens before the window does, to undo the last step with.
        self.earlier: mx.array | None = None
        self.earlier_by = 0
        self.left_padding = list(left_padding) if left_padding and any(left_padding) else None
        self.lengths: list[int] | None = None
        self.rows = len(left_padding) if left_padding else 1

    def bounds(self) -> tuple[mx.array | None, mx.array | None]:
        """First token's and last token's next column among those to come, [B] each, or None."""
        start = None if self.left_padding is None else mx.array(self.left_padding)
        stop = None if self.lengths is None else mx.array(self.lengths)
        return start, stop

    def advance(self, window: mx.array, length: int, columns: mx.array | None = None) -> None:
        """Store the window that follows `length` more columns.

        columns: [B, n, D], the last of the new ones, for undoing a part of this step
        """
        self.earlier, self.earlier_by = self._history(columns, length)
        # Copied after a prompt: a slice would keep all the columns that it was cut from in memory.
        self.window = window if length == 1 else mx.contiguous(window)
        self.rows = window.shape[0]
        # Python's integers, not arrays: a lazy subtraction per token would never be evaluated.
        if self.left_padding is not None:
            self.left_padding = [max(0, padding - length) for padding in self.left_padding]
            if not any(self.left_padding):
                self.left_padding = None
        if self.lengths is not None:
            self.lengths = [remaining - length for remaining in self.lengths]

    def _history(self, columns: mx.array | None, length: int) -> tuple[mx.array | None, int]:
        """Columns before and of the step that is being stored, and how much earlier they end."""
        if self.left_padding is not None or self.lengths is not None:
            return None, 0
        if columns is None:
            return self.window, length
        if self.window is not None and columns.shape[1] == length:
            columns = mx.concatenate([self.window, columns], axis=1)
        return mx.contiguous(columns), 0

    def prepare(
        self,
        *,
        lengths: Iterable[int] | None = None,
        left_padding: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padded columns: `lengths` tokens a row, then padding (mlx-lm's protocol)."""
        if left_padding is not None:
            if self.window is not None:
                raise ValueError("left padding comes before the first token: the window is in use")
            before = self.left_padding or [0] * len(left_padding)
            self.left_padding = [a + b for a, b in zip(before, left_padding, strict=True)]
        if lengths is not None and (right_padding is None or max(right_padding) > 0):
            self.lengths = [int(length) for length in lengths]

    def finalize(self) -> None:
        """The announced padding is over; as with keys and values, it goes before the tokens."""
        if self.log is not None and self.lengths is not None:
            self.log = self.log.rolled([max(0, -remaining) for remaining in self.lengths])
        self.lengths = None
        self.left_padding = None

    @property
    def state(self) -> tuple[Any, ...]:
        tokens = None if self.log is None else self.log.tokens
        kept = self.earlier if self.earlier_by == 0 else None
        logged = self.log is not None and self.log.complete
        return self.window, kept, tokens, logged, self.stale, self.left_padding, self.lengths

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        self.window, self.earlier, tokens, logged, stale, self.left_padding, self.lengths = value
        self.earlier_by, self.stale = 0, bool(stale)
        self.log = None if not logged else TokenLog([] if tokens is None else [tokens])
        padded = self.left_padding or self.lengths or [0]
        self.rows = len(padded) if self.window is None else self.window.shape[0]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> "ConvWindow":
        cache = cls()
        cache.state = state
        return cache

    @property
    def nbytes(self) -> int:
        arrays = (self.window, self.earlier, None if self.log is None else self.log.tokens)
        return sum(array.nbytes for array in arrays if array is not None)

    def size(self) -> int:
        return 0

    def empty(self) -> bool:
        return self.window is None and not self.stale

    def is_trimmable(self) -> bool:
        return self.log is None or self.log.complete

    def trim(self, count: int) -> int:
        """Go back by `count` columns; returns by how many it was possible."""
        if count < 0:
            raise InputError(f"cannot go back by {count} tokens; expected 0 or more")
        if count == 0:
            return 0
        taken = count if self.log is None else self.log.trim(count)
        self.window = self._undone(count)
        self.stale = self.window is None
        self.earlier, self.earlier_by = None, 0
        return taken

    def _undone(self, count: int) -> mx.array | None:
        """The window as it was `count` tokens ago, None if its columns are not at hand."""
        back = count - self.earlier_by
        if self.window is None or self.earlier is None or back < 0:
            return None
        begin = self.earlier.shape[1] - back - self.window.shape[1]
        return self.earlier[:, begin : begin + self.window.shape[1]] if begin >= 0 else None

    @classmethod
    def merge(cls, caches: Sequence["ConvWindow"]) -> "ConvWindow":
        """One cache whose rows are those of `caches`, in their order."""
        merged = cls()
        merged.stale = any(cache.stale for cache in caches)
        known = next((cache.window for cache in caches if cache.window is not None), None)
        if known is not None and not merged.stale:
            merged.window = mx.concatenate([cache._window_like(known) for cache in caches])
        merged.rows = sum(cache.rows for cache in caches)
        if any(cache.left_padding for cache in caches):
            merged.left_padding = [n for c in caches for n in c.left_padding or [0] * c.rows]
        if any(cache.lengths for cache in caches):
            merged.lengths = [n for c in caches for n in c.lengths or [ENDLESS] * c.rows]
        logs = [(cache.log, cache.rows) for cache in caches if cache.log is not None]
        if len(logs) == len(caches):
            merged.log = TokenLog.merge(logs)
        return merged

    def extend(self, other: "ConvWindow") -> None:
        """Append the other cache's rows."""
        both = self.merge([self, other])
        self.__dict__.update(both.__dict__)

    def _window_like(self, known: mx.array) -> mx.array:
        if self.window is not None:
            return self.window
        return mx.zeros((self.rows, *known.shape[1:]), known.dtype)

    def filter(self, batch_indices: Any) -> None:
        """Keep the rows named (a list or an array of indices), in that order."""
        rows: list[int] = np.array(batch_indices).tolist()
        if self.window is not None:
            self.window = self.window[mx.array(rows, mx.int32)]
        if self.left_padding is not None:
            self.left_padding = [self.left_padding[row] for row in rows]
        if self.lengths is not None:
            self.lengths = [self.lengths[row] for row in rows]
        if self.log is not None:
            self.log = self.log.rows(rows)
        self.earlier, self.earlier_by = None, 0
        self.rows = len(rows)

    def extract(self, row: int) -> "ConvWindow":
        """One row as a cache of its own."""
        single = ConvWindow(log=None if self.log is None else self.log.rows([row]))
        single.stale = self.stale
        if self.window is not None:
            single.window = mx.contiguous(self.window[row : row + 1])
        return single
