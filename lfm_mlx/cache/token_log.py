"""The ids of the tokens a cache has read: what a rewind replays and a prompt cache is known by."""

from collections.abc import Iterable, Sequence

import mlx.core as mx


class TokenLog:
    """The tokens a cache has read, [B, T], in the columns of its keys and values.

    Appending keeps what it is given; it computes nothing and waits for nothing. `complete` is False
    once something without token ids (embeddings) was read.
    """

    JOINED_FROM = 64  # parts

    def __init__(self, parts: Iterable[mx.array] = ()):
        self.parts = list(parts)
        self.complete = True

    @property
    def length(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    @property
    def tokens(self) -> mx.array | None:
        if len(self.parts) > 1:
            self.parts = [mx.concatenate([part.astype(mx.int32) for part in self.parts], axis=1)]
        return self.parts[0] if self.parts else None

    def append(self, tokens: mx.array) -> None:
        self.parts.append(tokens)
        if len(self.parts) >= self.JOINED_FROM and self.tokens is not None:
            mx.async_eval(self.tokens)

    def last(self, count: int) -> mx.array:
        """The last `count` columns, [B, count]."""
        tokens = self.tokens
        assert tokens is not None, "the log is empty"
        return tokens[:, tokens.shape[1] - count :]

    def trim(self, count: int) -> int:
        """Forget the last `count` columns, or all there are; returns how many."""
        count = left = min(count, self.length)
        # Part by part: joining them first would copy them all at every rewind.
        while left:
            part = self.parts.pop()
            kept = max(0, part.shape[1] - left)
            left -= part.shape[1] - kept
            if kept:
                self.parts.append(part[:, :kept])
        return count

    def rows(self, rows: Sequence[int]) -> "TokenLog":
        """The log of these rows."""
        log = TokenLog([part[mx.array(list(rows), mx.int32)] for part in self.parts])
        log.complete = self.complete
        return log

    def rolled(self, padding: Sequence[int]) -> "TokenLog":
        """Each row moved right by its padding, which comes round to the left."""
        tokens = self.tokens
        if tokens is None:
            return self
        columns = mx.arange(tokens.shape[1]) - mx.array(list(padding))[:, None]
        log = TokenLog([mx.take_along_axis(tokens, columns % tokens.shape[1], axis=1)])
        log.complete = self.complete
        return log

    @staticmethod
    def merge(logs: Sequence[tuple["TokenLog", int]]) -> "TokenLog":
        """The logs (each with its number of rows) below one another, aligned at their ends."""
        longest = max(log.length for log, _ in logs)
        padded = []
        for log, rows in logs:
            tokens = log.tokens if log.parts else mx.zeros((rows, 0), mx.int32)
            assert tokens is not None, "a log with parts has tokens"
            padded.append(mx.pad(tokens, [(0, 0), (longest - tokens.shape[1], 0)]))
        merged = TokenLog([mx.concatenate(padded)] if longest else [])
        merged.complete = all(log.complete for log, _ in logs)
        return merged
