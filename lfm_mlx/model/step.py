"""One more token a row, through functions that are compiled once.

A decode step has constant shapes but in attention, whose keys and values grow. So all that lies
between two attentions is one function, from what was attended to the next queries, keys and
values: Python builds no graph for it, and elementwise operations beside one another are one launch.
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
    """The rest of an attention layer, the convolution layers after it, the next one's beginning.

    attention, following: the attention layers at both ends; None for the embedding and the head
    """

    def __init__(self, model: Any, attention: Any, following: Any, kernels: Kernels):
        layers = model.layers
        begin = 0 if attention is None else attention + 1
        end = len(layers) if following is None else following
        # The model has its step: without a weak reference neither would be freed at once.
        self.model, self.kernels = weakref.proxy(model), kernels
        self.windows = range(begin, end)
        self.attention = None if attention is None else layers[attention]
        self.between = layers[begin:end]
        self.following = None if following is None else layers[following]
        self.run = mx.compile(self.traced)

    def traced(
        self, x: mx.array, attended: Arrays, offset: Arrays, windows: Arrays
    ) -> tuple[Arrays, Arrays]:
        """Logits, or the next attention's residual, queries, keys and values; and next windows.

        x: tokens [B, 1], or the residual [B, 1, D] that `attended` [B, 1, H Dh] is added to
        offset: where the new token stands, [1] or [B]; none where there is no attention
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
    """A model's decode step, for the weights, kernels and stream it was made with."""

    def __init__(self, model: Any, kernels: Kernels):
        self.kernels = kernels
        self.stream = mx.default_stream(mx.default_device())
        mx.eval(model.parameters())  # else what makes a weight would be run at every step
        self.roots = roots(model)
        self.containers, self.keys, self.values = zip(*reachable(self.roots), strict=True)
        attentions = [i for i, layer in enumerate(model.layers) if "self_attn" in layer]
        self.attentions = [(index, model.layers[index].self_attn) for index in attentions]
        ends = pairwise([None, *attentions, None])
        self.spans = [CompiledSpan(model, begin, end, kernels) for begin, end in ends]

    def suits(self, model: Any, kernels: Kernels) -> bool:
        """Whether the model is what it was: compiling took every weight as constant."""
        if self.kernels != kernels or self.stream != mx.default_stream(mx.default_device()):
            return False
        try:
            now = map(getitem, self.containers, self.keys)
            return all(map(is_, roots(model), self.roots)) and all(map(is_, now, self.values))
        except (KeyError, IndexError):
            return False

    def __deepcopy__(self, memo: Any) -> None:
        """A copied model compiles its own."""

    def __call__(self, tokens: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        """Logits [B, 1, V] after tokens [B, 1]; every entry of `cache` moves on."""
        entries: list[Any] = [*cache]
        mask = attention_mask(entries[self.attentions[0][0]], 1) if self.attentions else None
        x, attended = tokens, []
        for number, span in enumerate(self.spans):
            # Every attention's own: an offset that nothing reads would grow a graph of additions.
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
    """Where the next token stands, [1] or [B]."""
    return mx.array([entry.offset]) if isinstance(entry.offset, int) else entry.offset


def roots(model: Any) -> list[Any]:
    """The modules that a model consists of."""
    return [model.model, model.get("lm_head")]


def reachable(container: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every array and module inside: what holds it, under which key, and itself."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        yield container, key, value
        if isinstance(value, dict | list):
            yield from reachable(value)


def is_step(tokens: mx.array, cache: Sequence[LayerCache]) -> bool:
    """Whether `tokens` [B, L] are one more each, after windows that are there and not padded."""
    return tokens.shape[1] == 1 and all(
        entry.window is not None and entry.left_padding is None and entry.lengths is None
        for entry in cache
        if isinstance(entry, ConvWindow)
    )
