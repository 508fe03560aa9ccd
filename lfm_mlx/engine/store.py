"""Store of prefixes: caches by the tokens they hold, for prompts that begin the same.

A prompt goes on from the cache that it shares the most tokens with: one that is stored, or that of
a row at work. A stored one is moved if the prompt goes on from its end. Of any other the common
part is copied, so that a prompt which goes on from there otherwise still finds it. The least
recently used ones give way.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.cache.cache import cache_state, make_cache, token_log
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.config import Config
from lfm_mlx.engine.job import Prefix

Tokens = np.ndarray  # int32 [T]


@dataclass(eq=False)
class Entry:
    """A cache at rest, and the tokens that it holds. used: grows with every use"""

    tokens: Tokens
    cache: list[Any]
    owner: str = ""
    used: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(entry.nbytes for entry in self.cache)


@dataclass(frozen=True)
class Source:
    """A cache that a prompt could continue.

    entry: if it is stored, else it is at work: only copied
    """

    tokens: Tokens
    cache: list[Any]
    owner: str
    entry: Entry | None = None


class Store:
    """Caches at rest, within `capacity` bytes where that is kept to (`evict`).

    evicted: is given every entry that gives way, before it is forgotten
    """

    def __init__(self, config: Config, evicted: Callable[[Entry], None] = lambda _: None):
        self.config, self.evicted = config, evicted
        self.entries: list[Entry] = []
        self._uses = count(1)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(
        self, prompt: Sequence[int], owner: str, at_work: Iterable[Source] = ()
    ) -> tuple[Source | None, Prefix]:
        """Find the source that shares the longest prefix with the prompt.

        At least the prompt's last token is left to read.
        """
        wanted = np.asarray(prompt, np.int32)
        stored = (Source(e.tokens, e.cache, e.owner, e) for e in self.entries)
        best, prefix = None, Prefix()
        for source in (*stored, *at_work):
            if source.owner != owner or not len(source.tokens):
                continue
            found = common(source.tokens, wanted)
            better = found.tokens > prefix.tokens
            # Of equal ones the stored one that ends there: it need not be copied.
            if better or (best is not None and found.tokens == prefix.tokens
                          and moves(source, found) and not moves(best, prefix)):  # fmt: skip
                best, prefix = (source if found.tokens else None), found
            elif prefix.ended == "none":
                prefix = found  # why nothing is reused
        if (
            best is not None
            and not moves(best, prefix)
            and prefix.tokens <= self.config.conv_memory
        ):
            return None, Prefix(0, "short")
        return best, prefix

    def use(self, source: Source, prefix: Prefix) -> list[Any]:
        """A cache of the first `prefix.tokens` tokens of `source`, for its user alone."""
        entry = source.entry
        if entry is not None:
            entry.used = next(self._uses)
            if moves(source, prefix):
                self.entries.remove(entry)
                return entry.cache
        return copied(self.config, source, prefix.tokens)

    def take(self, source: Source, prefix: Prefix) -> list[Any]:
        """`use` without a copy: a stored entry goes, whatever else it held."""
        assert source.entry is not None, "what is at work cannot be taken away"
        self.entries.remove(source.entry)
        rewind(source.cache, prefix.tokens)
        return source.cache

    def put(self, tokens: Sequence[int], cache: list[Any], owner: str = "") -> None:
        """Keep a cache that is evaluated; it and those it goes on from are one entry."""
        own = np.array(tokens, np.int32)
        if not own.size:
            return
        for entry in self.entries:
            if entry.owner == owner and starts_with(entry.tokens, own):
                entry.used = next(self._uses)
                return
        self.entries = [
            entry for entry in self.entries
            if entry.owner != owner or not starts_with(own, entry.tokens)
        ]  # fmt: skip
        self.entries.append(Entry(own, cache, owner, next(self._uses)))

    def evict(self, most_bytes: int, spared: Entry | None = None) -> None:
        """Forget the least recently used ones until the others take no more than that."""
        for entry in sorted(self.entries, key=lambda entry: entry.used):
            if self.nbytes <= most_bytes:
                return
            if entry is not spared:
                self.entries.remove(entry)
                self.evicted(entry)


def common(stored: Tokens, wanted: Tokens) -> Prefix:
    """Common prefix of a prompt and stored tokens."""
    most = min(len(stored), len(wanted) - 1)
    differ = np.nonzero(stored[:most] != wanted[:most])[0]
    if differ.size:
        place = int(differ[0])
        return Prefix(place, "differs", int(stored[place]), int(wanted[place]))
    return Prefix(most, "whole" if most == len(wanted) - 1 else "end")


def moves(source: Source, prefix: Prefix) -> bool:
    """Whether the prompt goes on from the end of a stored entry."""
    return source.entry is not None and prefix.tokens == len(source.tokens) > 0


def starts_with(tokens: Tokens, beginning: Tokens) -> bool:
    return len(tokens) >= len(beginning) and bool((tokens[: len(beginning)] == beginning).all())


def copied(config: Config, source: Source, length: int) -> list[Any]:
    """A cache of the first `length` tokens of another, which stays as it is.

    Its windows are stale: the next pass rebuilds them.
    """
    new = make_cache(config)
    for layer, (own, other) in enumerate(zip(new, source.cache, strict=True)):
        if isinstance(own, ConvWindow):
            own.stale = length > 0
        elif length:
            new[layer] = other.beginning(length)
    log = token_log(new)
    if log is not None and length:
        log.append(mx.array(source.tokens[None, :length]))
    mx.eval(cache_state(new))
    return new
