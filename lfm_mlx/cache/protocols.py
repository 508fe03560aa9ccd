"""Protocols for a layer's memory, which mlx-lm's cache classes and ours both satisfy.

A cache is a list with one entry a layer: a ConvWindow for a convolution, and for an attention
whatever stores its keys and values.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import mlx.core as mx

from lfm_mlx.cache.conv_window import ConvWindow

# Which stored keys each query sees: all, those up to its own place, or a mask [B or 1, 1, L, S].
Mask: TypeAlias = mx.array | Literal["causal"] | None
# Keys or values [B, Hkv, S, Dh]; quantized, their packed bits, scales and biases.
Stored: TypeAlias = mx.array | Sequence[mx.array]


class KeysValues(Protocol):
    """An attention layer's memory.

    keys: as `Stored`, with room to grow into; None while there are none
    offset: where the next token stands, an int, or [B] for a batch
    state: everything that is held, for `mx.eval`
    """

    offset: Any
    keys: Any
    state: Any

    @property
    def nbytes(self) -> Any: ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Store [B, Hkv, L, Dh] more; returns all that is stored, as `Stored`."""
        ...

    def keys_and_values(self) -> tuple[Any, Any]:
        """All that is stored, as `Stored`."""
        ...

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The Mask for so many new queries."""
        ...

    def size(self) -> int:
        """Number of columns stored."""
        ...

    def is_trimmable(self) -> bool: ...

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens; returns how many that were."""
        ...


LayerCache: TypeAlias = ConvWindow | KeysValues
Cache: TypeAlias = list[LayerCache]
