"""The sparse feed-forward: a router chooses K experts per token, and only those are computed.

The stacked projections are mlx-lm's switch layers, so that LoRA, fusing, dequantizing and GPTQ
recognize them; `kernels.matrix` has the gathered product of half-precision weights that MLX's CPU
backend lacks.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from lfm_mlx.config import Config
from lfm_mlx.kernels.experts import experts, through_chosen
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, among
from lfm_mlx.kernels.router import norm_router, router
from lfm_mlx.model.linear import matrix_of


class Experts(nn.Module):
    """All experts of a layer: down(silu(gate(x)) * up(x)) for the chosen ones."""

    def __init__(self, width: int, inner: int, num_experts: int):
        super().__init__()
        self.gate_proj = SwitchLinear(width, inner, num_experts, bias=False)
        self.up_proj = SwitchLinear(width, inner, num_experts, bias=False)
        self.down_proj = SwitchLinear(inner, width, num_experts, bias=False)

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
        # An adapter or mlx-lm's calibration is around one. The CPU's gathered product is float32's.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        wide = x.astype(mx.float32) if on_cpu else x
        y = through_chosen(wide, indices, *projections).astype(x.dtype)
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
