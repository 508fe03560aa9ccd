"""Grouped-query attention; queries and keys are normed per head before the rotation.

attention(x) = out_proj(softmax(q k^T / sqrt(Dh)) v),  q = rope(norm(q_proj(x))),
k = rope(norm(k_proj(x))), v = v_proj(x)
"""

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.cache.protocols import KeysValues, Mask
from lfm_mlx.config import Config
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, among
from lfm_mlx.kernels.qk_norm_rope import qk_norm_rope
from lfm_mlx.model.linear import Merged, project, project_matrix
from lfm_mlx.model.sdpa import attend


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(width, self.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, width, bias=False)
        self.q_layernorm = nn.RMSNorm(head_dim, eps=config.norm_eps)
        self.k_layernorm = nn.RMSNorm(head_dim, eps=config.norm_eps)
        self.merged = Merged("q_proj", "k_proj", "v_proj")

    def __call__(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        mask: Mask,
        cache: KeysValues | None,
        kernels: Kernels = NO_KERNELS,
    ) -> mx.array:
        """x + the attention of norm(x). Shapes: x [B, L, D], returns [B, L, D]."""
        offset = 0 if cache is None else cache.offset
        queries, keys, values = self.before(x, norm, offset, kernels)
        return self.after(self.attend(queries, keys, values, mask, cache), x, kernels)

    def before(
        self, x: mx.array, norm: nn.RMSNorm, offset: int | mx.array, kernels: Kernels
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, H, L, Dh], keys and values [B, Hkv, L, Dh], from position `offset` on."""
        whole = self.merged.matrix(self)
        if whole is not None:
            qkv = project_matrix(x, whole, norm, kernels=kernels)
        else:
            normed = norm(x)
            parts = [self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)]
            qkv = mx.concatenate(parts, axis=-1)
        return qk_norm_rope(
            *(qkv, self.q_layernorm.weight, self.k_layernorm.weight),
            *(self.num_heads, self.num_kv_heads),
            eps=self.q_layernorm.eps,
            base=self.rope_theta,
            offset=offset,
            use_kernel=among(kernels, "qk_norm_rope"),
        )

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: Mask,
        cache: KeysValues | None,
    ) -> mx.array:
        """Store keys and values, then attend to all that are stored.

        Shapes: queries [B, H, L, Dh], keys and values [B, Hkv, L, Dh], returns [B, L, H Dh]
        """
        stored = (keys, values) if cache is None else cache.update_and_fetch(keys, values)
        batch, _, length, head_dim = queries.shape
        attended = attend(queries, *stored, cache, mask, head_dim**-0.5)
        return attended.swapaxes(1, 2).reshape(batch, length, -1)

    def after(self, attended: mx.array, x: mx.array, kernels: Kernels) -> mx.array:
        """x + out_proj(attended). Shapes: attended [B, L, H Dh], x [B, L, D], returns [B, L, D]."""
        return project(attended, self.out_proj, residual=x, kernels=kernels)
