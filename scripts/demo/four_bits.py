"""Weights as a conversion to 4 bits leaves them, so that training can prepare for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_quantized(name: str) -> bool:
    """Say whether a conversion to 4 bits touches this parameter: matrices but the router's."""
    return name.endswith(("proj", "proj.weight", "w1.weight", "w2.weight", "w3.weight")) or (
        "embed_tokens" in name
    )


def through_bits(weight: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """Quantize groups of a matrix to `bits` affinely, as MLX does, and return what comes back."""
    groups = weight.detach().reshape(*weight.shape[:-1], -1, group).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp_min(1e-7)
    low_is_edge = low.abs() > high.abs()
    scale, edge = torch.where(low_is_edge, scale, -scale), torch.where(low_is_edge, low, high)
    at_edge = (edge / scale).round()
    usable = at_edge != 0
    scale = torch.where(usable, edge / at_edge.where(usable, torch.ones_like(edge)), scale)
    bias = torch.where(usable, edge, torch.zeros_like(edge))
    codes = ((groups - bias) / scale).round().clamp(0, steps)
    return (codes * scale + bias).reshape(weight.shape).to(weight.dtype)


@contextmanager
def quantized_weights(model: nn.Module) -> Iterator[None]:
    """Let the matrices be their 4-bit images for a while; gradients reach the real ones."""
    matrices = {n: p for n, p in model.named_parameters() if is_quantized(n)}
    kept = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.copy_(through_bits(matrix))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.copy_(kept[name])
