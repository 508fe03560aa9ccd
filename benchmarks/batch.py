"""Answers together against answers one at a time: throughput, and whether the tokens are the same.

    python benchmarks/batch.py --model demo --sizes 4 8 16

The prompts are held-out questions of the demo's kinds, answered greedily in float32. Rounds of all
ways interleave, and each way's median counts. Prints a table, then one JSON line.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx import Model, chatml, load
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.engine.decode import decode
from lfm_mlx.engine.engine import Engine, Limits
from lfm_mlx.engine.job import Job, Token
from lfm_mlx.errors import InputError

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo"))

from held_out import held_out

KINDS = ("sum", "tool_call", "tool_answer", "copy", "fact", "greeting")
Answers = dict[int, list[int]]


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of all kinds in turn."""
    by_kind = [held_out(kind, count) for kind in KINDS]
    examples = [example for group in zip(*by_kind, strict=True) for example in group]
    return [
        chatml.render(tokenizer, example.messages, tools=example.tools, date=example.date)
        for example in examples[:count]
    ]


def one_at_a_time(
    model: Model, prompts: list[list[int]], stop_ids: set[int], limit: int
) -> Answers:
    return {
        at: [step.token for step in decode(model, prompt, max_tokens=limit, stop_ids=stop_ids)]
        for at, prompt in enumerate(prompts)
    }


def together(
    model: Model, prompts: list[list[int]], stop_ids: set[int], limit: int, size: int
) -> Answers:
    engine = Engine(model, Limits(rows=size, waiting=len(prompts)))
    jobs = [engine.submit(Job(prompt, limit, stop_ids=frozenset(stop_ids))) for prompt in prompts]
    found: dict[int, list[int]] = {job: [] for job in jobs}
    for event in engine.run():
        if isinstance(event, Token):
            found[event.job].append(event.token)
    return {at: found[job] for at, job in enumerate(jobs)}


def measure(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """By batch size (1: one at a time), medians over the rounds and how many answers differ."""
    model, tokenizer = load(args.model, dtype="float32")
    prompts, stops = prompts_of(tokenizer, args.count), tokenizer.eos_token_ids
    alone = one_at_a_time(model, prompts, stops, args.max_tokens)
    rates: dict[int, list[float]] = {size: [] for size in (1, *args.sizes)}
    differing = dict.fromkeys(rates, 0)
    for number in range(args.rounds):
        for size in rates:
            print(f"round {number + 1} of {args.rounds}: {size} together", file=sys.stderr)
            began = time.perf_counter()
            if size == 1:
                found = one_at_a_time(model, prompts, stops, args.max_tokens)
            else:
                found = together(model, prompts, stops, args.max_tokens, size)
            seconds = time.perf_counter() - began
            rates[size].append(sum(map(len, found.values())) / seconds)
            differing[size] = sum(found[at] != alone[at] for at in alone)
    medians = {size: statistics.median(found) for size, found in rates.items()}
    return {
        size: {
            "generated_tokens_per_second": medians[size],
            "speedup": medians[size] / medians[1],
            "answers_that_differ": differing[size],
        }
        for size in rates
    }


def show(found: dict[int, dict[str, float]], count: int) -> None:
    print(f"{'together':>8} {'tokens/s':>10} {'speedup':>8} {f'differ, of {count}':>16}")
    for size, row in found.items():
        print(
            f"{size:8} {row['generated_tokens_per_second']:10.1f} {row['speedup']:8.2f} "
            f"{row['answers_that_differ']:16}"
        )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="demo", help="folder, hub name, or demo (default)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="batch sizes")
    parser.add_argument("--count", type=int, default=96, help="prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=160)
    args = parser.parse_args()
    if min(*args.sizes, args.count, args.rounds, args.max_tokens) < 1 or 1 in args.sizes:
        raise InputError("expected --sizes of 2 or more, and 1 or more of everything else")
    found = measure(args)
    show(found, args.count)
    record = {
        "benchmark": "batch", "model": args.model, "dtype": "float32", "prompts": args.count,
        "rounds": args.rounds, "machine": platform.machine(),
        "device": mx.device_info().get("device_name"), "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"), "together": {str(size): row for size, row in found.items()},
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, "batch"))
