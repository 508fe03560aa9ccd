"""What quantized keys and values cost in quality: accuracy and KL divergence on held-out questions.

    python benchmarks/kv_bits.py --count 100

Greedy answers must match exactly. The divergence is that of the next-token distribution from the
one with floating keys and values, after each token of question and floating answer: nats, mean and
99th percentile. Prints a table, then one JSON line.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from lfm_mlx import Model
from lfm_mlx.cache.keys_values import BITS, KVQuantization
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.engine.decode import Reading, decode, prefill, read
from lfm_mlx.errors import InputError
from lfm_mlx.load import DTYPES, load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "demo"))
from evaluate import LONGEST_ANSWER, prompt_of
from held_out import HELD_OUT_KINDS, Example, held_out, is_correct

FLOATING = "floating"


@dataclass
class Tally:
    """What one packing gave, over all questions."""

    right: int = 0
    same: int = 0
    divergences: list[float] = field(default_factory=list)

    def summary(self, questions: int) -> dict[str, float]:
        kl = np.array(self.divergences)
        return {
            "accuracy": self.right / questions,
            "same_answer_as_floating": self.same / questions,
            "kl_mean_nats": float(kl.mean()),
            "kl_p99_nats": float(np.quantile(kl, 0.99)),
        }


def answered(
    model: Model, prompt: list[int], stops: set[int], packing: KVQuantization | None
) -> list[int]:
    steps = decode(
        model,
        prompt,
        max_tokens=LONGEST_ANSWER,
        stop_ids=stops,
        reading=Reading(kv_quantization=packing),
    )
    return [step.token for step in steps]


def logprobs(
    model: Model, prompt: list[int], answer: list[int], packing: KVQuantization | None
) -> Any:
    """The log-probabilities of what follows each token of the answer, [L, V].

    The prompt is read in one pass and the answer in another, which sees the prompt as it is stored.
    """
    cache = model.make_cache()
    prefill(model, mx.array(prompt), cache, reading=Reading(kv_quantization=packing))
    logits = read(model, mx.array([answer]), cache, packing)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(reference: mx.array, other: mx.array) -> list[float]:
    """KL(reference || other) at each position."""
    found: list[float] = (mx.exp(reference) * (reference - other)).sum(axis=-1).tolist()  # pyright: ignore
    return found


def compare(
    model: Model, examples: Iterator[Example], prompt: Callable[[Example], list[int]],
    tokenizer: Any, packings: dict[str, KVQuantization | None],
) -> dict[str, Tally]:  # fmt: skip
    tallies = {name: Tally() for name in packings}
    stops = tokenizer.eos_token_ids
    for example in examples:
        tokens = prompt(example)
        plain = answered(model, tokens, stops, None)
        reference = logprobs(model, tokens, plain, None)
        for name, packing in packings.items():
            answer = plain if packing is None else answered(model, tokens, stops, packing)
            tally = tallies[name]
            tally.right += is_correct(example, tokenizer.decode(answer))
            tally.same += answer == plain
            tally.divergences += divergence(reference, logprobs(model, tokens, plain, packing))
    return tallies


def show(rows: dict[str, dict[str, float]]) -> None:
    print("keys and values  accuracy  same answer    mean KL     99% KL")
    for name, row in rows.items():
        shares = f"{100 * row['accuracy']:8.1f}%  {100 * row['same_answer_as_floating']:10.1f}%"
        print(f"{name:15}  {shares}  {row['kl_mean_nats']:9.2e}  {row['kl_p99_nats']:9.2e}")


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="demo, or a folder trained like it")
    add("--count", type=int, default=50, help="questions of each kind")
    add("--group-size", type=int, help="default: what the head width allows")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU")
    args = parser.parse_args()
    if args.count < 1:
        raise InputError(f"--count is {args.count}; expected 1 or more")
    model, tokenizer = load(args.model, dtype=args.dtype)
    packings: dict[str, KVQuantization | None] = {FLOATING: None}
    packings |= {f"{n} bits": KVQuantization.of(model.config, n, args.group_size) for n in BITS}
    kinds = HELD_OUT_KINDS
    questions = [example for kind in kinds for example in held_out(kind, args.count)]
    bar = tqdm(questions, unit="question", disable=None, leave=False)
    tallies = compare(model, iter(bar), lambda e: prompt_of(e, tokenizer), tokenizer, packings)
    rows = {name: tally.summary(len(questions)) for name, tally in tallies.items()}
    show(rows)
    facts = {"model": args.model, "questions": len(questions), "kinds": list(kinds)}
    print(json.dumps({"benchmark": "kv_bits"} | facts | {"rows": rows}))


if __name__ == "__main__":
    sys.exit(run(main, "kv_bits"))
