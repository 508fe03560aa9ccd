"""The sparse feed-forward: a router, and only the experts it chose are computed.

The stacked projections are mlx-lm's switch layers, so that LoRA, fusing and dequantizing find what
they know; ours adds what MLX's CPU backend lacks, a gathered product of half-precision weights.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from lfm_mlx.config import Config
from lfm_mlx.kernels.router import router
from lfm_mlx.model.feed_forward import swiglu

# From this many (token, expert) pairs on, sorting them by expert pays: each expert is read once.
SORTED_FROM = 64


class ExpertLinear(SwitchLinear):
    """One projection of all experts, weight [E, out, in]."""

    def __init__(self, width: int, out: int, num_experts: int):
        super().__init__(width, out, num_experts, bias=False)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Each row of x through the expert its index names.

        Shapes:
            x: [..., 1, in], broadcast against indices · indices: [...], returns [..., 1, out]
        """
        weight = self.weight
        if weight.dtype == x.dtype and (x.dtype == mx.float32 or on_gpu()):
            return super().__call__(x, indices, sorted_indices)
        # The CPU's gathered product knows float32 alone: widen what this call reads, no more.
        if indices.size < weight.shape[0]:
            chosen = weight[indices].astype(mx.float32)  # [..., out, in]
            product = x.astype(mx.float32) @ chosen.swapaxes(-1, -2)
        else:
            wide = weight.astype(mx.float32).swapaxes(-1, -2)
            product = mx.gather_mm(
                x.astype(mx.float32), wide, rhs_indices=indices, sorted_indices=sorted_indices
            )
        return product.astype(x.dtype)


def on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


class Experts(nn.Module):
    """All experts of a layer: down(silu(gate(x)) * up(x)) for the chosen ones."""

    def __init__(self, width: int, inner: int, num_experts: int):
        super().__init__()
        self.gate_proj = ExpertLinear(width, inner, num_experts)
        self.up_proj = ExpertLinear(width, inner, num_experts)
        self.down_proj = ExpertLinear(inner, width, num_experts)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Shapes: x [B, L, D], indices [B, L, K], returns [B, L, K, D]."""
        if indices.size < SORTED_FROM:
            return self._project(x[..., None, None, :], indices, False).squeeze(-2)
        flat = indices.flatten()  # [B*L*K]
        order = mx.argsort(flat)
        tokens = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]  # [B*L*K, 1, D]
        y = self._project(tokens, flat[order], True)
        return y[mx.argsort(order)].reshape(*indices.shape, -1)

    def _project(self, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        gate = self.gate_proj(x, indices, sorted_indices=in_order)
        up = self.up_proj(x, indices, sorted_indices=in_order)
        return self.down_proj(swiglu(gate, up), indices, sorted_indices=in_order)


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

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts chosen for each token and their weights, [B, L, K] each."""
        bias = self.expert_bias if "expert_bias" in self else None
        return router(
            self.gate(x), bias, self.experts_per_token, normalize=self.normalize, scale=self.scale
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: x [B, L, D], returns [B, L, D]."""
        indices, weights = self.route(x)
        return (self.switch_mlp(x, indices) * weights[..., None]).sum(axis=-2)
