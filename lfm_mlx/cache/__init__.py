"""The conversation's memory: keys and values of the attention layers, windows of the conv layers.

A cache is a list with one entry a layer, in mlx-lm's protocol, so that its batching, server and
prompt-cache files work on it. It can be rewound to any earlier token (`rewind`).
"""

from lfm_mlx.cache.cache import make_cache
from lfm_mlx.cache.rewind import rewind

__all__ = ["make_cache", "rewind"]
