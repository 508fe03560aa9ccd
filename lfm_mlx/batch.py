"""Many prompts or conversations, answered together: JSON lines in, JSON lines out.

    python -m lfm_mlx.batch --model demo --in questions.jsonl --out answers.jsonl

A line in has `prompt`, or `messages` with `tools`, and may have `id` and `max_tokens`. A line out
has the `id` and the `line` of its request, and either what was answered or an `error`. Answers come
in the order in which they end. Run again, the command goes on where it was stopped.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfm_mlx import chat, memory
from lfm_mlx.batch_files import Request, Results, open_results, read_requests
from lfm_mlx.batching import Row, decode_rows, require_fit
from lfm_mlx.command import InputError, Parser, one_line, run
from lfm_mlx.model import Model
from lfm_mlx.model_options import Chosen, add_model_options, add_sampling_options, at_least_one
from lfm_mlx.stream import rate

MAX_TOKENS = 4096
BATCH_SIZE = 8


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.batch", description="Answer many prompts together.")
    add = parser.add_argument
    add("--in", dest="source", required=True, type=Path, metavar="FILE.jsonl", help="requests")
    add("--out", dest="target", required=True, type=Path, metavar="FILE.jsonl",
        help="results, added to those that are there")  # fmt: skip
    add("--max-tokens", type=int, default=MAX_TOKENS,
        help="longest answer where a line has no max_tokens (default %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N",
        help="answers decoded together (default %(default)s)")  # fmt: skip
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least_one(args, "max_tokens", "batch_size")
    requests = read_requests(args.source)
    if args.target.exists() and args.target.samefile(args.source):
        raise InputError("--in and --out are the same file; give another name")
    chosen = Chosen(args)
    longest = min(args.max_tokens, chosen.config.max_position_embeddings)
    chosen.require_room(args.batch_size * longest)
    with open_results(args.target) as results, memory.wired_limit():
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


class Batch:
    """Answers requests into a file of results, and counts."""

    def __init__(self, chosen: Chosen, model: Model, results: Results, bar: tqdm):
        self.chosen, self.model, self.results, self.bar = chosen, model, results, bar
        self.answers = self.errors = self.prompt_tokens = self.generated_tokens = 0
        self.seconds = 0.0

    def answer(self, requests: list[Request]) -> None:
        """Write a result for each of the requests."""
        began = time.perf_counter()
        rows = decode_rows(
            self.model, self._rows(requests), stop_ids=self.chosen.tokenizer.eos_token_ids,
            sampling=self.chosen.sampling, seed=self.chosen.args.seed,
            size=self.chosen.args.batch_size,
        )  # fmt: skip
        for row in rows:
            self.results.write(row.key, self._result(row))
            self.answers += 1
            self.prompt_tokens += len(row.prompt)
            self.generated_tokens += len(row.tokens)
            self.seconds = time.perf_counter() - began
            self.bar.update()

    def _rows(self, requests: list[Request]) -> Iterator[Row]:
        """The requests that can be answered; the others get their result at once."""
        for request in requests:
            try:
                yield self._row(request)
            except InputError as error:
                self.results.write(request, {"error": one_line(error)})
                self.errors += 1
                self.bar.update()

    def _row(self, request: Request) -> Row:
        if request.error is not None:
            raise InputError(request.error)
        prompt = chat.render(
            self.chosen.tokenizer, request.messages, tools=request.tools, date=self.chosen.date
        )
        row = Row(request, prompt, request.max_tokens or self.chosen.args.max_tokens)
        require_fit(self.model, row)
        return row

    def _result(self, row: Row) -> dict[str, Any]:
        message = chat.as_message(chat.segments(self._pieces(row), row.key.tools or None))
        return {
            "text": message["content"],
            "thinking": message.get("thinking", ""),
            "tool_calls": message.get("tool_calls", []),
            "finish_reason": row.finish_reason,
            "prompt_tokens": len(row.prompt),
            "generated_tokens": len(row.tokens),
        }

    def _pieces(self, row: Row) -> Iterator[str]:
        text = chat.TextStream(self.chosen.tokenizer)
        for token in row.tokens[:-1] if row.finish_reason == "stop" else row.tokens:
            yield from text.add(token)
        yield from text.finish()

    def __str__(self) -> str:
        return (
            f"{self.answers} answers and {self.errors} errors in {self.seconds:.1f} s: "
            f"{self.prompt_tokens} tokens of prompts, {self.generated_tokens} of answers, "
            f"{rate(self.generated_tokens, self.seconds):.1f} tokens/s"
        )


def command() -> int:
    return run(main, "lfm_mlx.batch")


if __name__ == "__main__":
    sys.exit(command())
