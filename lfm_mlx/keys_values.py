"""Keys and values of the attention layers: how they grow, how they are packed, how they are read.

mlx-lm's cache classes store them. Ours grow by a sixteenth of what there is, so that a long prompt
is not copied again at every chunk, and refuse to be trimmed by less than nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from lfm_mlx.command import InputError
from lfm_mlx.config import Config
from lfm_mlx.kernels import metal

# What quantized keys and values can be: 32 must be a multiple of the bits in mlx-lm's class.
BITS = (8, 4)
GROUP_SIZES = (64, 32)
# The scores of one tile, in float32; its most queries, and its most keys. MLX has some ten tiles
# under way at a time.
SCORES_BYTES = 16 << 20
TILE_QUERIES = 256
TILE_KEYS = 2048


class Growing:
    """What our classes have before mlx-lm's. `step`: by how many tokens those grow."""

    offset: int

    @property
    def step(self) -> int:
        return max(256, self.offset // 16 // 256 * 256)

    def trim(self, n: int) -> int:
        if n < 0:
            raise InputError(f"cannot go back by {n} tokens; expected 0 or more")
        n = min(n, self.offset)
        self.offset -= n
        return n


class GrowingQuantizedKVCache(Growing, QuantizedKVCache):  # pyright: ignore[reportIncompatibleVariableOverride]
    """mlx-lm's QuantizedKVCache, growing as it should."""


class GrowingKVCache(Growing, KVCache):  # pyright: ignore[reportIncompatibleVariableOverride]
    """mlx-lm's KVCache, growing as it should."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> GrowingQuantizedKVCache:
        packed = GrowingQuantizedKVCache(group_size, bits)
        packed.__dict__.update(super().to_quantized(group_size, bits).__dict__)
        return packed


@dataclass(frozen=True)
class Packing:
    """How keys and values are quantized, and from which token on; those before it with them."""

    bits: int
    group_size: int = 64
    start: int = 0

    @classmethod
    def of(
        cls, config: Config, bits: int, group_size: int | None = None, start: int = 0
    ) -> "Packing":
        """The packing for a model; `group_size` None takes the largest its head width allows.

        Raises InputError for what cannot be.
        """
        width = config.head_dim
        fitting = [size for size in GROUP_SIZES if width % size == 0]
        if bits not in BITS:
            raise InputError(f"keys and values in {bits} bits; expected {listed(BITS)}")
        if not fitting:
            raise InputError(
                f"keys and values of heads {width} wide cannot be quantized: no group size "
                f"({listed(GROUP_SIZES)}) divides it; leave out --kv-bits"
            )
        if group_size is not None and group_size not in fitting:
            raise InputError(
                f"groups of {group_size} for heads {width} wide; expected {listed(fitting)}"
            )
        if start < 0:
            raise InputError(f"quantized from token {start} on; expected 0 or more")
        return cls(bits, fitting[0] if group_size is None else group_size, start)

    def nbytes(self, config: Config, tokens: int, itemsize: int) -> int:
        """What the cache of `tokens` tokens takes; `itemsize` bytes for scale, bias and window."""
        windows = config.cache_bytes(0, itemsize)
        values = (config.cache_bytes(tokens, itemsize) - windows) // itemsize
        return windows + values * self.bits // 8 + 2 * values // self.group_size * itemsize


def listed(choices: Sequence[int]) -> str:
    return " or ".join(map(str, choices))


def pack(cache: list[Any], packing: Packing | None) -> None:
    """Replace the entries that have reached `packing.start` by quantized ones, in place.

    Raises InputError where entries are quantized otherwise, or belong to a batch.
    """
    if packing is None:
        return
    for index, entry in enumerate(cache):
        if isinstance(entry, QuantizedKVCache):
            if (entry.bits, entry.group_size) != (packing.bits, packing.group_size):
                raise InputError(
                    f"the cache holds keys and values in {entry.bits} bits, groups of "
                    f"{entry.group_size}; asked for {packing.bits} bits, {packing.group_size}"
                )
        elif isinstance(entry, KVCache):
            if entry.offset >= packing.start:
                cache[index] = entry.to_quantized(packing.group_size, packing.bits)
        elif hasattr(entry, "offset"):
            raise InputError("a batch's keys and values cannot be quantized; leave out the bits")


def attention_mask(cache: Any | None, length: int) -> Any:
    """What `attend` needs to keep `length` new queries causal and off the padding."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None


def attend(
    queries: mx.array, keys: Any, values: Any, cache: Any | None, mask: Any, scale: float
) -> mx.array:
    """Softmax attention over the keys and values `cache` holds, quantized or not.

    However long they are, scores and copies take no more than a few tiles.

    Shapes:
        queries: [B, H, L, Dh] · keys, values: [B, Hkv, S, Dh] or their quantized triples
        returns [B, H, L, Dh]
    """
    batch, heads, length, _ = queries.shape
    packed = isinstance(keys, tuple | list)
    stored = (keys[0] if packed else keys).shape[2]
    fused = metal.available() and not packed  # MLX's kernel never writes the scores down
    copied = packed and not metal.available()  # whole, by the CPU's quantized product
    small = 4 * batch * heads * length * stored <= SCORES_BYTES or length == 1
    if fused or (small and not (copied and stored > TILE_KEYS)):
        return scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=mask)
    return attend_in_tiles(queries, Tiles(keys, cache), Tiles(values, cache), mask, scale)


class Tiles:
    """Stored keys or values, quantized or not, read a stretch at a time in float32."""

    def __init__(self, stored: Any, cache: Any):
        self.stored = stored
        self.packing = (cache.group_size, cache.bits) if isinstance(stored, tuple | list) else None
        parts: Any = stored if self.packing else (stored,)
        _, self.heads, self.length, _ = parts[0].shape

    def read(self, begin: int, end: int) -> mx.array:
        """Tokens [begin, end), as [B, Hkv, 1, end - begin, Dh]."""
        if self.packing is None:
            part = self.stored[..., begin:end, :]
        else:
            weight, scales, biases = (part[..., begin:end, :] for part in self.stored)
            part = mx.dequantize(weight, scales, biases, *self.packing)
        return part.astype(mx.float32)[:, :, None]


def attend_in_tiles(
    queries: mx.array, keys: Tiles, values: Tiles, mask: Any, scale: float
) -> mx.array:
    """`attend` with a running softmax over tiles of scores; each waits for the one before it.

    Shapes: queries [B, H, L, Dh], mask "causal", None or [B or 1, 1, L, S], returns [B, H, L, Dh]
    """
    batch, heads, length, width = queries.shape
    grouped = (queries.astype(mx.float32) * scale).reshape(
        batch, keys.heads, heads // keys.heads, length, width
    )
    blocks: list[mx.array] = []
    for begin in range(0, length, TILE_QUERIES):
        block = grouped[..., begin : begin + TILE_QUERIES, :]
        if blocks:
            block = mx.depends(block, blocks[-1])
        if isinstance(mask, mx.array):
            seen = mask[..., begin : begin + TILE_QUERIES, :][:, :, None]
        else:
            seen = None if mask is None else keys.length - length + begin
        blocks.append(attend_block(block, keys, values, seen).astype(queries.dtype))
    return mx.concatenate(blocks, axis=-2).reshape(queries.shape)


def attend_block(
    queries: mx.array, keys: Tiles, values: Tiles, seen: mx.array | int | None
) -> mx.array:
    """Attention of a few queries [B, Hkv, R, L, Dh], already scaled, in float32.

    seen: which keys each query sees: all when None, those up to its own when it is the first
        query's position, or a mask [B or 1, 1, 1, L, S]
    """
    batch, kv_heads, repeats, length, _ = queries.shape
    fitting = SCORES_BYTES // (4 * batch * kv_heads * repeats * length)
    columns = min(max(1, fitting), TILE_KEYS)
    end = min(seen + length, keys.length) if isinstance(seen, int) else keys.length
    peak = mx.full((*queries.shape[:-1], 1), mx.finfo(mx.float32).min)
    total, mixed = mx.zeros_like(peak), mx.zeros_like(queries)
    for left in range(0, end, columns):
        right = min(left + columns, end)
        scores = queries @ keys.read(left, right).swapaxes(-1, -2)
        visible = visible_keys(seen, length, left, right)
        if visible is not None:
            scores = mx.where(visible, scores, mx.finfo(mx.float32).min)
        highest = mx.maximum(peak, scores.max(axis=-1, keepdims=True))
        shares, kept = mx.exp(scores - highest), mx.exp(peak - highest)
        total = total * kept + shares.sum(axis=-1, keepdims=True)
        mixed = mixed * kept + shares @ values.read(left, right)
        # The next tile's scores are not begun before this one's are used up.
        queries, peak = mx.depends([queries, highest], [total, mixed])
    return mixed / total


def visible_keys(
    seen: mx.array | int | None, length: int, left: int, right: int
) -> mx.array | None:
    """The mask of the keys [left, right) for `length` queries; None where they see them all."""
    if isinstance(seen, mx.array):
        return seen[..., left:right]
    if seen is None or right <= seen + 1:
        return None
    return mx.arange(seen, seen + length)[:, None] >= mx.arange(left, right)[None]
