"""The dense feed-forward of the first layers: down(silu(gate(x)) * up(x))."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, elementwise, in one launch."""
    return nn.silu(gate) * up


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: x [B, L, D], returns [B, L, D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
