"""Loading, prefill and decoding, against mlx-lm on the same weights, side by side.

    python benchmarks/decode.py --model demo
    python benchmarks/decode.py --model FOLDER --prompt-tokens 512 --tokens 128 --runs 5

Every run is a process of its own; engines take turns, and medians are told. Prints a table, then
one JSON line. Tokens are random ids, so nothing stops early.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx import device
from lfm_mlx.checkpoint.folder import Checkpoint
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError
from lfm_mlx.load import DTYPES, as_dtype, load_model

# Each engine: who runs, and in which dtype; None is what that engine takes by default.
Engine = tuple[str, str | None]
MEASURES = {
    "load_seconds": "load s",
    "prompt_tokens_per_second": "prompt tok/s",
    "time_to_first_token_seconds": "first token s",
    "generated_tokens_per_second": "generated tok/s",
    "peak_memory_bytes": "peak GB",
}


class Failed(Exception):
    """An engine that does not run this model here, and what it said."""


def random_prompt(config: Config, count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()


def load_ours(folder: Path, dtype: str | None) -> Callable[[list[int], int], Iterator[int]]:
    from lfm_mlx.engine.decode import decode

    model = load_model(folder, dtype=dtype)
    return lambda prompt, count: (s.token for s in decode(model, prompt, max_tokens=count))


def load_mlx_lm(folder: Path, dtype: str | None) -> Callable[[list[int], int], Iterator[int]]:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(folder)
    if dtype is not None:
        model.set_dtype(DTYPES[dtype])
        mx.eval(model.parameters())
    return lambda prompt, count: (
        token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)
    )


LOADERS = {"lfm_mlx": load_ours, "mlx-lm": load_mlx_lm}


def measure(engine: Engine, folder: Path, prompt_tokens: int, tokens: int) -> dict[str, float]:
    """One run of one engine, in this process."""
    name, dtype = engine
    prompt = random_prompt(Config.from_folder(folder), prompt_tokens)
    began = time.perf_counter()
    generate = LOADERS[name](folder, dtype)
    loaded = time.perf_counter()
    stamps = [time.perf_counter() for _ in generate(prompt, tokens)]
    first = stamps[0] - loaded
    return {
        "load_seconds": loaded - began,
        "prompt_tokens_per_second": prompt_tokens / first,
        "time_to_first_token_seconds": first,
        "generated_tokens_per_second": (tokens - 1) / (stamps[-1] - stamps[0]),
        "peak_memory_bytes": device.peak_bytes(),
    }


def in_own_process(engine: Engine, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process, so that peaks and caches are its own."""
    name, dtype = engine
    command = [
        sys.executable, __file__, "--model", str(folder), "--worker", name,
        "--prompt-tokens", str(args.prompt_tokens), "--tokens", str(args.tokens),
    ]  # fmt: skip
    command += ["--dtype", dtype] if dtype else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2][-300:]
        raise Failed(f"{name} ({dtype or 'default'}) cannot run: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def engines(folder: Path, same_dtype: bool) -> dict[str, Engine]:
    """What is compared: both defaults, and each engine in the other's default dtype."""
    stored = Checkpoint(folder).config.get("dtype") or "bfloat16"
    ours = as_dtype(None)
    our_name = stored if ours is None else str(ours).rpartition(".")[2]
    found: dict[str, Engine] = {
        f"lfm_mlx, default ({our_name})": ("lfm_mlx", None),
        f"mlx-lm, default ({stored})": ("mlx-lm", None),
    }
    if our_name != stored and same_dtype:
        found[f"mlx-lm, {our_name}"] = ("mlx-lm", our_name)
        found[f"lfm_mlx, {stored}"] = ("lfm_mlx", stored)
    return found


def show(medians: dict[str, dict[str, float]]) -> None:
    width = max(map(len, medians))
    print(" " * width, *(f"{title:>16}" for title in MEASURES.values()))
    for name, row in medians.items():
        values = [row[key] / (1e9 if key.endswith("bytes") else 1) for key in MEASURES]
        print(name.ljust(width), *(f"{value:16.3f}" for value in values))


def run_in_turns(
    compared: dict[str, Engine], folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Every engine's runs, and what those said that do not run this model here."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    failed: dict[str, str] = {}
    for number in range(args.runs):
        for name in [name for name in compared if name not in failed]:
            print(f"run {number + 1} of {args.runs}: {name}", file=sys.stderr)
            try:
                found[name].append(in_own_process(compared[name], folder, args))
            except Failed as failure:
                failed[name] = str(failure)
                del found[name]
    return found, failed


def record(
    medians: dict[str, Any], failed: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "benchmark": "decode",
        "model": args.model,
        "prompt_tokens": args.prompt_tokens,
        "generated_tokens": args.tokens,
        "runs": args.runs,
        "machine": platform.machine(),
        "device": mx.device_info().get("device_name"),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "medians": medians,
        "failed": failed,
    }


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub name, or demo (default)")
    add("--prompt-tokens", type=int, default=64)
    add("--tokens", type=int, default=64, help="tokens to generate, 2 or more")
    add("--runs", type=int, default=3, help="runs of each engine")
    add("--defaults-only", action="store_true", help="leave out runs in the other's dtype")
    add("--worker", choices=LOADERS, help=argparse.SUPPRESS)
    add("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.tokens < 2 or args.prompt_tokens < 1 or args.runs < 1:
        raise InputError("expected --tokens of 2 or more, --prompt-tokens and --runs of 1 or more")
    folder = resolve(args.model)
    if args.worker:
        engine = (args.worker, args.dtype)
        print(json.dumps(measure(engine, folder, args.prompt_tokens, args.tokens)))
        return
    compared = engines(folder, not args.defaults_only)
    found, failed = run_in_turns(compared, folder, args)
    if not found:
        raise InputError("; ".join(failed.values()))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in MEASURES}
        for name, rows in found.items()
    }
    show(medians)
    for reason in failed.values():
        print(reason)
    print(json.dumps(record(medians, failed, args)))


if __name__ == "__main__":
    sys.exit(run(main, "decode"))
