"""The decoder: embedding, layers, final norm and the head tied to the embedding."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.cache.cache import cache_state, log_tokens, make_cache
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.protocols import Cache, LayerCache, Mask
from lfm_mlx.cache.rewind import restore_windows
from lfm_mlx.config import Config
from lfm_mlx.kernels import metal
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, UseKernels
from lfm_mlx.kernels.self_check import working
from lfm_mlx.model.attention import Attention
from lfm_mlx.model.experts import SparseFeedForward
from lfm_mlx.model.feed_forward import FeedForward
from lfm_mlx.model.linear import matrix_of, project, project_matrix
from lfm_mlx.model.sdpa import attention_mask
from lfm_mlx.model.short_conv import ShortConv
from lfm_mlx.model.step import CompiledStep, is_step

# Tokens times layers that a prompt computes at a time: 1 GB of the 8.5 B model.
PENDING_TOKENS = 8192


class Layer(nn.Module):
    """One block, its operator an attention or a short convolution:

        h = x + operator(operator_norm(x))
        y = h + feed_forward(ffn_norm(h))

    Norm and residual are handed to the operator and the feed-forward, so that one launch can hold
    a norm and the projection after it, or a projection and the sum after it.
    """

    def __init__(self, config: Config, layer_index: int):
        super().__init__()
        width = config.hidden_size
        self.operator_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        if config.is_attention(layer_index):
            self.self_attn = Attention(config)
        else:
            self.conv = ShortConv(config)
        if config.is_sparse(layer_index):
            self.feed_forward = SparseFeedForward(config)
        else:
            names = config.dense_projections
            self.feed_forward = FeedForward(width, config.intermediate_size, names)

    def __call__(
        self, x: mx.array, mask: Mask, cache: Any | None, kernels: Kernels = NO_KERNELS
    ) -> mx.array:
        """Shapes: x [B, L, D], returns [B, L, D]."""
        h = self.operator(x, mask, cache, kernels)  # x + operator(operator_norm(x))
        return self.feed_forward(h, self.ffn_norm, kernels)  # h + feed_forward(ffn_norm(h))

    def operator(
        self, x: mx.array, mask: Mask, cache: Any | None, kernels: Kernels = NO_KERNELS
    ) -> mx.array:
        """x + operator(operator_norm(x))."""
        if "self_attn" in self:
            return self.self_attn(x, self.operator_norm, mask, cache, kernels)
        return self.conv(x, self.operator_norm, cache, kernels)


class Decoder(nn.Module):
    """Everything before the head. `embedding_norm` is the final norm, despite its name."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.embedding_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        types = enumerate(config.layer_types)
        self.first_attention = next((i for i, _ in types if config.is_attention(i)), None)

    def through_layers(
        self, h: mx.array, cache: Sequence[LayerCache] | None, kernels: Kernels
    ) -> mx.array:
        """The last layer's output, not normed. Shapes: h [B, L, D], returns [B, L, D]."""
        caches = cache if cache is not None else [None] * len(self.layers)
        mask = None
        if self.first_attention is not None:
            first: Any = caches[self.first_attention]
            mask = attention_mask(first, h.shape[1])
        together = self.layers_together(h.shape[0] * h.shape[1], cache)
        for index, (layer, layer_cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            h = layer(h, mask, layer_cache, kernels)
            if index % together == 0 and index < len(self.layers):
                # With the windows, which keep what they are cut from; keys and values h has needed.
                done = caches[index - together : index]
                mx.eval(h, cache_state([entry for entry in done if isinstance(entry, ConvWindow)]))
        return h

    def layers_together(self, tokens: int, cache: Sequence[Any] | None) -> int:
        """After how many layers a prompt of `tokens` is evaluated, so that its memory is bounded.

        A large command buffer keeps what its layers have computed: some 130 KB a token and layer
        at the size of the 8.5 B model.
        """
        if cache is None or self.training or not metal.available():
            return len(self.layers)
        return max(1, PENDING_TOKENS // tokens)


class Model(nn.Module):
    """LFM2 and LFM2-MoE as a causal language model.

    use_kernels: which operations run their Metal kernels where Metal is there; see `metal.chosen`.
        Kernels have no gradients: in training mode none runs
    compile_step: whether one more token runs through compiled functions; None: only on a GPU
    """

    def __init__(self, config: Config, use_kernels: UseKernels = None):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.kernels = metal.chosen(use_kernels)
        self.compile_step: bool | None = None
        self.compiled: CompiledStep | None = None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[LayerCache] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits for the token after each one; a cache is read, and advanced by L tokens.

        Shapes:
            tokens: [B, L] integers · input_embeddings: [B, L, D], if given used in their place
            returns [B, L, V]
        """
        if cache is not None:
            self.restore(cache)
            log_tokens(cache, tokens if input_embeddings is None else None)
        kernels = self.running_kernels()
        plain = input_embeddings is None and self.compiles()
        if cache is not None and plain and is_step(tokens, cache):
            return self.compiled_step(kernels)(tokens, cache)
        h = self.model.embed_tokens(tokens) if input_embeddings is None else input_embeddings
        return self.head(self.model.through_layers(h, cache, kernels), kernels)

    def head(self, h: mx.array, kernels: Kernels) -> mx.array:
        """Logits [B, L, V] from the last layer's output [B, L, D]."""
        norm, embedding = self.model.embedding_norm, self.model.embed_tokens
        if "lm_head" in self:
            return project(h, self.lm_head, norm, kernels=kernels)
        matrix = matrix_of(embedding)
        if matrix is None:
            return embedding.as_linear(norm(h))
        return project_matrix(h, matrix, norm, kernels=kernels)

    def running_kernels(self) -> Kernels:
        """The operations whose kernels may run: none in training, or without Metal."""
        return NO_KERNELS if self.training or not metal.available() else working(self.kernels)

    def compiles(self) -> bool:
        """Whether a decode step is compiled; on a CPU compiling costs more than it saves."""
        return metal.available() if self.compile_step is None else self.compile_step

    def compiled_step(self, kernels: Kernels) -> CompiledStep:
        """The decode step for the current weights; compiled again if any of them is replaced."""
        if self.compiled is None or not self.compiled.suits(self, kernels):
            self.compiled = CompiledStep(self, kernels)
        return self.compiled

    def restore(self, cache: Sequence[LayerCache]) -> None:
        """Rebuild the windows that a rewind left stale; the next pass would do it first."""
        restore_windows(cache, self.config.conv_memory, self._replay)

    def _replay(self, tokens: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        h = self.model.embed_tokens(tokens)
        return self.model.through_layers(h, cache, self.running_kernels())

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self, left_padding: Sequence[int] | None = None) -> Cache:
        """An empty cache, for one sequence or for a batch padded by [B] columns on the left."""
        return make_cache(self.config, left_padding)

    def load_weights(self, *args: Any, **kwargs: Any) -> "Model":
        """Load as nn.Module does, then merge projections that share their input."""
        super().load_weights(*args, **kwargs)
        self.merge_projections()
        return self

    def set_dtype(self, *args: Any, **kwargs: Any) -> None:
        """Cast as nn.Module does, then merge projections that share their input."""
        super().set_dtype(*args, **kwargs)
        self.merge_projections()

    def merge_projections(self) -> None:
        """Store the weights of projections that share their input as views of one matrix."""
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                module.merged.merge(module)
