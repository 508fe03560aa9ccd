"""The gated short convolution: y = out_proj(C * conv(B * x)), with B, C, x = split(in_proj(x)).

Depthwise and causal, without any activation.
"""

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.cache.conv_window import KEPT_COLUMNS, ConvWindow
from lfm_mlx.config import Config
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, among
from lfm_mlx.kernels.short_conv import short_conv
from lfm_mlx.model.linear import project


class ShortConv(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width, bias = config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = nn.Conv1d(width, width, config.conv_L_cache, groups=width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def __call__(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        cache: ConvWindow | None,
        kernels: Kernels = NO_KERNELS,
    ) -> mx.array:
        """x + the convolution of norm(x). Shapes: x [B, L, D], returns [B, L, D]."""
        bcx = project(x, self.in_proj, norm, kernels=kernels)
        if cache is None:
            return self.after(self.convolve(bcx, kernels=kernels)[0], x, kernels)
        start, stop = cache.bounds()
        y, window = self.convolve(bcx, cache.window, start, stop, kernels)
        cache.advance(window, x.shape[1], last_columns(bcx) if x.shape[1] > 1 else None)
        return self.after(y, x, kernels)

    def step(
        self, x: mx.array, norm: nn.RMSNorm, window: mx.array, kernels: Kernels
    ) -> tuple[mx.array, mx.array]:
        """The layer for one token a row, as a pure function of x and window.

        Shapes: x [B, 1, D], window [B, W-1, D], returns x + conv(norm(x)) and the next window
        """
        bcx = project(x, self.in_proj, norm, kernels=kernels)
        y, window = self.convolve(bcx, window, kernels=kernels)
        return self.after(y, x, kernels), window

    def convolve(
        self,
        bcx: mx.array,
        window: mx.array | None = None,
        start: mx.array | None = None,
        stop: mx.array | None = None,
        kernels: Kernels = NO_KERNELS,
    ) -> tuple[mx.array, mx.array]:
        """C * conv(B * x) and the window after it; arguments as in `kernels.short_conv`.

        Shapes: bcx [B, L, 3D], window [B, W-1, D], returns [B, L, D] and [B, W-1, D]
        """
        taps = self.conv.weight.squeeze(-1)  # [D, W, 1] -> [D, W]
        use = among(kernels, "short_conv")
        return short_conv(bcx, taps, self.conv.get("bias"), window, start, stop, use_kernel=use)

    def after(self, y: mx.array, x: mx.array, kernels: Kernels) -> mx.array:
        """x + out_proj(y). Shapes: y and x [B, L, D], returns [B, L, D]."""
        return project(y, self.out_proj, residual=x, kernels=kernels)


def last_columns(bcx: mx.array) -> mx.array:
    """The last of B * x, [B, at most KEPT_COLUMNS, D], from in_proj's output [B, L, 3D]."""
    gate_in, _, x = mx.split(bcx[:, -KEPT_COLUMNS:], 3, axis=-1)
    return gate_in * x
