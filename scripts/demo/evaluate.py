"""Held-out accuracy of the demo model, in floating point and in every packing asked for.

    python scripts/demo/evaluate.py --count 200 --bits 4 --bits 8

Answers are greedy and must match exactly; the questions are about values that training never saw.
Prints a table, then one JSON line.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from held_out import HELD_OUT_KINDS, Example, held_out, is_correct
from tqdm import tqdm

from lfm_mlx import Model, chatml
from lfm_mlx.checkpoint.quantize import Quantization, Recipe
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.convert.program import convert
from lfm_mlx.load import load

LONGEST_ANSWER = 160


def prompt_of(example: Example, tokenizer: Any) -> list[int]:
    return chatml.render(tokenizer, example.messages, tools=example.tools, date=example.date)


def greedy_batch(
    model: Model, prompts: Sequence[list[int]], stop_ids: set[int], max_tokens: int = LONGEST_ANSWER
) -> list[list[int]]:
    """Greedy continuations of a batch padded on the left, each up to its stop token."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    padded = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    cache = model.make_cache(padding)
    tokens = mx.argmax(model(mx.array(padded), cache)[:, -1], axis=-1)
    columns = []
    running = np.ones(len(prompts), bool)
    while running.any() and len(columns) < max_tokens:
        columns.append(np.array(tokens))
        running &= ~np.isin(columns[-1], list(stop_ids))
        tokens = mx.argmax(model(tokens[:, None], cache)[:, -1], axis=-1)
    return [until_stop(row.tolist(), stop_ids) for row in np.stack(columns, axis=1)]


def until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    ends = (index for index, token in enumerate(tokens) if token in stop_ids)
    return tokens[: next(ends, len(tokens) - 1) + 1]


def batches(examples: list[tuple[Example, list[int]]], size: int) -> Iterator[list[Any]]:
    """Examples of like length together, so that little is padding."""
    examples = sorted(examples, key=lambda pair: len(pair[1]))
    for begin in range(0, len(examples), size):
        yield examples[begin : begin + size]


def accuracy(model: Model, tokenizer: Any, kind: str, count: int, batch: int = 50) -> float:
    """The share of `count` held-out examples of a kind that are answered exactly."""
    pairs = [(example, prompt_of(example, tokenizer)) for example in held_out(kind, count)]
    right = 0
    for group in batches(pairs, batch):
        answers = greedy_batch(model, [prompt for _, prompt in group], tokenizer.eos_token_ids)
        for (example, _), tokens in zip(group, answers, strict=True):
            right += is_correct(example, tokenizer.decode(tokens))
    return right / count


def evaluate(folder: str | Path, count: int, title: str) -> dict[str, float]:
    model, tokenizer = load(folder)
    bar = tqdm(HELD_OUT_KINDS, desc=title, disable=None, leave=False)
    return {kind: accuracy(model, tokenizer, kind, count) for kind in bar}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a folder trained like it")
    parser.add_argument("--count", type=int, default=200, help="examples of each kind")
    parser.add_argument("--bits", type=int, action="append", default=[], help="packings to try")
    args = parser.parse_args()
    results = {"floating": evaluate(args.model, args.count, "floating")}
    with tempfile.TemporaryDirectory() as temporary:
        for bits in args.bits:
            out = Path(temporary) / f"{bits}-bit"
            convert(args.model, out, recipe=Recipe(Quantization.of(bits=bits)))
            results[f"{bits}-bit"] = evaluate(out, args.count, f"{bits}-bit")
    print("kind".ljust(12), *(f"{name:>9}" for name in results))
    for kind in HELD_OUT_KINDS:
        print(kind.ljust(12), *(f"{100 * row[kind]:8.1f}%" for row in results.values()))
    print(json.dumps({"benchmark": "demo_accuracy", "count": args.count, "accuracy": results}))


if __name__ == "__main__":
    sys.exit(run(main, "evaluate"))
