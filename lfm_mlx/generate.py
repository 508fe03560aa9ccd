"""Prompt → streamed text on a terminal, a pipe, or as JSON lines.

    python -m lfm_mlx.generate --model demo --prompt "What is 27 + 58?"

Text goes to stdout, statistics and progress to stderr.
"""

import argparse
import sys
from functools import partial
from typing import Any

from tqdm import tqdm

from lfm_mlx import chat, memory, prompt_cache
from lfm_mlx.cache import stored_length
from lfm_mlx.choice_scores import choice_probabilities
from lfm_mlx.command import DONE, INTERRUPTED, InputError, Parser, run
from lfm_mlx.config import Config
from lfm_mlx.constraint import Constraint
from lfm_mlx.control import Control
from lfm_mlx.control_options import add_options, control_of
from lfm_mlx.decode import PREFILL_CHUNK, room_for_answer
from lfm_mlx.keys_values import BITS, Packing, pack
from lfm_mlx.lookup import LONGEST_DRAFT, Lookup
from lfm_mlx.model import Model
from lfm_mlx.model_options import Chosen, add_model_options, add_sampling_options, at_least_one
from lfm_mlx.printer import Printer
from lfm_mlx.sample import Sampler
from lfm_mlx.stream import Statistics, stream

MAX_TOKENS = 16384
CUT_SHORT = (
    "the token budget ended the answer before it was complete: it may not be what was asked for; "
    "give more --max-tokens"
)


def prompt_ids(args: argparse.Namespace, control: Control, chosen: Chosen) -> list[int]:
    """The token ids of what --prompt, --system and --raw ask for."""
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise InputError("no prompt: give --prompt TEXT, or pipe the text in")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InputError("the prompt is empty")
    if args.raw:
        if args.system is not None:
            raise InputError("--system has no place without the chat template; leave out --raw")
        if control.tools:
            raise InputError("--tools have no place without the chat template; leave out --raw")
        return list(chosen.tokenizer.encode(prompt, verbose=False))
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*system, {"role": "user", "content": prompt}]
    return chat.render(chosen.tokenizer, messages, tools=control.tools, date=chosen.date)


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.generate", description="Answer a prompt.")
    add = parser.add_argument
    add("--prompt", help="the user's message (default: standard input)")
    add("--system", help="the system message")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add("--no-show-thinking", action="store_true", help="show the answer only")
    add("--json", action="store_true", help="one JSON object per event on stdout")
    add("--max-tokens", type=int, default=MAX_TOKENS, help="longest answer (default %(default)s)")
    add(
        "--lookup",
        type=int,
        nargs="?",
        const=LONGEST_DRAFT,
        metavar="N",
        help="draft up to N tokens a pass (default %(const)s) from what was read before",
    )
    add("--prompt-cache", metavar="FILE", help="what was read: continued, or made, and kept")
    add("--kv-bits", type=int, choices=BITS, help="quantize keys and values")
    add("--kv-group-size", type=int, metavar="G", help="default: what the head width allows")
    add("--kv-start", type=int, metavar="N", help="quantize once N tokens were read (default 0)")
    add_options(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    at_least_one(args, "max_tokens")
    control = control_of(args)
    chosen = Chosen(args)
    config, tokenizer = chosen.config, chosen.tokenizer
    prompt = prompt_ids(args, control, chosen)
    constraint = control.constraint(tokenizer, config.vocab_size)
    max_tokens = room_for_answer(config, len(prompt), args.max_tokens)
    packing = packing_of(args, config)
    lookup = lookup_of(args, constraint)
    steering = {"constraint": constraint} if lookup is None else {"lookup": lookup}
    packed_bytes = None if packing is None else partial(packing.nbytes, config)
    chosen.require_room(len(prompt) + max_tokens, packed_bytes)
    with memory.wired_limit():
        model = chosen.load()
        sampler = Sampler(config.vocab_size, chosen.sampling, args.seed)
        cache = known_cache(args, model, tokenizer, prompt)
        pack(cache, packing)
        code = answer(
            args, model, tokenizer, prompt, sampler, max_tokens, control=control, cache=cache,
            packing=packing, **steering,
        )  # fmt: skip
        if args.prompt_cache is not None:
            prompt_cache.save(args.prompt_cache, cache, model, tokenizer)
        return code


def packing_of(args: argparse.Namespace, config: Config) -> Packing | None:
    """How --kv-bits, --kv-group-size and --kv-start pack keys and values."""
    if args.kv_bits is None:
        if args.kv_group_size is not None or args.kv_start is not None:
            raise InputError("--kv-group-size and --kv-start belong to --kv-bits; give that too")
        return None
    return Packing.of(config, args.kv_bits, args.kv_group_size, args.kv_start or 0)


def lookup_of(args: argparse.Namespace, constraint: Constraint | None) -> Lookup | None:
    """What --lookup asks for."""
    if args.lookup is None:
        return None
    if constraint is not None:
        raise InputError("--lookup drafts free text; leave it out where the answer is constrained")
    return Lookup(args.lookup)


def known_cache(
    args: argparse.Namespace, model: Model, tokenizer: Any, prompt: list[int]
) -> list[Any]:
    """The cache in --prompt-cache, taken back to what the prompt begins with; else an empty one."""
    if args.prompt_cache is None:
        return model.make_cache()
    cache = prompt_cache.load_or_new(args.prompt_cache, model, tokenizer)
    prompt_cache.rewind_to(cache, prompt)
    return cache


def answer(
    args: argparse.Namespace, model: Model, tokenizer: Any, prompt: list[int], sampler: Sampler,
    max_tokens: int, *, control: Control, cache: list[Any], **options: Any,
) -> int:  # fmt: skip
    """Print the answer and the statistics; returns the exit code. options: `decode`'s.

    cache: what the beginning of the prompt was read into
    """
    reused = stored_length(cache)
    sampler.observe(prompt[:reused])
    statistics = Statistics(len(prompt), reused)
    printer = Printer(not args.no_show_thinking, args.json)
    unread = prompt[reused:]
    long = len(unread) > PREFILL_CHUNK
    bar = tqdm(
        total=len(unread), desc="read", unit="token", disable=None if long else True, leave=False
    )
    if args.json:
        printer.event("prompt", tokens=len(prompt))

    def progress(done: int, _: int) -> None:
        bar.update(done - bar.n)
        if done == len(unread):
            bar.close()

    pieces = stream(
        model, tokenizer, unread, sampler, max_tokens, statistics, progress=progress,
        cache=cache, **options,
    )  # fmt: skip
    code = DONE
    try:
        for segment in chat.segments(pieces, control.tools or None):
            printer.segment(segment)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        bar.close()
    printer.end()
    constraint = options.get("constraint")
    if control.choices and code == DONE and constraint is not None and constraint.begun:
        before = [*prompt, *constraint.before_answer]
        print_choices(printer, control, model, tokenizer, cache, before)
    statistics.peak_memory_bytes = memory.peak_bytes()
    if args.json:
        printer.event("end", **statistics.as_dict())
    print(statistics, file=sys.stderr)
    if control.shapes_answer and statistics.finish_reason == "length":
        print(CUT_SHORT, file=sys.stderr)
    return code


def print_choices(
    printer: Printer, control: Control, model: Model, tokenizer: Any, cache: list[Any],
    before: list[int],
) -> None:  # fmt: skip
    """Each choice with its probability, the likeliest first; on stderr, or as a JSON event."""
    tokens = control.choice_tokens(tokenizer)
    found = choice_probabilities(model, cache, before, tokens, tokenizer.eos_token_ids)
    ranked = sorted(zip(found, control.choices, strict=True), reverse=True)
    if printer.as_json:
        printer.event("choices", probabilities={choice: number for number, choice in ranked})
        return
    for number, choice in ranked:
        print(f"{number:8.4f}  {choice}", file=sys.stderr)


def command() -> int:
    return run(main, "lfm_mlx.generate")


if __name__ == "__main__":
    sys.exit(command())
