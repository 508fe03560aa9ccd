"""The sparse feed-forward: a router chooses K experts per token, and only those are computed.

The stacked projections are mlx-lm's switch layers, so that LoRA, fusing and dequantizing
recognize them; ours adds a gathered product of half-precision weights, which MLX's CPU backend
lacks.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from lfm_mlx.config import Config
from lfm_mlx.kernels.experts import experts, through_chosen
from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, among
from lfm_mlx.kernels.router import norm_router, router
from lfm_mlx.model.linear import matrix_of


class ExpertLinear(SwitchLinear):
    """One projection of all experts, weight [E, out, in]."""

    def __init__(self, width: int, out: int, num_experts: int):
        super().__init__(width, out, num_experts, bias=False)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Each row of x through the expert its index names.

        Shapes:
            x: [..., 1, in], broadcast against indices · indices: [...], returns [..., 1, out]
        """
        return Matrix(self.weight).chosen_times(x, indices, sorted_indices)


class Experts(nn.Module):
    """All experts of a layer: down(silu(gate(x)) * up(x)) for the chosen ones."""

    def __init__(self, width: int, inner: int, num_experts: int):
        super().__init__()
        self.gate_proj = ExpertLinear(width, inner, num_experts)
        self.up_proj = ExpertLinear(width, inner, num_experts)
        self.down_proj = ExpertLinear(inner, width, num_experts)

    def __call__(
        self,
        x: mx.array,
        indices: mx.array,
        weights: mx.array,
        residual: mx.array,
        kernels: Kernels = NO_KERNELS,
    ) -> mx.array:
        """residual + the chosen experts' weighted sum.

        Shapes: x and residual [B, L, D], indices and weights [B, L, K], returns [B, L, D]
        """
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = map(matrix_of, projections)
        if gate is not None and up is not None and down is not None:
            use = among(kernels, "experts")
            return experts(x, indices, weights, gate, up, down, residual, use_kernel=use)
        y = through_chosen(x, indices, *projections)
        return residual + (y * weights[..., None]).sum(axis=-2)


class SparseFeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        width, num_experts = config.hidden_size, config.num_experts
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.switch_mlp = Experts(width, config.moe_intermediate_size, num_experts)
        if config.use_expert_bias:
            self.expert_bias = mx.zeros((num_experts,), mx.float32)

    def route(
        self, x: mx.array, norm: nn.RMSNorm, kernels: Kernels = NO_KERNELS
    ) -> tuple[mx.array, mx.array, mx.array]:
        """norm(x) [B, L, D], the experts chosen for it and their weights, [B, L, K] each."""
        bias = self.get("expert_bias")
        options = {"normalize": self.normalize, "scale": self.scale}
        gate = matrix_of(self.gate)
        if gate is None:
            normed = norm(x)
            return normed, *router(self.gate(normed), bias, self.experts_per_token, **options)
        return norm_router(
            *(x, norm.weight, norm.eps, gate, bias, self.experts_per_token),
            **options,
            use_kernel=among(kernels, "norm_router"),
        )

    def __call__(self, x: mx.array, norm: nn.RMSNorm, kernels: Kernels = NO_KERNELS) -> mx.array:
        """x + the chosen experts of norm(x). Shapes: x [B, L, D], returns [B, L, D]."""
        normed, indices, weights = self.route(x, norm, kernels)
        return self.switch_mlp(normed, indices, weights, x, kernels)
