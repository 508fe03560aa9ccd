"""Drafts looked up in the text before: how many are right, and what they cost where all are wrong.

    python benchmarks/lookup.py
    python benchmarks/lookup.py --count 50 --runs 5 --drafted 8

Held-out questions of the demo's kinds are answered greedily, with drafts and without, in turns, and
every answer must be the same. `never right` is the worst case: matches are found all the time, and
each draft is wrong. Speed is relative to decoding without drafts, from medians of the runs. Prints
a table, then one JSON line.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from lfm_mlx import Model
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.engine.decode import decode
from lfm_mlx.engine.lookup import LONGEST_DRAFT, PromptLookup
from lfm_mlx.engine.speculate import decode_with_lookup
from lfm_mlx.errors import InputError
from lfm_mlx.load import DTYPES, load

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo"))

from evaluate import LONGEST_ANSWER, prompt_of
from held_out import HELD_OUT_KINDS, held_out

NEVER_RIGHT = "never right"
Prompts = Sequence[list[int]]


class Misled(PromptLookup):
    """Knows the answer, so that it always finds a match, and drafts anything else."""

    def __init__(self, longest: int, vocab_size: int, known: list[int]):
        super().__init__(longest)
        self.vocab_size = vocab_size
        self.text.extend(known)

    def draft(self, token: int, most: int) -> list[int]:
        return [(token + 1) % self.vocab_size for token in super().draft(token, most)]


def timed(prompts: Prompts, answer: Callable[[int], list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds, and the answers."""
    began = time.perf_counter()
    answers = [answer(index) for index in range(len(prompts))]
    return time.perf_counter() - began, answers


def compare(
    model: Model,
    prompts: Prompts,
    new_lookup: Callable[[int], PromptLookup],
    runs: int,
    **options: Any,
) -> dict[str, float]:
    """Decode every prompt with and without drafts, `runs` times in turns."""
    lookups: list[PromptLookup] = []

    def plainly(index: int) -> list[int]:
        return [step.token for step in decode(model, prompts[index], **options)]

    def drafting(index: int) -> list[int]:
        lookups.append(new_lookup(index))
        steps = decode_with_lookup(model, prompts[index], lookup=lookups[-1], **options)
        return [step.token for step in steps]

    plain_seconds, lookup_seconds = [], []
    for _ in range(runs):
        plain, expected = timed(prompts, plainly)
        lookup, answers = timed(prompts, drafting)
        if answers != expected:
            raise InputError("an answer with drafts is not the one without")
        plain_seconds.append(plain)
        lookup_seconds.append(lookup)
    return counts(lookups[: len(prompts)], sum(map(len, answers))) | {
        "speed_ratio": statistics.median(plain_seconds) / statistics.median(lookup_seconds)
    }


def counts(lookups: Sequence[PromptLookup], tokens: int) -> dict[str, float]:
    passes = sum(lookup.passes for lookup in lookups)
    drafted = sum(lookup.drafted for lookup in lookups)
    accepted = sum(lookup.accepted for lookup in lookups)
    return {
        "tokens": tokens,
        "passes": passes,
        "tokens_per_pass": tokens / passes,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "acceptance": accepted / drafted if drafted else 0.0,
    }


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    model, tokenizer = load(args.model, dtype=args.dtype)
    found = {}
    for kind in tqdm(args.kind or ("copy", "sum", "tool_call"), disable=None, leave=False):
        prompts = [prompt_of(example, tokenizer) for example in held_out(kind, args.count)]
        found[kind] = compare(
            model, prompts, lambda _: PromptLookup(args.drafted), args.runs,
            max_tokens=LONGEST_ANSWER, stop_ids=tokenizer.eos_token_ids,
        )  # fmt: skip
    found[NEVER_RIGHT] = worst(model, args)
    return found


def worst(model: Model, args: argparse.Namespace) -> dict[str, float]:
    """Long answers without a stop, drafted from themselves, always wrongly."""
    vocab_size = model.config.vocab_size
    prompts = [[(97 * row + 31 * i * i) % vocab_size for i in range(24)] for row in range(3)]
    answers = [[s.token for s in decode(model, p, max_tokens=args.tokens)] for p in prompts]
    known = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    new = partial(Misled, args.drafted, vocab_size)
    return compare(
        model, prompts, lambda index: new(known[index]), args.runs, max_tokens=args.tokens
    )


def show(found: dict[str, dict[str, float]]) -> None:
    titles = ("tokens", "passes", "tokens/pass", "drafted", "accepted", "acceptance", "speed")
    print(" " * 12, *(f"{title:>11}" for title in titles))
    for kind, row in found.items():
        values = (f"{v:11d}" if isinstance(v, int) else f"{v:11.3f}" for v in row.values())
        print(kind.ljust(12), *values)


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="demo (default), or a folder trained like it")
    add("--dtype", choices=DTYPES, default="float32")
    add("--kind", action="append", choices=HELD_OUT_KINDS, help="default: copy, sum, tool_call")
    add("--count", type=int, default=40, help="questions of each kind")
    add("--tokens", type=int, default=256, help="length of an answer in the worst case")
    add("--drafted", type=int, default=LONGEST_DRAFT, help="most tokens to draft for one pass")
    add("--runs", type=int, default=3)
    return parser


def main() -> None:
    args = parser().parse_args()
    if min(args.count, args.runs) < 1 or args.tokens < 16:
        raise InputError("expected --count and --runs of 1 or more, --tokens of 16 or more")
    found = measure(args)
    show(found)
    record = {
        "benchmark": "lookup",
        "model": args.model,
        "dtype": args.dtype,
        "runs": args.runs,
        "machine": platform.machine(),
        "device": mx.device_info().get("device_name"),
        "kinds": found,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, "lookup"))
