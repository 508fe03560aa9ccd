"""Models of odd shapes and the caches of their conversations, for tests of what is remembered."""

import mlx.core as mx
import numpy as np
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD
from models import model_of
from reference import relative_error

from lfm_mlx import Model
from lfm_mlx.cache.cache import cached_tokens
from lfm_mlx.cache.conv_window import ConvWindow

ATTENTION = (2, 6, 10, 14, 18, 21)
LFM25 = [("full_attention" if layer in ATTENTION else "conv") for layer in range(24)]
CONFIGS = {
    "24 layers of LFM2.5": ODD | {"num_hidden_layers": 24, "layer_types": LFM25},
    "odd": ODD,
    "wide window": ODD | {"conv_L_cache": 5},
    "attention first": ODD
    | {"num_hidden_layers": 3, "layer_types": ["full_attention", "conv", "conv"]},
    "no attention": ODD | {"num_hidden_layers": 3, "layer_types": ["conv"] * 3},
}
# Float32 sums of the same numbers, in the order that chunks of another length give.
EXACT = 1e-6


def build(name: str, seed: int = 31) -> Model:
    return model_of(CONFIGS[name], random_tensors(CONFIGS[name], seed))


def draw(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, ODD["vocab_size"], shape))


def windows(cache: list) -> list[np.ndarray]:
    return [np.array(entry.window) for entry in cache if isinstance(entry, ConvWindow)]


def fresh(model: Model, tokens: mx.array) -> list:
    cache = model.make_cache()
    if tokens.shape[1]:
        model(tokens, cache)
    return cache


def expect_same(model: Model, cache: list, tokens: mx.array, following: mx.array) -> None:
    """`cache` is as one that has read `tokens`: same logits after `following`, same windows."""
    assert cached_tokens(cache) == tokens.shape[1]
    other = fresh(model, tokens)
    got, wanted = np.array(model(following, cache)), np.array(model(following, other))
    error = relative_error(got, wanted)
    assert error <= EXACT, f"logits after {tokens.shape[1]} tokens: {error:.2e}"
    for layer, (ours, theirs) in enumerate(zip(windows(cache), windows(other), strict=True)):
        error = relative_error(ours, theirs)
        assert error <= EXACT, f"window {layer} after {tokens.shape[1]} tokens: {error:.2e}"
