"""The seam to mlx-lm: its server, generate, lora, convert and the rest run this package's model.

    python -m lfm_mlx.mlx_lm server --model demo --port 8080

mlx-lm finds a model's classes by importing `mlx_lm.models.<model_type>`, and the class of a saved
cache entry by its name in `mlx_lm.models.cache`. `register` puts ours in those places for this
process, `unregister` puts back what was there. Nothing in mlx-lm is modified.
"""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import cli, models, utils
from mlx_lm.models import cache

from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cache.keys_values import GrowingKVCache, GrowingQuantizedKVCache
from lfm_mlx.checkpoint import quantize, weights
from lfm_mlx.checkpoint.folder import Checkpoint, TensorInfo
from lfm_mlx.checkpoint.hub import DEMO, resolve
from lfm_mlx.cli.command import BAD_INPUT, DONE, run
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import read_json
from lfm_mlx.model import Model
from lfm_mlx.model.experts import SparseFeedForward

MODEL_TYPES = ("lfm2_moe", "lfm2")
CACHE_ENTRIES = (ConvWindow, GrowingKVCache, GrowingQuantizedKVCache)
# Builds its language model from mlx-lm's own lfm2, which must be what it finds.
STOCK_USERS = ("lfm2-vl",)
# The options of mlx-lm's commands that name a model.
MODEL_OPTIONS = ("--model", "--hf-path", "--draft-model")
USAGE = """usage: lfm_mlx.mlx_lm COMMAND …

Runs a command of mlx-lm on this package's model: server, generate, chat, cache_prompt, lora, fuse,
convert, and whichever else `mlx_lm --help` names. COMMAND --help tells its options; --model takes a
folder, a hub name, or demo."""


class ModelArgs(Config):
    """mlx-lm's arguments of a model: the keys of config.json as keywords, and the Config of them.

    A key that Config has by another name, such as block_ff_dim, can be read as it was given.
    """

    def __init__(self, **values: Any):
        config = Config.from_dict(values)
        for field in fields(Config):
            object.__setattr__(self, field.name, getattr(config, field.name))
        object.__setattr__(self, "given", values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelArgs":
        return cls(**values)

    @property
    def full_attn_idxs(self) -> list[int]:
        return [index for index in range(self.num_hidden_layers) if self.is_attention(index)]

    @property
    def block_ff_dim(self) -> int:
        """The width before `block_auto_adjust_ff_dim` has its way."""
        return self.given.get("block_ff_dim") or self.given["intermediate_size"]

    def __getattr__(self, name: str) -> Any:
        if name != "given" and name in self.__dict__.get("given", ()):
            return self.given[name]
        raise AttributeError(name)


class RouterGate(nn.Linear):
    """A router's gate that no recipe of mlx-lm packs: it seems not to be able to be quantized."""

    @property
    def to_quantized(self) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AttributeError("to_quantized")


class HookedModel(Model):
    """Our Model with the hooks that mlx-lm's load and convert call."""

    def __init__(self, config: Config):
        super().__init__(config)
        for layer in self.layers:
            if isinstance(layer.feed_forward, SparseFeedForward):
                layer.feed_forward.gate = retyped(layer.feed_forward.gate, RouterGate)

    def sanitize(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return a checkpoint's tensors, in any spelling, as this model's parameters."""
        arrays = dict(tensors)
        infos = {name: TensorInfo("", array.shape, Path()) for name, array in arrays.items()}
        infos = weights.without_tied_head(self.config, infos, arrays)
        built = {p.name: p.build(arrays) for p in weights.assignments(self.config, infos)}
        for index, layer in enumerate(self.layers):
            if f"model.layers.{index}.feed_forward.gate.scales" in built:
                # Packed by another program: mlx-lm's load is to make it what it is stored as.
                layer.feed_forward.gate = retyped(layer.feed_forward.gate, nn.Linear)
        return {name: weights.cast(name, array, None) for name, array in built.items()}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Return which modules mlx-lm's convert packs."""
        never = re.compile("|".join(quantize.NEVER))
        return lambda path, module: never.fullmatch(path) is None

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Return which parameters mlx-lm's convert casts to the dtype asked for."""
        return lambda name: weights.FLOAT32.fullmatch(name) is None


def retyped(linear: Any, kind: type[nn.Linear]) -> nn.Linear:
    """A module of this kind with the weight of `linear`."""
    made = kind(1, 1, bias=False)
    made.weight = linear["weight"]
    return made


class Seam(ModuleType):
    """A module that mlx-lm imports in place of its own one of a model type."""

    Model = HookedModel
    ModelArgs = ModelArgs

    def __init__(self, name: str, stock: ModuleType):
        super().__init__(name, "lfm_mlx's classes in the place of mlx-lm's.")
        self.stock = stock


def register() -> None:
    """Let mlx-lm use our model for `lfm2_moe` and `lfm2`; a second call changes nothing."""
    for name in STOCK_USERS:
        import_module(f"mlx_lm.models.{name}")
    for name in MODEL_TYPES:
        stock = import_module(f"mlx_lm.models.{name}")
        if not is_ours(stock):
            place(name, Seam(stock.__name__, stock))
    cache.__dict__.update({entry.__name__: entry for entry in CACHE_ENTRIES})


def unregister() -> None:
    """Give mlx-lm its own classes back; without `register` before it, changes nothing."""
    for name in MODEL_TYPES:
        module = sys.modules.get(f"mlx_lm.models.{name}")
        if module is not None and is_ours(module):
            place(name, cast(Seam, module).stock)
    for entry in CACHE_ENTRIES:
        cache.__dict__.pop(entry.__name__, None)


def is_ours(module: ModuleType) -> bool:
    # Not by Seam's identity: `python -m lfm_mlx.mlx_lm` has a second one, in __main__.
    return issubclass(getattr(module, "Model", object), Model)


def place(name: str, module: ModuleType) -> None:
    """Make `module` what both spellings of an import of `mlx_lm.models.<name>` find."""
    sys.modules[f"mlx_lm.models.{name}"] = module
    setattr(models, name, module)


def main() -> int:
    """Run one of mlx-lm's commands, named and given its arguments in sys.argv."""
    if len(sys.argv) < 2:
        print(USAGE, file=sys.stderr)
        return BAD_INPUT
    name = sys.argv[1]
    if name in ("-h", "--help"):
        print(USAGE)
        return DONE
    register()
    sys.argv = [f"lfm_mlx.mlx_lm {name}", name, *known_models(sys.argv[2:])]
    # A service manager's request to stop ends the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if name == "server":
        end_with_its_generator()
    try:
        cli.main()
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name} needs the package {error.name}, which is not installed"
        ) from error
    except BrokenPipeError:
        raise
    except Exception as error:
        raise in_one_line(error) from error
    return DONE


def in_one_line(error: Exception) -> InputError:
    """The one line of what mlx-lm raised: a bad option, a missing adapter, a folder in the way.

    An exception that is no sign of wrong use names its type; LFM_MLX_TRACEBACK=1 prints where.
    """
    if os.environ.get("LFM_MLX_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return InputError("the port is taken; give another --port")
    if isinstance(error, (ValueError, OSError)):
        return InputError(one_line(error))
    return InputError(
        f"mlx-lm stopped at {type(error).__name__}: {one_line(error)}; LFM_MLX_TRACEBACK=1 tells "
        "where"
    )


def end_with_its_generator() -> None:
    """Let the server's process end when the thread does that loads the model and answers with it.

    mlx-lm's server would log a traceback and refuse every request for as long as it lives.
    """
    server = import_module("mlx_lm.server")

    class EndingGenerator(server.ResponseGenerator):
        def _run_generate(self) -> None:
            try:
                self._generate()
            except Exception as error:
                print(f"error: {in_one_line(error)}", file=sys.stderr, flush=True)
                os._exit(BAD_INPUT)

    server.__dict__["ResponseGenerator"] = EndingGenerator


def known_models(arguments: list[str]) -> list[str]:
    """`arguments`, with each model named in them checked, and `demo` replaced by its folder."""
    checked: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if before in MODEL_OPTIONS:
            argument = model_name(argument)
        elif equals and option in MODEL_OPTIONS:
            argument = f"{option}={model_name(value)}"
        checked.append(argument)
    return checked


def model_name(model: str) -> str:
    """The folder or hub name that mlx-lm knows `model` by.

    Raises InputError if it names no checkpoint, or one of this family that cannot be run: the
    server would log a traceback and go on without a model.
    """
    folder = resolve(model, judge=require_known)
    require_known(folder)
    checkpoint = Checkpoint(folder)
    if checkpoint.config.get("model_type") in MODEL_TYPES:
        _ = checkpoint.tensors
    # mlx-lm knows no revisions: it is given the folder of one.
    plain = model != DEMO and not Path(model).expanduser().is_dir() and "@" not in model
    return model if plain else str(folder)


def require_known(folder: Path, _: int = 0) -> None:
    """Raise InputError unless the model is ours to run, or of another type that mlx-lm has."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in MODEL_TYPES:
        Config.from_dict(config)
        return
    try:
        utils._get_classes(config)
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder}: model_type is {kind!r}, which mlx-lm lacks") from error


def command() -> int:
    serving = sys.argv[1:2] == ["server"]
    code = run(main, "lfm_mlx.mlx_lm")
    if serving and "mlx_lm.server" in sys.modules:
        leave(code)
    return code


def leave(code: int) -> NoReturn:
    """End the process at once, as far as answers that are on their way out allow.

    Python's own shutdown waits for ever for the thread of a server that could not listen, and MLX
    aborts in it when the thread of one that was stopped amid a request has just ended.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=1.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(command())
