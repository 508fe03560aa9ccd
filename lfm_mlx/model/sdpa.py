"""Attention over stored keys and values, quantized or not, in bounded memory."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from lfm_mlx.cache.joined import RowsKeysValues
from lfm_mlx.cache.protocols import KeysValues, Mask, Stored
from lfm_mlx.kernels import metal

# The scores of one tile, in float32; its most queries, and its most keys. MLX has some ten tiles
# under way at a time.
SCORES_BYTES = 16 << 20
TILE_QUERIES = 256
TILE_KEYS = 2048


def attention_mask(cache: KeysValues | None, length: int) -> Mask:
    """The mask that keeps `length` new queries causal and off the padding."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None


def attend(
    queries: mx.array,
    keys: Stored,
    values: Stored,
    cache: KeysValues | None,
    mask: Mask,
    scale: float,
) -> mx.array:
    """Softmax attention over the keys and values `cache` holds, quantized or not.

    However long they are, scores and copies take no more than a few tiles.

    Shapes:
        queries: [B, H, L, Dh] · keys, values: [B, Hkv, S, Dh] or their quantized triples; of
            rows with entries of their own a list of these, with B = 1
        returns [B, H, L, Dh]
    """
    if isinstance(cache, RowsKeysValues):
        rows = enumerate(zip(keys, values, cache.entries, strict=True))
        return mx.concatenate([attend(queries[i : i + 1], *row, mask, scale) for i, row in rows])
    batch, heads, length, _ = queries.shape
    packed = not isinstance(keys, mx.array)
    stored = (keys if isinstance(keys, mx.array) else keys[0]).shape[2]
    fused = metal.available() and not packed  # MLX's kernel never writes the scores down
    copied = packed and not metal.available()  # whole, by the CPU's quantized product
    small = 4 * batch * heads * length * stored <= SCORES_BYTES or length == 1
    if fused or (small and not (copied and stored > TILE_KEYS)):
        # mlx-lm's function takes "causal" too.
        seen: Any = mask
        return scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=seen)
    return attend_in_tiles(queries, Tiles(keys, cache), Tiles(values, cache), mask, scale)


class Tiles:
    """Stored keys or values, quantized or not, read a stretch at a time in float32."""

    def __init__(self, stored: Stored, cache: Any):
        self.parts = [stored] if isinstance(stored, mx.array) else list(stored)
        packed = len(self.parts) > 1
        self.quantization = (cache.group_size, cache.bits) if packed else None
        _, self.heads, self.length, _ = self.parts[0].shape

    def read(self, begin: int, end: int) -> mx.array:
        """Tokens [begin, end), as [B, Hkv, 1, end - begin, Dh]."""
        part, *scales_and_biases = (part[..., begin:end, :] for part in self.parts)
        if self.quantization is not None:
            scales, biases = scales_and_biases
            part = mx.dequantize(part, scales, biases, *self.quantization)
        return part.astype(mx.float32)[:, :, None]


def attend_in_tiles(
    queries: mx.array, keys: Tiles, values: Tiles, mask: Mask, scale: float
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

    seen: which keys each query sees: all if None, those up to its own when it is the first
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
    """The mask of the keys [left, right) for `length` queries; None if they see them all."""
    if isinstance(seen, mx.array):
        return seen[..., left:right]
    if seen is None or right <= seen + 1:
        return None
    return mx.arange(seen, seen + length)[:, None] >= mx.arange(left, right)[None]
