"""Check every Metal kernel on this machine: right or wrong, faster or slower than the operations.

    python -m lfm_mlx.doctor
    python -m lfm_mlx.doctor --quick --dtype bfloat16 --kernel experts

Runs each kernel beside its reference on random inputs of LFM2.5-8B-A1B's shapes, then a short
decode of --model with kernels and without. Prints tables, says which kernels to leave out here, and
ends with one JSON line. Exit code: 1 where a kernel is wrong or does not run, else 0. Without Metal
it times the operations alone.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from lfm_mlx import chatml, device
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.command import DONE
from lfm_mlx.cli.model_options import at_least_one
from lfm_mlx.cli.selected_model import LOADING
from lfm_mlx.doctor.cases import Sizes, cases, real_sizes
from lfm_mlx.doctor.measure import DOES_NOT_RUN, WRONG, Measurement, examine
from lfm_mlx.doctor.options import parser
from lfm_mlx.doctor.verdict import setting_without, verdicts
from lfm_mlx.engine.decode import decode
from lfm_mlx.kernels import metal
from lfm_mlx.load import DTYPES, as_dtype, load_model, load_tokenizer, loaded_bytes, open_checkpoint
from lfm_mlx.model import Model

FAULT = 1
QUESTION = "What is 27 + 58?"
TOKENS, QUICK_TOKENS = 64, 16
CONTEXT = 256
REAL = real_sizes()


def facts() -> dict[str, Any]:
    """The machine and what runs on it."""
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    return {
        "chip": mx.device_info().get("device_name"),
        "memory_bytes": device.machine_bytes(),
        "system": system,
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        metal.VARIABLE: os.environ.get(metal.VARIABLE),
        "kernels_allowed": sorted(metal.chosen()),
        "metal": metal.available(),
    }


def show_facts(known: dict[str, Any]) -> None:
    print(f"{known['chip']}, {known['memory_bytes'] / 2**30:.0f} GB, {known['system']}")
    print(f"Python {known['python']}, MLX {known['mlx']}, mlx-lm {known['mlx_lm']}")
    setting = known[metal.VARIABLE]
    print(f"{metal.VARIABLE}: {'not set, all kernels may run' if setting is None else setting}")
    if not known["metal"]:
        print("Metal is not there: no kernel runs, and what is timed are the operations alone")


def find(
    sizes: Sizes, dtypes: Iterable[str], operations: Sequence[str], rounds: int
) -> list[Measurement]:
    """Every case examined, one after another in memory."""
    found = []
    with tqdm(desc="kernels", unit="case", disable=None, leave=False) as bar:
        for dtype in dtypes:
            for case in cases(sizes, DTYPES[dtype], operations):
                bar.set_postfix_str(f"{case.kernel}, {dtype}")
                found.append(examine(case, rounds))
                mx.clear_cache()
                bar.update()
    return found


def show(found: Sequence[Measurement]) -> None:
    """A line a case; the operations' error and time follow the kernel's."""
    titles = (f"{'kernel':13} {'where':15} weights tokens {'dtype':9}", "error", "operations'")
    print(f"\n{titles[0]}{titles[1]:>9}{titles[2]:>13}{'µs':>10}{titles[2]:>13}")
    for row in found:
        case = f"{row.kernel:13} {row.part:15} {row.weights:7} {row.tokens:6} {row.dtype:9}"
        numbers = (
            number(row.relative_error, 9, ".1e"),
            number(row.reference_relative_error, 13, ".1e"),
            number(row.kernel_microseconds, 10, ".1f"),
            number(row.reference_microseconds, 13, ".1f"),
        )
        print(f"{case}{''.join(numbers)}  {row.verdict}{row.reason and ': ' + row.reason}")


def number(value: float | None, width: int, form: str) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}{form}}"


def show_opinions(matters: dict[str, list[str]]) -> str | None:
    """Print the verdict; returns the setting that leaves out faulty or slow kernels, or None."""
    print()
    left_out = {name for kernels in matters.values() for name in kernels}
    if not left_out:
        print("every kernel that was examined is right, and none is slower than the operations")
        return None
    for matter, kernels in matters.items():
        if kernels:
            print(f"{matter} here: {', '.join(kernels)}")
    setting = setting_without(left_out)
    print(f"to leave them out: {setting}")
    return setting


def decodings(model: Model, prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second with the model's kernels and without, and where tokens begin to differ."""
    ways = {"kernels": model.kernels} if metal.available() else {}
    ways |= {"operations": metal.NO_KERNELS}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[int]] = {}
    for _ in range(rounds):
        for way, kernels in ways.items():
            model.kernels = kernels
            answers[way], rate = answer(model, prompt, tokens)
            rates[way].append(rate)
    pairs = zip(*answers.values(), strict=True)
    return {
        "tokens": len(answers["operations"]),
        "tokens_per_second": {way: statistics.median(seen) for way, seen in rates.items()},
        "first_different_token": next(
            (i for i, pair in enumerate(pairs) if len({*pair}) > 1), None
        ),
    }


def answer(model: Model, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The greedy tokens after `prompt`, and how many came a second after the first."""
    found, stamps = [], []
    for step in decode(model, prompt, max_tokens=tokens):
        found.append(step.token)
        stamps.append(time.perf_counter())
    return found, (len(found) - 1) / (stamps[-1] - stamps[0])


def show_decodings(name: str, found: dict[str, Any]) -> None:
    rates = [f"{rate:.1f} tokens/s with {way}" for way, rate in found["tokens_per_second"].items()]
    print(f"\n{name}, {found['tokens']} greedy tokens: {', '.join(rates)}")
    apart = found["first_different_token"]
    if len(rates) > 1:
        print("the tokens are equal" if apart is None else f"token {apart} is the first to differ")


class Decoder:
    """The model that decodes: looked at before anything is measured, loaded afterwards."""

    def __init__(self, name: str, dtype: str | None):
        self.name, self.dtype, self.folder = name, dtype, resolve(name)
        checkpoint, config = open_checkpoint(self.folder)
        weights = loaded_bytes(config, checkpoint.tensors, as_dtype(dtype))
        device.require_room(weights, config.cache_bytes(CONTEXT, 4), CONTEXT)
        tokenizer = load_tokenizer(self.folder)
        self.prompt = chatml.render(tokenizer, [{"role": "user", "content": QUESTION}])

    def measure(self, left_out: Collection[str], tokens: int, rounds: int) -> dict[str, Any]:
        """`decodings` of the kernels that may run and are not left out."""
        kernels = metal.chosen() - set(left_out)
        with device.wired_limit():
            model = load_model(self.folder, dtype=self.dtype, use_kernels=kernels, progress=LOADING)
            return decodings(model, self.prompt, tokens, rounds)


def main(argv: list[str] | None = None, sizes: Sizes = REAL) -> int:
    args = parser().parse_args(argv)
    at_least_one(args, "runs")
    decoder = Decoder(args.model, args.dtype)
    known = facts()
    show_facts(known)
    shapes = replace(sizes, vocab=0) if args.quick else sizes
    dtypes = [args.dtype] if args.dtype else [*DTYPES]
    found = find(shapes, dtypes, args.kernel or metal.OPERATIONS, args.runs)
    show(found)
    matters = verdicts(found)
    setting = show_opinions(matters) if known["metal"] else None
    faulty = matters[WRONG] + matters[DOES_NOT_RUN]
    decoded = decoder.measure(faulty, QUICK_TOKENS if args.quick else TOKENS, args.runs)
    show_decodings(args.model, decoded)
    record = {
        "doctor": known,
        "findings": [row.record() for row in found],
        **{matter.lower().replace(" ", "_"): kernels for matter, kernels in matters.items()},
        "suggested": setting,
        "decode": decoded | {"model": args.model},
    }
    print(json.dumps(record))
    return FAULT if faulty else DONE
