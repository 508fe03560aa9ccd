"""The gated short convolution layer: project to B, C and x, convolve, project back."""

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.config import Config
from lfm_mlx.conv_window import KEPT_COLUMNS, ConvWindow
from lfm_mlx.kernels.short_conv import short_conv


class ShortConv(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width, bias = config.hidden_size, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = nn.Conv1d(width, width, config.conv_L_cache, groups=width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def __call__(self, x: mx.array, cache: ConvWindow | None) -> mx.array:
        """Shapes: x [B, L, D], returns [B, L, D]."""
        taps = self.conv.weight.squeeze(-1)  # [D, W, 1] -> [D, W]
        bias = self.conv.bias if "bias" in self.conv else None
        bcx = self.in_proj(x)
        if cache is None:
            return self.out_proj(short_conv(bcx, taps, bias)[0])
        start, stop = cache.bounds()
        y, window = short_conv(bcx, taps, bias, cache.window, start, stop)
        cache.advance(window, x.shape[1], last_columns(bcx) if x.shape[1] > 1 else None)
        return self.out_proj(y)


def last_columns(bcx: mx.array) -> mx.array:
    """The last of B * x, [B, at most KEPT_COLUMNS, D], from in_proj's output [B, L, 3D]."""
    gate_in, _, x = mx.split(bcx[:, -KEPT_COLUMNS:], 3, axis=-1)
    return gate_in * x
