"""Keys and values: how they grow, how they are packed, and attention in tiles against plain."""

import mlx.core as mx
import numpy as np
import pytest
from caches import EXACT, LFM25, draw, windows
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD
from models import model_of
from reference import relative_error

from lfm_mlx import Config, Model
from lfm_mlx.cache.cache import cached_tokens
from lfm_mlx.cache.keys_values import (
    GrowingKVCache,
    GrowingQuantizedKVCache,
    KVQuantization,
    quantize_cache,
)
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.errors import InputError
from lfm_mlx.model import sdpa
from lfm_mlx.model.sdpa import attend, attention_mask

# Two query heads on one head 32 wide, the narrowest that can be quantized.
NARROW = ODD | {"num_attention_heads": 2, "hidden_size": 64}
DEEP = NARROW | {"num_hidden_layers": 24, "layer_types": LFM25}


def build(config: dict, seed: int = 41) -> Model:
    return model_of(config, random_tensors(config, seed))


def random(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_growing_copies_a_multiple_of_the_length(bits: int | None) -> None:
    """However many chunks a prompt has, each token is copied a bounded number of times."""
    entry = GrowingKVCache() if bits is None else GrowingQuantizedKVCache(32, bits)
    copied, capacity, chunk = 0, 0, random(0, 1, 1, 64, 32)
    for read in range(0, 32768, 64):
        entry.update_and_fetch(chunk, chunk)
        keys = entry.keys if bits is None else entry.keys[0]
        if keys.shape[2] != capacity:
            copied, capacity = copied + read, keys.shape[2]
        mx.eval(entry.keys, entry.values)
    assert copied < 20 * 32768, "fixed steps of 256 would copy 64 times that length"
    assert 32768 <= capacity <= 32768 * 17 / 16 + 256


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kept", [0, 1, 255, 256, 300, 511])
def test_growing_again_after_a_rewind_keeps_every_token(seed: int, kept: int) -> None:
    entry, whole = GrowingKVCache(), random(seed, 1, 2, 900, 8)
    entry.update_and_fetch(whole[:, :, :512], whole[:, :, :512])
    entry.trim(512 - kept)
    keys, values = entry.update_and_fetch(whole[:, :, kept:], whole[:, :, kept:])
    assert mx.array_equal(keys, whole)
    assert mx.array_equal(values, whole)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    ("length", "stored", "tile"),
    [(7, 7, 1 << 8), (5, 61, 1 << 10), (33, 100, 3000), (40, 300, 1 << 12)],
)
def test_attention_in_tiles_equals_attention_in_one(
    monkeypatch: pytest.MonkeyPatch, length: int, stored: int, tile: int, bits: int | None
) -> None:
    entry = GrowingKVCache() if bits is None else GrowingQuantizedKVCache(32, bits)
    entry.update_and_fetch(*(random(n, 1, 2, stored - length, 32) for n in (1, 2)))
    mask = attention_mask(entry, length)
    keys, values = entry.update_and_fetch(*(random(n, 1, 2, length, 32) for n in (3, 4)))
    wanted = np.array(attend(random(5, 1, 6, length, 32), keys, values, entry, mask, 0.2))
    monkeypatch.setattr(sdpa, "SCORES_BYTES", tile)
    monkeypatch.setattr(sdpa, "TILE_QUERIES", 16)
    got = np.array(attend(random(5, 1, 6, length, 32), keys, values, entry, mask, 0.2))
    assert relative_error(got, wanted) < EXACT


def test_padded_rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model, padding, tokens = build(NARROW), [0, 13, 4], draw(6, 3, 40)
    wanted = np.array(model(tokens, model.make_cache(padding)))
    monkeypatch.setattr(sdpa, "SCORES_BYTES", 1 << 9)
    monkeypatch.setattr(sdpa, "TILE_QUERIES", 8)
    got = np.array(model(tokens, model.make_cache(padding)))
    for row, padded in enumerate(padding):
        assert relative_error(got[row, padded:], wanted[row, padded:]) < 1e-5


def packed(model: Model, bits: int, tokens: mx.array) -> list:
    cache = model.make_cache()
    quantize_cache(cache, KVQuantization.of(model.config, bits))
    if tokens.shape[1]:
        model(tokens, cache)
    return cache


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [NARROW, DEEP], ids=["odd", "24 layers of LFM2.5"])
def test_rewinding_quantized_keys_and_values_equals_a_fresh_prefill(
    config: dict, bits: int
) -> None:
    """To where rounding of keys a hair apart goes to neighbouring steps: see the tolerance."""
    model, tokens = build(config), draw(7, 1, 150)
    for length in (149, 140, 113, 60, 36, 11, 2, 1, 0):
        cache = packed(model, bits, tokens)
        rewind(cache, length)
        assert cached_tokens(cache) == length
        other = packed(model, bits, tokens[:, :length])
        following = draw(8, 1, 1)
        got, wanted = np.array(model(following, cache)), np.array(model(following, other))
        assert relative_error(got, wanted) < TOLERANCE[bits], length
        for ours, theirs in zip(windows(cache), windows(other), strict=True):
            assert relative_error(ours, theirs) < TOLERANCE[bits], length


# Relative to the largest: half a step in a key's 32 values, where two float sums of the same
# numbers round to different sides of it.
TOLERANCE = {8: 2e-4, 4: 2e-3}


def test_packing_begins_at_its_start() -> None:
    model, tokens, packing = build(NARROW), draw(9, 1, 60), KVQuantization(8, 32, start=30)
    cache = model.make_cache()
    kinds = []
    for begin in range(0, 60, 10):
        quantize_cache(cache, packing)
        model(tokens[:, begin : begin + 10], cache)
        kinds.append(type(cache[1]))
    assert kinds == [GrowingKVCache] * 3 + [GrowingQuantizedKVCache] * 3
    plain = model.make_cache()
    model(tokens, plain)
    following = draw(10, 1, 1)
    got, wanted = np.array(model(following, cache)), np.array(model(following, plain))
    assert relative_error(got, wanted) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_bytes_are_as_told(bits: int) -> None:
    config = Config.from_dict(NARROW)
    model, cache = build(NARROW), []
    cache = packed(model, bits, draw(11, 1, 512))
    stored = sum(entry.nbytes for entry in cache if hasattr(entry, "offset"))
    assert KVQuantization(bits, 32).nbytes(config, 512, 4) - config.cache_bytes(0, 4) == stored


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        (ODD, (8,), "heads 8 wide cannot be quantized: no group size"),
        (NARROW, (8, 64), "groups of 64 for heads 32 wide; expected 32"),
        (NARROW, (3,), "in 3 bits; expected 8 or 4"),
        (NARROW, (8, 32, -1), "from token -1 on"),
    ],
)
def test_what_cannot_be_packed(config: dict, arguments: tuple, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        KVQuantization.of(Config.from_dict(config), *arguments)
    assert "\n" not in str(caught.value)


def test_a_cache_packed_otherwise_or_of_a_batch_is_refused() -> None:
    model = build(NARROW)
    with pytest.raises(InputError, match="in 8 bits, groups of 32; asked for 4 bits, groups of 32"):
        quantize_cache(packed(model, 8, draw(12, 1, 5)), KVQuantization(4, 32))
    with pytest.raises(InputError, match="a batch's"):
        quantize_cache(model.make_cache([0, 1]), KVQuantization(8, 32))
