"""LFM2.5-8B-A1B for Apple's MLX.

    model, tokenizer = lfm_mlx.load("demo")
    logits = model(tokens)

Shapes everywhere: B batch, L tokens, D hidden width, H heads, Dh head width, E experts, K experts
per token, F expert width, W convolution width, V vocabulary.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lfm_mlx import command_buffers as command_buffers

if TYPE_CHECKING:
    from lfm_mlx.config import Config
    from lfm_mlx.errors import InputError
    from lfm_mlx.load import load, load_model
    from lfm_mlx.model import Model

    __version__: str

__all__ = ["Config", "InputError", "Model", "__version__", "load", "load_model"]
# Each name's module, imported when the name is first asked for: MLX and the tokenizer's library
# take a second, which `lfm-mlx --help` does not have to wait for.
HOMES = {
    "Config": "config", "InputError": "errors", "Model": "model", "load": "load",
    "load_model": "load",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lfm_mlx")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"lfm_mlx.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class Face(ModuleType):
    """The package's module: the function `load` stands before the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system hangs each module that was imported on its package.
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Face
