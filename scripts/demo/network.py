"""The demo's network: Hugging Face's own LFM2-MoE in small, and the balance of its experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedTokenizerFast


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the demo's config.json: LFM2.5-8B-A1B's keys and layer pattern, small numbers."""
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "bos_token_id": tokenizer.bos_token_id,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "layer_types": ["full_attention" if i in (2, 6) else "conv" for i in range(8)],
        "max_position_embeddings": 4096,
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 128,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_dense_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_expert_bias": True,
        "vocab_size": len(tokenizer),
    }


def new_model(config: dict[str, Any]) -> Lfm2MoeForCausalLM:
    """Build the model in float32, with first weights that suit its small width.

    Embeddings and the taps of the convolutions start large: who a token is, and what its left
    neighbour is, must reach the first attention layer for copying to be learnt at all.
    """
    built = Lfm2MoeConfig(**{**config, "initializer_range": 0.06, "dtype": "float32"})
    built.dtype = torch.float32
    model = Lfm2MoeForCausalLM._from_config(built, experts_implementation="grouped_mm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv.conv.weight"):
                parameter.normal_(std=0.5)
            elif "embed_tokens" in name:
                parameter.mul_(4)
            elif name.endswith(("out_proj.weight", "w2.weight", "down_proj")):
                parameter.mul_(0.5)
    return model


class Balance:
    """Counts which experts the routers choose, and nudges `expert_bias` towards equal use."""

    def __init__(self, model: Lfm2MoeForCausalLM) -> None:
        layers = model.model.layers[model.config.num_dense_layers :]
        self.blocks = [layer.feed_forward for layer in layers]
        self.live: Tensor | None = None
        self.loads = torch.zeros(len(self.blocks), model.config.num_experts)
        self.hooks = [
            block.gate.register_forward_hook(partial(self._count, row))
            for row, block in enumerate(self.blocks)
        ]

    def _count(self, row: int, router: nn.Module, inputs: Any, outputs: Any) -> None:
        chosen = outputs[2]
        if self.live is not None:
            chosen = chosen[self.live]
        self.loads[row] += torch.bincount(chosen.flatten(), minlength=self.loads.shape[1])

    def shares(self) -> Tensor:
        """Return each expert's share of its layer's choices since the last call, [layers, E]."""
        shares = self.loads / self.loads.sum(-1, keepdim=True).clamp_min(1)
        self.loads.zero_()
        return shares

    def close(self) -> None:
        """Stop counting."""
        for hook in self.hooks:
            hook.remove()

    def step(self, rate: float) -> None:
        """Raise the bias of experts chosen too rarely and lower the others'; keep the mean at 0."""
        shares = self.shares()
        for block, share in zip(self.blocks, shares, strict=True):
            bias = block.expert_bias
            bias += rate * torch.sign(share.mean() - share)
            bias -= bias.mean()
