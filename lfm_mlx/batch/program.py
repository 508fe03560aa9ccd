"""Many prompts or conversations, answered together: JSON lines in, JSON lines out.

    python -m lfm_mlx.batch --model demo --in questions.jsonl --out answers.jsonl

A line in has `prompt`, or `messages` with `tools`, and may have `id` and `max_tokens`. A line out
has the `id` and the `line` of its request, and either what was answered or an `error`. Answers come
in the order in which they end. Run again, the command goes on where it was stopped, and asks lines
anew that failed or were changed: their last result counts. `--in -` and `--out -` are the standard
streams.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfm_mlx import chatml, device
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.many import Answered, answer_many
from lfm_mlx.answer.question import Question, ask
from lfm_mlx.answer.stream import rate
from lfm_mlx.batch.files import STANDARD, Request, Results, open_results, read_requests
from lfm_mlx.batch.options import parser
from lfm_mlx.cli.model_options import at_least_one
from lfm_mlx.cli.selected_model import SelectedModel
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.model import Model


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least_one(args, "max_tokens", "batch_size")
    requests = read_requests(args.source)
    if _is_same(args.source, args.target):
        raise InputError("--in and --out are the same file; give another name")
    chosen = SelectedModel(args)
    longest = min(args.max_tokens, chosen.config.max_position_embeddings)
    chosen.require_room(args.batch_size * longest)
    with open_results(args.target) as results, device.wired_limit():
        left = results.unanswered(requests)
        if not left:
            print(f"{args.target}: has a result for each line", file=sys.stderr)
            return
        model = chosen.load()
        with tqdm(
            total=len(requests), initial=len(requests) - len(left), unit="line", disable=None
        ) as bar:
            batch = Batch(chosen, model, results, bar)
            batch.answer(left)
    print(batch, file=sys.stderr)


def _is_same(source: Path, target: Path) -> bool:
    named = STANDARD not in (source, target) and source.exists() and target.exists()
    return named and target.is_file() and target.samefile(source)


class Batch:
    """Answers requests into a file of results, and counts."""

    def __init__(self, chosen: SelectedModel, model: Model, results: Results, bar: tqdm):
        self.chosen, self.model, self.results, self.bar = chosen, model, results, bar
        self.answers = self.errors = self.prompt_tokens = self.generated_tokens = 0
        self.seconds = 0.0

    def answer(self, requests: list[Request]) -> None:
        """Write a result for each of the requests."""
        began = time.perf_counter()
        args, chosen = self.chosen.args, self.chosen
        answers = answer_many(
            self.model, chosen.tokenizer, self._questions(requests), chosen.sampling,
            seed=args.seed, size=args.batch_size,
        )  # fmt: skip
        for answered in answers:
            self.results.write(answered.key, result_of(answered))
            self.answers += answered.error is None
            self.errors += answered.error is not None
            self.prompt_tokens += answered.prompt_tokens
            self.generated_tokens += answered.generated_tokens
            self.seconds = time.perf_counter() - began
            self.bar.update()

    def _questions(self, requests: list[Request]) -> Iterator[tuple[Request, Question]]:
        """The requests that can be answered; the others get their result at once."""
        for request in requests:
            try:
                yield request, self._question(request)
            except Exception as error:  # whatever a line does, the others are answered
                self.results.write(request, {"error": why(error)})
                self.errors += 1
                self.bar.update()

    def _question(self, request: Request) -> Question:
        if request.error is not None:
            raise InputError(request.error)
        return ask(
            self.chosen.tokenizer, self.chosen.config, request.messages,
            control=Control(tools=request.tools), date=self.chosen.date,
            max_tokens=request.max_tokens or self.chosen.args.max_tokens,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.answers} answers and {self.errors} errors in {self.seconds:.1f} s: "
            f"{self.prompt_tokens} tokens of prompts, {self.generated_tokens} of answers, "
            f"{rate(self.generated_tokens, self.seconds):.1f} tokens/s"
        )


def why(error: Exception) -> str:
    """The one line for what a request failed by; of what nobody foresaw, with its kind."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}"


def result_of(answered: Answered) -> dict[str, Any]:
    """The answer, or why there is none, as a line of results has it."""
    if answered.error is not None:
        return {"error": answered.error}
    message = chatml.as_message(answered.segments)
    return {
        "text": message["content"],
        "thinking": message.get("thinking", ""),
        "tool_calls": message.get("tool_calls", []),
        "finish_reason": answered.finish_reason,
        "prompt_tokens": answered.prompt_tokens,
        "generated_tokens": answered.generated_tokens,
    }
