"""The dense feed-forward of the first layers: down(silu(gate(x)) * up(x))."""

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.kernels.metal import NO_KERNELS, Kernels
from lfm_mlx.kernels.projection import silu_times
from lfm_mlx.model.linear import Merged, project, project_matrix


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.merged = Merged("gate_proj", "up_proj")

    def __call__(self, x: mx.array, norm: nn.RMSNorm, kernels: Kernels = NO_KERNELS) -> mx.array:
        """x + the feed-forward of norm(x). Shapes: x [B, L, D], returns [B, L, D]."""
        both = self.merged.matrix(self)
        if both is not None:
            h = project_matrix(x, both, norm, swiglu=True, kernels=kernels)
        else:
            normed = norm(x)
            h = silu_times(self.gate_proj(normed), self.up_proj(normed))
        return project(h, self.down_proj, residual=x, kernels=kernels)
