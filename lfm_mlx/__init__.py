"""LFM2.5-8B-A1B for Apple's MLX.

    model, tokenizer = lfm_mlx.load("demo")
    logits = model(tokens)

Shapes everywhere: B batch, L tokens, D hidden width, H heads, Dh head width, E experts, K experts
per token, F expert width, W convolution width, V vocabulary.
"""

from lfm_mlx import command_buffers as command_buffers
from lfm_mlx.config import Config
from lfm_mlx.load import load
from lfm_mlx.model import Model

__all__ = ["Config", "Model", "load"]
