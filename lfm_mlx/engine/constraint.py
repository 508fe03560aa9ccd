"""Constraints on an answer: a Constraint allows tokens, and is told which one came.

Knows token ids only. A token that must come is the only one allowed, so that it is drawn, counted
and read by the model like any other.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np


class Constraint(Protocol):
    """Follows one answer. Before each token it is asked once, afterwards told once."""

    def allowed(self) -> mx.array | None:
        """Which tokens may come next, [V] bool with at least one of them; None for all."""
        ...

    def advance(self, token: int) -> None:
        """Take in the token that came, one of those allowed."""
        ...


# Masks are filled by NumPy: a lazy array could be computed on the thread that made it only, and
# constraints are made on other threads than the model runs on.
def only(tokens: Iterable[int], vocab_size: int) -> mx.array:
    """The mask [V] that allows these tokens and no others."""
    mask = np.zeros(vocab_size, np.bool_)
    mask[list(tokens)] = True
    return mx.array(mask)  # pyright: ignore[reportArgumentType] - NumPy arrays are taken


def all_but(tokens: Iterable[int], vocab_size: int) -> mx.array:
    """The mask [V] that allows every token but these."""
    mask = np.ones(vocab_size, np.bool_)
    mask[list(tokens)] = False
    return mx.array(mask)  # pyright: ignore[reportArgumentType] - NumPy arrays are taken


class Without:
    """An answer in which some tokens never come."""

    def __init__(self, tokens: Iterable[int], vocab_size: int):
        self._mask = all_but(tokens, vocab_size)

    def allowed(self) -> mx.array | None:
        return self._mask

    def advance(self, token: int) -> None:
        """Do nothing: the mask never changes."""


class OneOf:
    """An answer that is one of several token sequences, and then ends."""

    def __init__(
        self, choices: Iterable[Sequence[int]], stop_ids: Collection[int], vocab_size: int
    ):
        self._left = [tuple(choice) for choice in choices]  # what is to come of each
        self._stop_ids, self._vocab_size = frozenset(stop_ids), vocab_size

    def allowed(self) -> mx.array | None:
        tokens = {choice[0] for choice in self._left if choice}
        if () in self._left:
            tokens |= self._stop_ids
        return only(tokens, self._vocab_size) if tokens else None

    def advance(self, token: int) -> None:
        self._left = [choice[1:] for choice in self._left if choice and choice[0] == token]
