"""Keys and values of the attention layers: how they grow, how they are packed, how they are read.

mlx-lm's cache classes store them. Ours grow by a sixteenth of what there is, so that a long prompt
is not copied again at every chunk, and refuse to be trimmed by less than nothing.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from lfm_mlx.cache.protocols import Cache
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError

# What quantized keys and values can be: 32 must be a multiple of the bits in mlx-lm's class.
BITS = (8, 4)
GROUP_SIZES = (64, 32)

Entry = TypeVar("Entry", bound="ChunkedGrowth")


class ChunkedGrowth:
    """Mixin in front of mlx-lm's cache classes.

    Buffers grow by a sixteenth (`step` tokens), a negative trim is refused, and a prefix can be
    copied.
    """

    offset: int
    keys: Any
    values: Any

    @property
    def step(self) -> int:
        return max(256, self.offset // 16 // 256 * 256)

    def trim(self, n: int) -> int:
        if n < 0:
            raise InputError(f"cannot go back by {n} tokens; expected 0 or more")
        n = min(n, self.offset)
        self.offset -= n
        return n

    def beginning(self: Entry, length: int) -> Entry:
        """A copy of the first `length` tokens, with room to grow into; this entry stays."""
        new = copy.copy(self)
        new.offset = length
        room = new.step - length % new.step
        new.keys, new.values = tree_map(
            lambda part: mx.concatenate(
                [
                    part[..., :length, :],
                    mx.zeros((*part.shape[:-2], room, part.shape[-1]), part.dtype),
                ],
                axis=-2,
            ),
            (self.keys, self.values),
        )
        return new


class GrowingQuantizedKVCache(ChunkedGrowth, QuantizedKVCache):  # pyright: ignore[reportIncompatibleVariableOverride]
    """mlx-lm's QuantizedKVCache, growing as it should."""


class GrowingKVCache(ChunkedGrowth, KVCache):  # pyright: ignore[reportIncompatibleVariableOverride]
    """mlx-lm's KVCache, growing as it should."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> GrowingQuantizedKVCache:
        packed = GrowingQuantizedKVCache(group_size, bits)
        packed.__dict__.update(super().to_quantized(group_size, bits).__dict__)
        return packed


@dataclass(frozen=True)
class KVQuantization:
    """Quantization of keys and values, once there are `start` tokens; then of all of them."""

    bits: int
    group_size: int = 64
    start: int = 0

    @classmethod
    def of(
        cls, config: Config, bits: int, group_size: int | None = None, start: int = 0
    ) -> "KVQuantization":
        """The quantization for a model; `group_size` None takes the largest its head width allows.

        Raises InputError for what cannot be.
        """
        width = config.head_dim
        fitting = [size for size in GROUP_SIZES if width % size == 0]
        if bits not in BITS:
            raise InputError(f"keys and values in {bits} bits; expected {listed(BITS)}")
        if not fitting:
            raise InputError(
                f"keys and values of heads {width} wide cannot be quantized: no group size "
                f"({listed(GROUP_SIZES)}) divides it; leave them unquantized"
            )
        if group_size is not None and group_size not in fitting:
            raise InputError(
                f"groups of {group_size} for heads {width} wide; expected {listed(fitting)}"
            )
        if start < 0:
            raise InputError(f"quantized from token {start} on; expected 0 or more")
        return cls(bits, fitting[0] if group_size is None else group_size, start)

    def nbytes(self, config: Config, tokens: int, itemsize: int) -> int:
        """Bytes of a cache of `tokens` tokens; `itemsize` bytes for scale, bias and window."""
        windows = config.cache_bytes(0, itemsize)
        values = (config.cache_bytes(tokens, itemsize) - windows) // itemsize
        return windows + values * self.bits // 8 + 2 * values // self.group_size * itemsize


def listed(choices: Sequence[int]) -> str:
    return " or ".join(map(str, choices))


def quantize_cache(cache: Cache, quantization: KVQuantization | None) -> None:
    """Replace the entries that have reached `quantization.start` by quantized ones, in place.

    Raises InputError if entries are quantized otherwise, or belong to a batch.
    """
    if quantization is None:
        return
    for index, entry in enumerate(cache):
        if isinstance(entry, QuantizedKVCache):
            if (entry.bits, entry.group_size) != (quantization.bits, quantization.group_size):
                raise InputError(
                    f"the cache holds keys and values in {entry.bits} bits, groups of "
                    f"{entry.group_size}; asked for {quantization.bits} bits, groups of "
                    f"{quantization.group_size}"
                )
        elif isinstance(entry, KVCache):
            if entry.offset >= quantization.start:
                cache[index] = entry.to_quantized(quantization.group_size, quantization.bits)
        elif hasattr(entry, "offset"):
            raise InputError("a batch's keys and values cannot be quantized; leave out the bits")
