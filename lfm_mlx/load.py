"""Folder → model and tokenizer: where checkpoint, config, weights, model and quantization meet.

    model, tokenizer = lfm_mlx.load("demo")

Every tensor of the checkpoint is used and every parameter filled, or loading fails with a list.
"""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_wrapped

from lfm_mlx import device
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.checkpoint import quantize, weights
from lfm_mlx.checkpoint.folder import ITEMSIZE, Checkpoint, TensorInfo, is_pointer, listing
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.command_buffers import set_limits
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.kernels.metal import UseKernels
from lfm_mlx.model import Model

log = logging.getLogger("lfm_mlx")
# The experts' tensors, in every spelling.
EXPERTS = re.compile(r"\.feed_forward\.(experts|switch_mlp)\.")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(
    path_or_repo: str | Path, *, revision: str | None = None,
    dtype: str | mx.Dtype | None = None, check: bool = False,
    use_kernels: UseKernels = None, progress: weights.Progress = iter,
) -> tuple[Model, Tokenizer]:  # fmt: skip
    """The model and its tokenizer, from a folder, a hub name, or `demo`.

    revision: a hub repository's branch, tag or commit; `user/name@revision` says the same
    dtype: of activations and floating weights; None keeps the checkpoint's on a GPU and is float32
        on the CPU, where MLX computes half precision many times slower
    check: read every weight for NaN and infinity first
    use_kernels: True, False, or names: which operations run their Metal kernels, where Metal is
        there; None takes what the environment's LFM_MLX_KERNELS says, and all without it
    progress: wraps the list of parameters that are read

    Raises InputError for whatever is wrong with the name or the folder.
    """
    folder = resolve(path_or_repo, revision=revision)
    model = load_model(folder, dtype=dtype, check=check, use_kernels=use_kernels, progress=progress)
    return model, load_tokenizer(folder)


def load_model(
    folder: str | Path, *, dtype: str | mx.Dtype | None = None, check: bool = False,
    use_kernels: UseKernels = None, progress: weights.Progress = iter,
) -> Model:  # fmt: skip
    """The model of a checkpoint folder, weights in place, quantized or not; options as `load`."""
    set_limits()
    checkpoint, config = open_checkpoint(folder)
    model = Model(config, use_kernels)
    tensors, arrays = checkpoint_tensors(checkpoint, config)
    pack_as_stored(model, config, tensors)
    expected = dict(tree_flatten(model.parameters()))
    parameters = weights.plan(config, tensors, expected)
    target = as_dtype(dtype)
    kept = stored_as_is(config, tensors, target)
    filled: list[tuple[str, mx.array]] = []
    for parameter, parts in weights.build_each(parameters, arrays, progress):
        keep = kept and ".switch_mlp." in parameter.name
        array = weights.cast_checked(
            parameter.name, parameter.join(parts), None if keep else target
        )
        del parts
        mx.eval(array)
        filled.append((parameter.name, array))
    if check:
        check_values(dict(filled))
    model.load_weights(filled)
    model.eval()
    return model


def open_checkpoint(folder: str | Path) -> tuple[Checkpoint, Config]:
    """The folder's files and its Config; keys of config.json that are not known are reported."""
    checkpoint = Checkpoint(folder)
    config = Config.from_dict(checkpoint.config)
    if config.unknown_keys:
        log.warning("config.json: keys without effect here: %s", listing([*config.unknown_keys]))
    return checkpoint, config


def checkpoint_tensors(
    checkpoint: Checkpoint, config: Config
) -> tuple[dict[str, TensorInfo], dict[str, mx.array]]:
    """The tensors that make the model, and their lazy arrays."""
    arrays = checkpoint.arrays()
    return weights.without_tied_head(config, checkpoint.tensors, arrays), arrays


def pack_as_stored(
    model: Model, config: Config, tensors: dict[str, TensorInfo]
) -> dict[str, quantize.Quantization]:
    """Replace the modules that are stored packed by quantized ones; returns how, by path."""
    infos = {p.name: tensors[p.sources[0]] for p in weights.assignments(config, tensors)}
    stored = {
        path: quantize.Stored(infos[f"{path}.weight"], scales)
        for name, scales in infos.items()
        if (path := name.removesuffix(".scales")) != name and f"{path}.weight" in infos
    }
    own_name = partial(weights.own_name, config)
    return quantize.pack_modules(model, config.quantization, stored, own_name)


def check_values(arrays: dict[str, mx.array]) -> None:
    """Raise InputError that lists the parameters with a NaN or an infinity."""
    bad = weights.bad_values(arrays, sorted(arrays))
    if bad:
        raise InputError(f"weights with NaN or infinity: {listing(bad)}; {weights.HEAL}")


def as_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """The dtype weights are cast to: the one asked for, by default float32 on the CPU."""
    if dtype is None:
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return mx.float32 if on_cpu else None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, mx.Dtype) or found not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    return found


def loaded_bytes(config: Config, tensors: dict[str, TensorInfo], dtype: mx.Dtype | None) -> int:
    """Bytes of the weights in memory once floating ones are cast to `dtype`."""
    kept = stored_as_is(config, tensors, dtype)
    return sum(
        info.nbytes if kept and EXPERTS.search(name) else cast_bytes(info, dtype)
        for name, info in tensors.items()
    )


def stored_as_is(config: Config, tensors: dict[str, TensorInfo], dtype: mx.Dtype | None) -> bool:
    """Whether expert weights keep the checkpoint's dtype, and are widened when they are read.

    So it is when all weights in `dtype` would fill more than half of the memory: an unquantized
    8.5 B checkpoint in float32 takes 34 GB, in bfloat16 17 GB.
    """
    # A Dtype cannot be compared with None.
    if dtype is None or dtype != mx.float32 or config.quantization is not None:
        return False
    return sum(cast_bytes(info, dtype) for info in tensors.values()) > device.device_bytes() / 2


def cast_bytes(info: TensorInfo, dtype: mx.Dtype | None) -> int:
    if dtype is None or info.dtype not in weights.FLOATS:
        return info.nbytes
    return info.nbytes // ITEMSIZE[info.dtype] * dtype.size


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The folder's tokenizer in mlx-lm's wrapper, which streams text and knows every stop token.

    Raises InputError if there is none or it cannot be read.
    """
    checkpoint = Checkpoint(folder)
    if not (checkpoint.folder / "tokenizer.json").exists():
        raise InputError(f"{folder}: no tokenizer.json; take it from the model's own repository")
    if is_pointer(checkpoint.folder / "tokenizer.json"):
        raise InputError(f"{folder}/tokenizer.json: is a git-lfs pointer; run `git lfs pull` there")
    try:
        wrapped: Any = load_wrapped(checkpoint.folder, eos_token_ids=list(stop_ids(checkpoint)))
        return wrapped
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise InputError(f"{folder}: the tokenizer cannot be read ({one_line(error)})") from error


def stop_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The ids that end a turn, from generation_config.json and config.json together."""
    found: dict[int, Any] = {}
    for source in (checkpoint.generation_config, checkpoint.config):
        ids = source.get("eos_token_id")
        found |= dict.fromkeys(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(found)


load.load_model = load_model  # pyright: ignore[reportFunctionMemberAccess] - lfm_mlx.load is both
