"""Prompt → streamed text on a terminal, a pipe, or as JSON lines.

    python -m lfm_mlx.generate --model demo --prompt "What is 27 + 58?"

Text goes to stdout, statistics and progress to stderr.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tqdm import tqdm

from lfm_mlx import chatml, device
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.question import Question, ask
from lfm_mlx.answer.responder import Responder
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.cli.command import DONE, INTERRUPTED
from lfm_mlx.cli.control import control_of
from lfm_mlx.cli.model_options import at_least_one
from lfm_mlx.cli.printer import Printer
from lfm_mlx.cli.selected_model import SelectedModel
from lfm_mlx.config import Config
from lfm_mlx.engine import prompt_cache
from lfm_mlx.engine.decode import PREFILL_CHUNK
from lfm_mlx.errors import InputError
from lfm_mlx.generate.options import parser
from lfm_mlx.text import well_formed

CUT_SHORT = (
    "the token budget ended the answer before it was complete: it may not be what was asked for; "
    "give more --max-tokens"
)


def question_of(args: argparse.Namespace, control: Control, chosen: SelectedModel) -> Question:
    """The question that --prompt, --system and --raw put."""
    return ask(
        chosen.tokenizer, chosen.config, messages_of(args, control, chosen.tokenizer),
        control=control, max_tokens=args.max_tokens, date=chosen.date,
    )  # fmt: skip


def prompt_of(args: argparse.Namespace) -> str:
    """The text of --prompt, or of the question and what is piped in."""
    if args.prompt is not None and args.question:
        raise InputError("--prompt and a question exclude each other; give one")
    if args.prompt is not None:
        return args.prompt
    if sys.stdin.isatty() and not args.question:
        raise InputError("no prompt: give a question or --prompt TEXT, or pipe the text in")
    piped = "" if sys.stdin.isatty() else sys.stdin.read().rstrip("\r\n")
    return "\n\n".join(part for part in (" ".join(args.question), piped) if part.strip())


def messages_of(args: argparse.Namespace, control: Control, tokenizer: Any) -> list[Any]:
    """Messages, or with --raw the token ids of the text."""
    prompt = well_formed(prompt_of(args))
    if not prompt.strip():
        raise InputError("the prompt is empty")
    if args.raw:
        if args.system is not None:
            raise InputError("--system has no place without the chat template; leave out --raw")
        if control.tools:
            raise InputError("--tools have no place without the chat template; leave out --raw")
        return list(tokenizer.encode(prompt, verbose=False))
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": prompt}]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    at_least_one(args, "max_tokens", "lookup")
    control = control_of(args)
    chosen = SelectedModel(args)
    question = question_of(args, control, chosen)
    if args.lookup is not None and question.constraint is not None:
        raise InputError("--lookup drafts free text; leave it out where the answer is constrained")
    quantization = kv_quantization_of(args, chosen.config)
    cache_bytes = None if quantization is None else partial(quantization.nbytes, chosen.config)
    chosen.require_room(len(question.prompt) + question.max_tokens, cache_bytes)
    with device.wired_limit():
        model = chosen.load()
        tokenizer = chatml.vocabulary_fingerprint(chosen.tokenizer)
        file = args.prompt_cache
        cache = None if file is None else prompt_cache.load_or_new(file, model, tokenizer)
        responder = Responder(
            model, chosen.tokenizer, chosen.sampling, seed=args.seed, cache=cache,
            kv_quantization=quantization, longest_draft=args.lookup,
        )  # fmt: skip
        code = answer(args, responder, question)
        if file is not None:
            prompt_cache.save(file, responder.cache, model, tokenizer)
        return code


def kv_quantization_of(args: argparse.Namespace, config: Config) -> KVQuantization | None:
    """The quantization that --kv-bits, --kv-group-size and --kv-start ask for."""
    if args.kv_bits is None:
        if args.kv_group_size is not None or args.kv_start is not None:
            raise InputError("--kv-group-size and --kv-start belong to --kv-bits; give that too")
        return None
    return KVQuantization.of(config, args.kv_bits, args.kv_group_size, args.kv_start or 0)


def answer(args: argparse.Namespace, responder: Responder, question: Question) -> int:
    """Print the answer and the statistics; returns the exit code."""
    printer = Printer(not args.no_show_thinking, args.json)
    if args.json:
        printer.event("prompt", tokens=len(question.prompt))
    code = DONE
    with reading_bar() as progress:
        try:
            for segment in responder.answer_question(question, progress):
                printer.segment(segment)
        except KeyboardInterrupt:
            code = INTERRUPTED
    printer.end()
    if question.control.choices and code == DONE:
        print_choices(printer, question.control, responder.score_choices(question))
    statistics = responder.statistics
    if args.json:
        printer.event("end", **statistics.as_dict())
    print(statistics, file=sys.stderr)
    if question.control.shapes_answer and statistics.finish_reason == "length":
        print(CUT_SHORT, file=sys.stderr)
    return code


@contextlib.contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal while a prompt of several chunks is read."""
    bar: tqdm | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and PREFILL_CHUNK <= done < total:
            bar = tqdm(total=total, desc="read", unit="token", disable=None, leave=False)
        if bar is not None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def print_choices(printer: Printer, control: Control, probabilities: list[float]) -> None:
    """Each choice with its probability, the likeliest first; on stderr, or as a JSON event."""
    ranked = sorted(zip(probabilities, control.choices, strict=False), reverse=True)
    if not ranked:
        return
    if printer.as_json:
        printer.event("choices", probabilities={choice: number for number, choice in ranked})
        return
    for number, choice in ranked:
        print(f"{number:8.4f}  {choice}", file=sys.stderr)
