"""The model that the command line names, and the sampling it asks for."""

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lfm_mlx import device
from lfm_mlx.checkpoint.folder import Checkpoint
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.model_options import day
from lfm_mlx.config import Config
from lfm_mlx.engine.sample import Sampling
from lfm_mlx.load import as_dtype, load_model, load_tokenizer, loaded_bytes
from lfm_mlx.model import Model

# The bar of `load_model`, on a terminal.
LOADING = partial(tqdm, desc="load", unit="tensor", disable=None, leave=False)


class SelectedModel:
    """The model that the options name: everything but its weights is read at once.

    Raises InputError for what is not there, or not a model of this family.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.date = day(args.date)
        self.folder = resolve(args.model, revision=args.revision, judge=self.judge)
        self.checkpoint = Checkpoint(self.folder)
        self.config = Config.from_dict(self.checkpoint.config)
        self.sampling = sampling_of(args, self.checkpoint)
        self.tokenizer = load_tokenizer(self.folder)

    def judge(self, folder: Path, weight_bytes: int) -> None:
        """Raise InputError, before weights are downloaded, for what could not be loaded."""
        Config.from_folder(folder)
        if not self.args.force:
            device.require_room(weight_bytes, cache_bytes=0, context=0)

    def require_room(
        self, context: int, cache_bytes: Callable[[int, int], int] | None = None
    ) -> None:
        """Raise InputError if weights and a cache of `context` tokens cannot fit, unless forced.

        cache_bytes: of so many tokens at so many bytes a value; the config's if None
        """
        if self.args.force:
            return
        target = as_dtype(self.args.dtype)
        itemsize = target.size if target is not None else 2
        weights = loaded_bytes(self.config, self.checkpoint.tensors, target)
        measured = cache_bytes or self.config.cache_bytes
        device.require_room(weights, measured(context, itemsize), context)

    def load(self) -> Model:
        """The model, with a progress bar on a terminal."""
        return load_model(
            self.folder, dtype=self.args.dtype, check=self.args.check, progress=LOADING
        )


def sampling_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Sampling:
    """The checkpoint's sampling with what the command line changes."""
    defaults = Sampling.of_checkpoint(checkpoint.generation_config)
    given = {field.name: getattr(args, field.name, None) for field in fields(Sampling)}
    return replace(defaults, **{key: value for key, value in given.items() if value is not None})
