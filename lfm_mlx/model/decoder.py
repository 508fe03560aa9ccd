"""The decoder: embedding, layers, final norm and the head tied to the embedding."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx import quantize, weights
from lfm_mlx.cache import log_tokens, make_cache, restore_windows
from lfm_mlx.checkpoint import TensorInfo
from lfm_mlx.config import Config
from lfm_mlx.keys_values import attention_mask
from lfm_mlx.model.attention import Attention
from lfm_mlx.model.experts import SparseFeedForward
from lfm_mlx.model.feed_forward import FeedForward
from lfm_mlx.model.short_conv import ShortConv


class Layer(nn.Module):
    """One block: an operator (attention or short convolution), then a feed-forward."""

    def __init__(self, config: Config, layer_index: int):
        super().__init__()
        width = config.hidden_size
        self.operator_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        if config.is_attention(layer_index):
            self.self_attn = Attention(config)
        else:
            self.conv = ShortConv(config)
        sparse = config.is_sparse(layer_index)
        self.feed_forward = (
            SparseFeedForward(config) if sparse else FeedForward(width, config.intermediate_size)
        )

    def __call__(self, x: mx.array, mask: Any, cache: Any | None) -> mx.array:
        h = x + self.operator(self.operator_norm(x), mask, cache)
        return h + self.feed_forward(self.ffn_norm(h))

    def operator(self, x: mx.array, mask: Any, cache: Any | None) -> mx.array:
        if "self_attn" in self:
            return self.self_attn(x, mask, cache)
        return self.conv(x, cache)


class Decoder(nn.Module):
    """Everything before the head. `embedding_norm` is the final norm, despite its name."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.embedding_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        types = enumerate(config.layer_types)
        self.first_attention = next((i for i, _ in types if config.is_attention(i)), None)

    def __call__(self, h: mx.array, cache: Sequence[Any] | None) -> mx.array:
        """Shapes: h [B, L, D], returns [B, L, D]."""
        caches = cache if cache is not None else [None] * len(self.layers)
        mask = None
        if self.first_attention is not None:
            mask = attention_mask(caches[self.first_attention], h.shape[1])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, mask, layer_cache)
        return self.embedding_norm(h)


class Model(nn.Module):
    """LFM2 and LFM2-MoE as a causal language model."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits of the token after each; `cache`, where given, is read and moved on.

        Shapes:
            tokens: [B, L] integers · input_embeddings: [B, L, D], taken instead when given
            returns [B, L, V]
        """
        if cache is not None:
            restore_windows(cache, self.config.conv_memory, self._replay)
            log_tokens(cache, tokens if input_embeddings is None else None)
        h = self.model.embed_tokens(tokens) if input_embeddings is None else input_embeddings
        h = self.model(h, cache)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def _replay(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        return self.model(self.model.embed_tokens(tokens), cache)

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[Any]:
        """An empty cache, for one sequence or for a batch padded by [B] columns on the left."""
        return make_cache(self.config, left_padding)

    def sanitize(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's hook: a checkpoint's tensors, in any spelling, as this model's parameters."""
        infos = {name: TensorInfo("", array.shape, Path()) for name, array in tensors.items()}
        built = {p.name: p.build(tensors) for p in weights.assignments(self.config, infos)}
        return {name: weights.cast(name, array, None) for name, array in built.items()}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """mlx-lm's hook: which modules its convert command packs."""
        never = re.compile("|".join(quantize.NEVER))
        return lambda path, module: never.fullmatch(path) is None

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """mlx-lm's hook: which parameters its convert command casts to the dtype asked for."""
        return lambda name: weights.FLOAT32.fullmatch(name) is None
