"""A decode step, one token a row, through functions that are compiled once.

All shapes of a decode step are constant except in attention, whose keys and values grow. So
everything between two attentions is one compiled function, from one attention's output to the next
one's queries, keys and values: Python builds no graph for it, and neighbouring elementwise
operations become one launch.
"""

import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import getitem, is_
from typing import Any

import mlx.core as mx

from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.protocols import KeysValues, LayerCache
from lfm_mlx.kernels.metal import Kernels
from lfm_mlx.model.sdpa import attention_mask

Arrays = list[mx.array]


class CompiledSpan:
    """The layers from one attention's output to the next attention's input, as one function.

    attention, following: indices of the attention layers at both ends; None at the embedding and
        at the head
    """

    def __init__(self, model: Any, attention: int | None, following: int | None, kernels: Kernels):
        layers = model.layers
        begin = 0 if attention is None else attention + 1
        end = len(layers) if following is None else following
        # Weak, because the model holds its step: a cycle would keep the weights in memory.
        self.model, self.kernels = weakref.proxy(model), kernels
        self.windows = range(begin, end)
        self.attention = None if attention is None else layers[attention]
        self.between = layers[begin:end]
        self.following = None if following is None else layers[following]
        self.run = mx.compile(self.traced)

    def traced(
        self, x: mx.array, attended: Arrays, offset: Arrays, windows: Arrays
    ) -> tuple[Arrays, Arrays]:
        """The next attention's residual, queries, keys and values, or at the end the logits; and
        the convolutions' next windows.

        x: tokens [B, 1], or the residual [B, 1, D] that `attended` [B, 1, H Dh] is added to
        offset: the new token's position, [1] or [B]; empty if no attention follows
        """
        if self.attention is None:
            h = self.model.model.embed_tokens(x)
        else:
            h = self.attention.self_attn.after(attended[0], x, self.kernels)
            h = self.attention.feed_forward(h, self.attention.ffn_norm, self.kernels)
        moved = []
        for layer, window in zip(self.between, windows, strict=True):
            h, window = layer.conv.step(h, layer.operator_norm, window, self.kernels)
            h = layer.feed_forward(h, layer.ffn_norm, self.kernels)
            moved.append(window)
        if self.following is None:
            return [self.model.head(h, self.kernels)], moved
        norm = self.following.operator_norm
        return [h, *self.following.self_attn.before(h, norm, offset[0], self.kernels)], moved


class CompiledStep:
    """A model's decode step, valid for the weights, kernels and stream it was compiled with."""

    def __init__(self, model: Any, kernels: Kernels):
        self.kernels = kernels
        self.stream = mx.default_stream(mx.default_device())
        # A weight that is still lazy would be computed anew in every step.
        mx.eval(model.parameters())
        self.roots = roots(model)
        self.containers, self.keys, self.values = zip(*reachable(self.roots), strict=True)
        attentions = [i for i, layer in enumerate(model.layers) if "self_attn" in layer]
        self.attentions = [(index, model.layers[index].self_attn) for index in attentions]
        ends = pairwise([None, *attentions, None])
        self.spans = [CompiledSpan(model, begin, end, kernels) for begin, end in ends]

    def suits(self, model: Any, kernels: Kernels) -> bool:
        """Whether no weight or module was replaced: compiled functions hold them as constants."""
        if self.kernels != kernels or self.stream != mx.default_stream(mx.default_device()):
            return False
        try:
            now = map(getitem, self.containers, self.keys)
            return all(map(is_, roots(model), self.roots)) and all(map(is_, now, self.values))
        except (KeyError, IndexError):
            return False

    def __deepcopy__(self, memo: Any) -> None:
        """Not copied: a copied model compiles its own."""

    def __call__(self, tokens: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        """Logits [B, 1, V] after tokens [B, 1]; every entry of `cache` advances by one token."""
        entries: list[Any] = [*cache]
        mask = attention_mask(entries[self.attentions[0][0]], 1) if self.attentions else None
        x, attended = tokens, []
        for number, span in enumerate(self.spans):
            # Each attention's own offset: an unread lazy one would grow a graph of additions.
            ahead = entries[self.attentions[number][0]] if number < len(self.attentions) else None
            offset = [] if ahead is None else [position(ahead)]
            convs = [entries[layer] for layer in span.windows]
            (x, *queries), moved = span.run(x, attended, offset, [conv.window for conv in convs])
            for entry, window in zip(convs, moved, strict=True):
                entry.advance(window, 1)
            if ahead is not None:
                attended = [self.attentions[number][1].attend(*queries, mask, ahead)]
        return x


def position(entry: KeysValues) -> mx.array:
    """The next token's position, [1] or [B]."""
    return mx.array([entry.offset]) if isinstance(entry.offset, int) else entry.offset


def roots(model: Any) -> list[Any]:
    """The top modules of a model."""
    return [model.model, model.get("lm_head")]


def reachable(container: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every array and module inside, as (container, key, value)."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        yield container, key, value
        if isinstance(value, dict | list):
            yield from reachable(value)


def is_step(tokens: mx.array, cache: Sequence[LayerCache]) -> bool:
    """Whether `tokens` [B, L] are one a row, and every window is present and unpadded."""
    return tokens.shape[1] == 1 and all(
        entry.window is not None and entry.left_padding is None and entry.lengths is None
        for entry in cache
        if isinstance(entry, ConvWindow)
    )
