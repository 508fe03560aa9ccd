"""Limits for MLX's command buffers, set before its first work on the GPU.

MLX ends a command buffer when its launches, or the elements of the distinct arrays they touch,
exceed a limit. By its own (40 launches, 40 or 50 Mi elements) the experts of every sparse layer end
one, and a token of the 8.5 B model is cut into 24; published figures are about 20 µs for each. Ours
leave it whole but for three cuts. What a buffer holds stays in memory until it ends, so a prompt is
evaluated every few layers (`model/decoder.py`).

LFM_MLX_COMMAND_BUFFERS=large|mlx says which limits a process gets; MLX's own variables go before.
"""

import contextlib
import os
import sys

from lfm_mlx.errors import InputError

VARIABLE = "LFM_MLX_COMMAND_BUFFERS"
# Launches, and Mi elements: MLX's name for the second says MB.
MAX_LAUNCHES, MAX_MEBI_ELEMENTS = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
LARGE = {MAX_LAUNCHES: 1000, MAX_MEBI_ELEMENTS: 400}
LIMITS: dict[str, dict[str, int]] = {"large": LARGE, "mlx": {}}


def set_limits() -> None:
    """Set MLX's limits in the environment, unless somebody has; it reads them once, at first use.

    Raises InputError for a setting that is none.
    """
    setting = os.environ.get(VARIABLE, "large")
    if setting not in LIMITS:
        raise InputError(f"{VARIABLE} is {setting!r}; expected {' or '.join(LIMITS)}")
    if sys.platform != "darwin" or {MAX_LAUNCHES, MAX_MEBI_ELEMENTS} & os.environ.keys():
        return
    os.environ.update({name: str(limit) for name, limit in LIMITS[setting].items()})


# On import, which `lfm_mlx` does before it imports anything that could compute; `load` says what is
# wrong with a setting.
with contextlib.suppress(InputError):
    set_limits()
