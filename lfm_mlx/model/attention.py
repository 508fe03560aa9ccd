"""Grouped-query attention: queries and keys are normed per head before they are rotated."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.config import Config
from lfm_mlx.keys_values import attend


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

    def __call__(self, x: mx.array, mask: Any, cache: Any | None) -> mx.array:
        """Shapes: x [B, L, D], returns [B, L, D]."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.q_layernorm.weight.shape[0])  # [B, L, H, Dh]
        queries = self.q_layernorm(self.q_proj(x).reshape(heads)).swapaxes(1, 2)  # [B, H, L, Dh]
        keys = self.k_layernorm(self.k_proj(x).reshape(heads)).swapaxes(1, 2)
        values = self.v_proj(x).reshape(heads).swapaxes(1, 2)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rotate(queries, offset), self.rotate(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        scale = self.q_layernorm.weight.shape[0] ** -0.5
        attended = attend(queries, keys, values, cache, mask, scale)
        return self.out_proj(attended.swapaxes(1, 2).reshape(batch, length, -1))

    def rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """RoPE over the whole head in halves, from position `offset` (one, or one a row)."""
        width = x.shape[-1]
        return mx.fast.rope(
            x, width, traditional=False, base=self.rope_theta, scale=1.0, offset=offset
        )
