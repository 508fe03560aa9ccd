"""Hugging Face folder → MLX folder, optionally quantized, one parameter in memory at a time.

    python -m lfm_mlx.convert --model LiquidAI/LFM2.5-8B-A1B --out lfm-4bit --bits 4

The folder opens in lfm_mlx and in stock mlx-lm. It appears under its name only when it is whole.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from lfm_mlx import weights
from lfm_mlx.checkpoint import (
    Checkpoint,
    ShardWriter,
    atomic_folder,
    copy_kept,
    free_bytes,
    resolve,
    write_json,
)
from lfm_mlx.command import InputError, run
from lfm_mlx.config import Config
from lfm_mlx.load import DTYPES, check_values
from lfm_mlx.model import Model
from lfm_mlx.quantize import MODES, Packing, Recipe, packable


@dataclass(frozen=True)
class Report:
    """What a conversion made. `floating` lists matrices left floating because of their width."""

    bits_per_weight: float
    nbytes: int
    seconds: float
    floating: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    force: bool = False,
    check: bool = False,
    show_progress: bool = False,
) -> Report:
    """Convert the checkpoint `source` (folder, hub name or `demo`) into the folder `out`.

    recipe: how matrices are packed; None leaves all floating
    dtype: of what stays floating; None keeps the checkpoint's. Expert biases stay float32.

    Raises InputError for a bad source, an occupied `out` without `force`, or a full disk; then
    `out` is as it was before.
    """
    began = time.perf_counter()
    folder = resolve(source)
    checkpoint = Checkpoint(folder)
    config = Config.from_dict(checkpoint.config)
    if config.quantization is not None:
        raise InputError(f"{source}: is quantized already; convert the original checkpoint instead")
    model = Model(config)
    expected = dict(tree_flatten(model.parameters()))
    parameters = weights.plan(config, checkpoint.tensors, expected)
    widths = {f"{path}.weight": expected[f"{path}.weight"].shape[-1] for path in packable(model)}
    target = None if dtype is None else DTYPES[dtype]
    floating: list[str] = []
    with atomic_folder(Path(out), force=force) as partial_folder:
        require_space(partial_folder, checkpoint.nbytes, recipe)
        writer = ShardWriter(partial_folder)
        quiet = None if show_progress else True  # None: only where stderr is a terminal
        bar = partial(tqdm, desc="convert", unit="tensor", disable=quiet)
        for parameter, built in weights.build_each(parameters, checkpoint.arrays(), bar):
            array = weights.cast(parameter.name, built, target)
            if check:
                check_values({parameter.name: array})
            packing = None
            if recipe is not None and parameter.name in widths:
                path = parameter.name.removesuffix(".weight")
                packing = recipe.packing(path, widths[parameter.name])
                if packing is None and not path.endswith(".gate"):
                    floating.append(path)
            for name, part in pieces(parameter.name, array, packing):
                writer.add(weights.published_name(config, name), part)
        total = sum(array.size for array in expected.values())
        writer.finish(total)
        copy_kept(folder, partial_folder)
        write_json(
            partial_folder / "config.json",
            converted_config(checkpoint.config, source_name(source), recipe, dtype),
        )
    bits_per_weight = 8 * writer.nbytes / total
    return Report(bits_per_weight, writer.nbytes, time.perf_counter() - began, tuple(floating))


def pieces(name: str, array: mx.array, packing: Packing | None) -> Iterator[tuple[str, mx.array]]:
    """The tensors that store one parameter, computed."""
    parts = {"weight": array} if packing is None else packing.pack(array)
    mx.eval(list(parts.values()))
    if packing is None:
        yield name, array
        return
    stem = name.removesuffix("weight")
    for part, value in parts.items():
        yield stem + part, value


def require_space(folder: Path, source_bytes: int, recipe: Recipe | None) -> None:
    """Raise InputError when the disk surely cannot hold the result."""
    bits = 16 if recipe is None else recipe.default.bits
    needed, there = source_bytes * bits // 16, free_bytes(folder)
    if needed > there:
        raise InputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB will be written and {there / 1e9:.1f} GB are "
            "free; free some disk space or choose another --out"
        )


def source_name(source: str | Path) -> str:
    """What config.json says it was made from: the hub's name, or a local folder's last part."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def converted_config(
    config: dict[str, Any], source: str, recipe: Recipe | None, dtype: str | None
) -> dict[str, Any]:
    """The source's config.json, with what was done to it."""
    done = {"tool": f"lfm_mlx {version('lfm_mlx')}", "source": source}
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    if dtype is not None:
        result |= {"dtype": dtype}
        result.pop("torch_dtype", None)
    if recipe is not None:
        settings = asdict(recipe.default)
        result |= {"quantization": settings, "quantization_config": settings}
    return result | {"conversion": done}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lfm_mlx.convert", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--model", required=True, help="folder, hub name, or demo")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--bits", type=int, help="quantize to this many bits: 2, 3, 4, 5, 6 or 8")
    parser.add_argument("--group-size", type=int, help="elements that share a scale")
    parser.add_argument("--mode", choices=MODES, help="kind of quantization (default affine)")
    parser.add_argument("--dtype", choices=DTYPES, help="of what stays floating")
    parser.add_argument("--check", action="store_true", help="refuse weights with NaN or infinity")
    parser.add_argument("--force", action="store_true", help="replace the folder at --out")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe that --bits, --group-size and --mode ask for; None when none of them is given."""
    if args.bits is None and args.group_size is None and args.mode is None:
        return None
    return Recipe(Packing.of(args.mode or "affine", args.bits, args.group_size))


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    report = convert(
        args.model, args.out, recipe=recipe_of(args), dtype=args.dtype, force=args.force,
        check=args.check, show_progress=True,
    )  # fmt: skip
    for path in report.floating:
        print(f"left floating, its width is no multiple of the group size: {path}", file=sys.stderr)
    print(
        f"{args.out}: {report.bits_per_weight:.3f} bits per weight, {report.nbytes / 1e9:.3f} GB, "
        f"{report.seconds:.1f} s"
    )


def command() -> int:
    return run(main, "lfm_mlx.convert")


if __name__ == "__main__":
    sys.exit(command())
