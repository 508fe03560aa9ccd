"""The dense feed-forward of the first layers: down(silu(gate(x)) * up(x))."""

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.config import ProjectionNames
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels
from lfm_mlx.kernels.projection import silu_times
from lfm_mlx.model.linear import Merged, project, project_matrix


class FeedForward(nn.Module):
    """The feed-forward of one layer, its projections named as mlx-lm names the family's."""

    def __init__(self, width: int, inner: int, names: ProjectionNames):
        super().__init__()
        self[names.gate] = nn.Linear(width, inner, bias=False)
        self[names.up] = nn.Linear(width, inner, bias=False)
        self[names.down] = nn.Linear(inner, width, bias=False)
        self.merged = Merged(names.gate, names.up)
        self.down_name = names.down

    def __call__(self, x: mx.array, norm: nn.RMSNorm, kernels: Kernels = NO_KERNELS) -> mx.array:
        """x + the feed-forward of norm(x). Shapes: x [B, L, D], returns [B, L, D]."""
        both = self.merged.matrix(self)
        if both is not None:
            h = project_matrix(x, both, norm, swiglu=True, kernels=kernels)
        else:
            normed = norm(x)
            gate, up = (self[name] for name in self.merged.names)
            h = silu_times(gate(normed), up(normed))
        return project(h, self[self.down_name], residual=x, kernels=kernels)
