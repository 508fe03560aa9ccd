"""Caches of several conversations, seen as one while the model reads a pass over all of them.

Keys and values stay where they are, each row's own and as long as it needs them: attention goes
through the rows one by one. The windows of a convolution lie under one another while rows are
together. So joining and parting cost the same however long a conversation is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from lfm_mlx.cache.cache import token_log, whole_step
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.token_log import TokenLog

Cache = list[Any]


class RowsKeysValues:
    """One attention layer's entries in several caches, in mlx-lm's protocol.

    They are looked up at each call: an entry may be replaced by a quantized one.
    """

    def __init__(self, caches: Sequence[Cache], layer: int):
        self.caches, self.layer = caches, layer

    @property
    def entries(self) -> list[Any]:
        return [cache[self.layer] for cache in self.caches]

    @property
    def offset(self) -> mx.array:
        """Position of each row's next token, [B]."""
        return mx.array([entry.offset for entry in self.entries])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[list[Any], list[Any]]:
        """Store keys and values [B, Hkv, L, Dh]; returns all that each row has, row by row."""
        stored = [
            entry.update_and_fetch(keys[row : row + 1], values[row : row + 1])
            for row, entry in enumerate(self.entries)
        ]
        return [pair[0] for pair in stored], [pair[1] for pair in stored]

    def make_mask(self, length: int, **_: Any) -> Any:
        return "causal" if length > 1 else None


class JoinedCache:
    """Rows that are read together.

    caches: each row's own. While there are several, windows and logs of tokens in them are behind;
        keys and values are not
    layers: what the model is given; of a single row its own cache, so that it is read as it is
        alone
    """

    def __init__(self, caches: Sequence[Cache] = ()):
        self.caches: list[Cache] = []
        self.layers: Cache = []
        self.change([], caches)

    def change(self, leaving: Sequence[int], joining: Sequence[Cache] = ()) -> None:
        """Remove rows by their number, bring their caches up to date, and add others at the end.

        The windows of those that join must not be stale; see `Model.restore`.
        """
        assert not any(stale(cache) for cache in joining), "windows are restored before joining"
        self._write_logs()
        kept = [row for row in range(len(self.caches)) if row not in leaving]
        caches = [*(self.caches[row] for row in kept), *joining]
        parted = [self.caches[row] for row in leaving]
        if len(self.caches) > 1:
            parted += [self.caches[row] for row in kept] if len(caches) == 1 else []
            for row, cache in enumerate(self.caches):
                if any(cache is other for other in parted):
                    self._give_back(row, cache)
        if len(caches) > 1:
            parts = [[self._window(layer, kept), *(cache[layer] for cache in joining)]
                     if isinstance(entry, ConvWindow) else []
                     for layer, entry in enumerate(caches[0])]  # fmt: skip
            self.layers = [
                under_one_another(part) if part else RowsKeysValues(caches, layer)
                for layer, part in enumerate(parts)
            ]
            window = next((e for e in self.layers if isinstance(e, ConvWindow)), None)
            if window is not None:
                window.log = TokenLog()
        else:
            self.layers = caches[0] if caches else []
        self.caches = caches
        # Not evaluated, a row's window would keep those of all rows in memory.
        mx.eval([window.window for cache in parted for window in windows(cache)])

    def _window(self, layer: int, rows: Sequence[int]) -> ConvWindow | None:
        """The window [B, W-1, D] of these rows, None without rows."""
        if not rows:
            return None
        kept = ConvWindow()
        kept.__dict__.update(self.layers[layer].__dict__)
        kept.log = None
        if len(rows) < len(self.caches):
            kept.filter(rows)
        return kept

    def _give_back(self, row: int, cache: Cache) -> None:
        for own, joined in zip(cache, self.layers, strict=True):
            if isinstance(own, ConvWindow) and joined.window is not None:
                own.window = mx.contiguous(joined.window[row : row + 1])
                own.earlier, own.earlier_by, own.rows = None, 0, 1

    def _write_logs(self, lengths: Sequence[int] | None = None) -> None:
        """Tell each row's log what was read; `lengths`: how much of it is the row's, else all."""
        joined = token_log(self.layers)
        if len(self.caches) < 2 or joined is None or joined.tokens is None:
            return
        for row, cache in enumerate(self.caches):
            log = token_log(cache)
            assert log is not None, "a cache with windows has a log"
            end = joined.length if lengths is None else lengths[row]
            log.append(joined.tokens[row : row + 1, :end])
        joined.parts = []

    @contextlib.contextmanager
    def padded(self, lengths: Sequence[int], longest: int) -> Iterator[None]:
        """Inside, one pass reads `longest` columns, of which each row has its own number first."""
        if min(lengths) < longest:
            for window in windows(self.layers):
                window.lengths = list(lengths)
        yield
        if len(self.caches) < 2:
            return
        for window in windows(self.layers):
            window.lengths = None
        for cache, length in zip(self.caches, lengths, strict=True):
            for entry in cache:
                if not isinstance(entry, ConvWindow):
                    entry.trim(longest - length)
        self._write_logs(lengths)

    @contextlib.contextmanager
    def whole_step(self) -> Iterator[None]:
        """Leave every row as it was before the block if an error or Ctrl-C ends it halfway."""
        with contextlib.ExitStack() as stack:
            for cache in self.caches:
                stack.enter_context(whole_step(cache))
            if len(self.caches) > 1:
                stack.enter_context(whole_step(windows(self.layers)))
            yield


def windows(cache: Sequence[Any]) -> list[ConvWindow]:
    return [entry for entry in cache if isinstance(entry, ConvWindow)]


def stale(cache: Sequence[Any]) -> bool:
    """Whether the next pass would first rebuild windows that a rewind left behind."""
    return any(window.stale for window in windows(cache))


def under_one_another(parts: Sequence[ConvWindow | None]) -> ConvWindow:
    """One window whose rows are those of `parts`; of a row that has read nothing they are zeros."""
    found = [part for part in parts if part is not None]
    joined = ConvWindow()
    joined.rows = sum(part.rows for part in found)
    known = next((part.window for part in found if part.window is not None), None)
    if known is not None:
        joined.window = mx.concatenate([
            mx.zeros((part.rows, *known.shape[1:]), known.dtype)
            if part.window is None else part.window
            for part in found
        ])  # fmt: skip
    return joined
