"""Hugging Face folder → MLX folder, optionally quantized, one parameter in memory at a time.

    python -m lfm_mlx.convert --model LiquidAI/LFM2.5-8B-A1B --out lfm-4bit --bits 4

The folder opens in lfm_mlx and in stock mlx-lm. It appears under its name only when it is whole.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from lfm_mlx.checkpoint import weights
from lfm_mlx.checkpoint.folder import ITEMSIZE, TensorInfo
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.checkpoint.quantize import Quantization, Recipe, packable
from lfm_mlx.checkpoint.writer import ShardWriter, copy_kept, is_checkpoint
from lfm_mlx.cli.command import DONE
from lfm_mlx.convert.options import parser
from lfm_mlx.errors import InputError
from lfm_mlx.files import atomic_folder, free_bytes, require_vacant, write_json
from lfm_mlx.load import DTYPES, as_dtype, open_checkpoint
from lfm_mlx.model import Model

FLOATS = DTYPES.values()
# The exit code of a conversion that stored a NaN or an infinity.
NOT_FINITE = 3


@dataclass(frozen=True)
class Report:
    """Result of a conversion.

    floating: matrices left floating because of their width
    noted: why parameters hold a NaN or an infinity; the folder is of no use then
    """

    bits_per_weight: float
    nbytes: int
    seconds: float
    floating: tuple[str, ...]
    noted: tuple[str, ...] = ()


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    force: bool = False,
    check: bool = False,
    show_progress: bool = False,
) -> Report:
    """Convert the checkpoint `source` (folder, hub name or `demo`) into the folder `out`.

    revision: of a hub's name
    recipe: how matrices are packed; None leaves all floating
    dtype: of what stays floating; None keeps the checkpoint's. Expert biases stay float32.

    Raises InputError for a bad source, an occupied `out` without `force`, or a full disk; then
    `out` is as it was before.
    """
    began = time.perf_counter()
    require_vacant(Path(out), force=force, replaceable=is_checkpoint)  # before a long download
    folder = resolve(source, revision=revision)
    checkpoint, config = open_checkpoint(folder)
    if config.quantization is not None:
        raise InputError(f"{source}: is quantized already; convert the original checkpoint instead")
    require_apart(folder, Path(out))
    target = None if dtype is None else as_dtype(dtype)
    model = Model(config)
    expected = dict(tree_flatten(model.parameters()))
    parameters = weights.plan(config, checkpoint.tensors, expected)
    packings, floating = ({}, []) if recipe is None else recipe.packings(packable(model))
    by_name = {f"{path}.weight": packing for path, packing in packings.items()}
    job = Job(parameters, by_name, target, check)
    with atomic_folder(Path(out), force=force, replaceable=is_checkpoint) as partial_folder:
        require_space(partial_folder, job.nbytes(expected, checkpoint.tensors))
        writer = ShardWriter(partial_folder)
        quiet = None if show_progress else True  # None: only where stderr is a terminal
        bar = partial(tqdm, desc="convert", unit="tensor", disable=quiet)
        for name, array in job.stored(checkpoint.arrays(), bar):
            writer.add(name, array)
        total = sum(array.size for array in expected.values())
        writer.finish(total)
        copy_kept(folder, partial_folder)
        done = converted_config(checkpoint.config, source_name(source), recipe, packings, dtype)
        write_json(partial_folder / "config.json", done)
    return Report(
        bits_per_weight=8 * writer.nbytes / total,
        nbytes=writer.nbytes,
        seconds=time.perf_counter() - began,
        floating=tuple(floating),
        noted=tuple(job.noted),
    )


@dataclass(frozen=True)
class Job:
    """Conversion of a checkpoint's tensors.

    packings: by name, of parameters to be packed
    check: raise for a parameter that is not finite; else it is noted in `noted`
    """

    parameters: list[weights.Parameter]
    packings: dict[str, Quantization]
    dtype: mx.Dtype | None
    check: bool
    noted: list[str] = field(default_factory=list)

    def stored(
        self, arrays: dict[str, mx.array], progress: weights.Progress
    ) -> Iterator[tuple[str, mx.array]]:
        """Every tensor to store, computed. While one is handed out the next parameter is made."""
        # MLX computes an operation on one core of a CPU; a second stream keeps a second one busy.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        streams = [mx.new_stream(mx.cpu) for _ in range(2)] if on_cpu else [None]
        waiting: dict[str, mx.array] = {}
        for parameter, parts in weights.build_each(self.parameters, arrays, progress):
            kept = [weights.cast(parameter.name, part, self.dtype) for part in parts]
            numbers = [mx.isfinite(part).all() for part in kept if part.dtype in FLOATS]
            coming = self.pieces(parameter, kept, streams)
            # To tell a cast that overflows from a fault of the source.
            before = parts if kept[0].dtype != parts[0].dtype else []
            dtype = kept[0].dtype
            del parts, kept
            mx.async_eval(numbers, list(coming.values()))
            mx.eval(list(waiting.values()))
            yield from waiting.items()
            if not all(finite.item() for finite in numbers):
                self.note(weights.not_numbers(parameter.name, before, dtype))
            del before
            waiting = coming
        mx.eval(list(waiting.values()))
        yield from waiting.items()

    def note(self, fault: str) -> None:
        """Note what is wrong with a parameter, or raise InputError if `check` is set."""
        if self.check:
            raise InputError(fault)
        self.noted.append(fault)

    def pieces(
        self,
        parameter: weights.Parameter,
        parts: list[mx.array],
        streams: Sequence[mx.Stream | None],
    ) -> dict[str, mx.array]:
        """The tensors that store one parameter, lazy.

        Experts are packed one by one, which is the same as together: rows are independent. So the
        reading of one goes on while another is packed, and no stack of floats takes memory.
        """
        name, packing = parameter.name, self.packings.get(parameter.name)
        if packing is None:
            return {name: parameter.join(parts)}
        packed = [
            packing.pack(part, stream) for part, stream in zip(parts, cycle(streams), strict=False)
        ]
        stem = name.removesuffix("weight")
        return {stem + key: parameter.join([piece[key] for piece in packed]) for key in packed[0]}

    def nbytes(self, expected: Mapping[str, mx.array], tensors: Mapping[str, TensorInfo]) -> int:
        """Bytes of the tensors to store."""
        total = 0
        for parameter in self.parameters:
            size = expected[parameter.name].size
            source = tensors[parameter.sources[0]]
            itemsize = ITEMSIZE[source.dtype] if self.dtype is None else self.dtype.size
            packing = self.packings.get(parameter.name)
            total += packing.nbytes(size, itemsize) if packing is not None else size * itemsize
        return total


def require_apart(source: Path, out: Path) -> None:
    """Raise InputError if writing `out` would replace the source or a folder that holds it."""
    source, out = source.resolve(), out.expanduser().resolve()
    if out == source or out in source.parents:
        raise InputError(f"--out {out}: holds the source {source}; give another name")


def require_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk cannot hold the result."""
    there = free_bytes(folder)
    if needed > there:
        raise InputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB will be written and {there / 1e9:.1f} GB are "
            "free; free some disk space or choose another --out"
        )


def source_name(source: str | Path) -> str:
    """The source named in config.json: the hub's name, or a local folder's last part."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.exists() else str(source)


def converted_config(
    config: dict[str, Any], source: str, recipe: Recipe | None,
    packings: Mapping[str, Quantization], dtype: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The source's config.json, with what was done to it. packings: by path."""
    done = {"tool": f"lfm_mlx {version('lfm_mlx')}", "source": source}
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    if dtype is not None:
        result |= {"dtype": dtype}
        result.pop("torch_dtype", None)
    if recipe is not None:
        exceptions = {path: p for path, p in packings.items() if p != recipe.default}
        settings = asdict(recipe.default) | {path: asdict(p) for path, p in exceptions.items()}
        result |= {"quantization": settings, "quantization_config": settings}
    return result | {"conversion": done}


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe that --bits, --group-size and --mode ask for; None if none of them is given."""
    if args.bits is None and args.group_size is None and args.mode is None:
        return None
    return Recipe(Quantization.of(args.mode or "affine", args.bits, args.group_size))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    report = convert(
        args.model, args.out, revision=args.revision, recipe=recipe_of(args), dtype=args.dtype,
        force=args.force, check=args.check, show_progress=True,
    )  # fmt: skip
    for path in report.floating:
        print(
            f"left floating, its width is not a multiple of the group size: {path}", file=sys.stderr
        )
    for line in report.noted:
        print(line, file=sys.stderr)
    print(
        f"{args.out}: {report.bits_per_weight:.3f} bits per weight, {report.nbytes / 1e9:.3f} GB, "
        f"{report.seconds:.1f} s"
    )
    return NOT_FINITE if report.noted else DONE
