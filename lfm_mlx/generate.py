"""Prompt → streamed text on a terminal, a pipe, or as JSON lines.

    python -m lfm_mlx.generate --model demo --prompt "What is 27 + 58?"

Text goes to stdout, statistics and progress to stderr.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from lfm_mlx import chat, memory, prompt_cache
from lfm_mlx.cache import rewind, stored_length
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.choice_scores import choice_probabilities
from lfm_mlx.command import DONE, INTERRUPTED, InputError, run
from lfm_mlx.config import Config
from lfm_mlx.constraint import Constraint
from lfm_mlx.control import Control
from lfm_mlx.control_options import add_options, control_of
from lfm_mlx.decode import PREFILL_CHUNK, decode, room_for_answer
from lfm_mlx.hub import resolve
from lfm_mlx.keys_values import BITS, Packing, pack
from lfm_mlx.load import DTYPES, as_dtype, load_model, load_tokenizer, loaded_bytes
from lfm_mlx.lookup import LONGEST_DRAFT, Lookup
from lfm_mlx.model import Model
from lfm_mlx.sample import Sampler, Sampling
from lfm_mlx.speculate import decode_with_lookup

DIM, CYAN, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[0m"
STYLES = {chat.THINKING: DIM, chat.TOOL_CALL: CYAN, chat.TEXT: ""}
MAX_TOKENS = 16384
CUT_SHORT = (
    "the token budget ended the answer before it was complete: it may not be what was asked for; "
    "give more --max-tokens"
)


@dataclass
class Statistics:
    """What a run took. Times in seconds since the prompt was handed over."""

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, from --prompt-cache
    generated_tokens: int = 0
    time_to_first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    peak_memory_bytes: int = 0
    passes: int = 0  # of the model after the prompt, with --lookup
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: str = "interrupted"

    @property
    def prompt_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens - self.reused_tokens, self.time_to_first_token_seconds)

    @property
    def generated_tokens_per_second(self) -> float:
        after_first = self.total_seconds - self.time_to_first_token_seconds
        return _rate(self.generated_tokens - 1, after_first)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "prompt_tokens_per_second": round(self.prompt_tokens_per_second, 3),
            "generated_tokens_per_second": round(self.generated_tokens_per_second, 3),
        }

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} of them reused)" if self.reused_tokens else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{reused}, "
            f"{self.prompt_tokens_per_second:.1f} tokens/s, "
            f"first token after {self.time_to_first_token_seconds:.2f} s\n"
            f"answer: {self.generated_tokens} tokens, {self.generated_tokens_per_second:.1f} "
            f"tokens/s, finished: {self.finish_reason}\n"
            f"{self._drafts()}peak memory: {self.peak_memory_bytes / 1e9:.2f} GB"
        )

    def _drafts(self) -> str:
        if not self.passes:
            return ""
        return (
            f"lookup: {self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted, "
            f"{self.generated_tokens / self.passes:.2f} tokens a pass\n"
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0


def stream(
    model: Model, tokenizer: Any, prompt: list[int], sampler: Sampler, max_tokens: int,
    statistics: Statistics, lookup: Lookup | None = None, **options: Any,
) -> Iterator[str]:  # fmt: skip
    """The answer's text, piece by piece; fills `statistics` as it goes. options: `decode`'s."""
    steps = decode if lookup is None else partial(decode_with_lookup, lookup=lookup)
    text = chat.TextStream(tokenizer)
    began = time.perf_counter()
    stops = tokenizer.eos_token_ids
    for step in steps(
        model, prompt, sampler=sampler, max_tokens=max_tokens, stop_ids=stops, **options
    ):
        statistics.total_seconds = time.perf_counter() - began
        statistics.generated_tokens += 1
        if statistics.generated_tokens == 1:
            statistics.time_to_first_token_seconds = statistics.total_seconds
        if lookup is not None:
            statistics.passes = lookup.passes
            statistics.drafted_tokens = lookup.drafted
            statistics.accepted_tokens = lookup.accepted
        if step.finish_reason is not None:
            statistics.finish_reason = step.finish_reason
        if step.finish_reason != "stop":
            yield from text.add(step.token)
    yield from text.finish()


class Printer:
    """Writes segments to stdout: styled on a terminal, with their tags in a pipe, or as JSON."""

    def __init__(self, show_thinking: bool, as_json: bool):
        self.show_thinking = show_thinking
        self.as_json = as_json
        self.styled = sys.stdout.isatty()
        self.kind = chat.TEXT

    def event(self, event: str, **content: Any) -> None:
        print(json.dumps({"event": event} | content, ensure_ascii=False), flush=True)

    def segment(self, segment: chat.Segment) -> None:
        if segment.kind == chat.THINKING and not self.show_thinking:
            return
        if self.as_json:
            calls = [asdict(call) for call in segment.calls]
            reason = {"reason": segment.reason} if segment.reason else {}
            self.event(segment.kind, text=segment.text, **({"calls": calls} if calls else reason))
            return
        if segment.begins:
            self.change(segment.kind)
        sys.stdout.write(segment.text)
        sys.stdout.flush()

    def change(self, kind: str) -> None:
        """Close the block that was being written and open one of this kind."""
        opening = {name: tag for tag, (_, name) in chat.TAGS.items()}
        closing = {name: tag for tag, name in chat.TAGS.values()}
        if self.styled:
            after = PLAIN + "\n" if self.kind != chat.TEXT else ""
            sys.stdout.write(after + STYLES[kind])
        else:
            sys.stdout.write(closing.get(self.kind, "") + opening.get(kind, ""))
        self.kind = kind

    def end(self) -> None:
        if not self.as_json:
            self.change(chat.TEXT)
            sys.stdout.write("\n")
            sys.stdout.flush()


def prompt_ids(args: argparse.Namespace, control: Control, tokenizer: Any) -> list[int]:
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
        return list(tokenizer.encode(prompt))
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*system, {"role": "user", "content": prompt}]
    return chat.render(tokenizer, messages, tools=control.tools)


def sampling_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Sampling:
    """The checkpoint's sampling with what the command line changes."""
    defaults = Sampling.of_checkpoint(checkpoint.generation_config)
    given = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    return replace(defaults, **{key: value for key, value in given.items() if value is not None})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm_mlx.generate", description="Answer a prompt.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, hub name, or demo")
    add("--prompt", help="the user's message (default: standard input)")
    add("--system", help="the system message")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add("--no-show-thinking", action="store_true", help="show the answer only")
    add("--json", action="store_true", help="one JSON object per event on stdout")
    add("--temp", type=float, dest="temperature", metavar="T", help="0: always the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this mass")
    add("--min-p", type=float, metavar="P", help="least probability, relative to the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="1: none")
    add("--seed", type=int, help="the same seed draws the same tokens")
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
    add("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 on a CPU")
    add("--check", action="store_true", help="refuse weights with NaN or infinity")
    add("--force", action="store_true", help="load even what does not fit in memory")
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens is {args.max_tokens}; expected 1 or more")
    control = control_of(args)
    folder = resolve(args.model)
    checkpoint = Checkpoint(folder)
    config = Config.from_dict(checkpoint.config)
    sampling = sampling_of(args, checkpoint)
    tokenizer = load_tokenizer(folder)
    prompt = prompt_ids(args, control, tokenizer)
    constraint = control.constraint(tokenizer, config.vocab_size)
    max_tokens = room_for_answer(config, len(prompt), args.max_tokens)
    packing = packing_of(args, config)
    lookup = lookup_of(args, constraint)
    steering = {"constraint": constraint} if lookup is None else {"lookup": lookup}
    if not args.force:
        require_room(checkpoint, config, args.dtype, len(prompt) + max_tokens, packing)
    loading = partial(tqdm, desc="load", unit="tensor", disable=None, leave=False)
    with memory.wired_limit():
        model = load_model(folder, dtype=args.dtype, check=args.check, progress=loading)
        sampler = Sampler(config.vocab_size, sampling, args.seed)
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
    rewind(cache, prompt_cache.common_length(cache, prompt))
    return cache


def require_room(
    checkpoint: Checkpoint, config: Config, dtype: str | None, context: int,
    packing: Packing | None = None,
) -> None:  # fmt: skip
    """Raise InputError when weights and cache of `context` tokens cannot fit."""
    target = as_dtype(dtype)
    itemsize = target.size if target is not None else 2
    weight_bytes = loaded_bytes(config, checkpoint.tensors, target)
    measured = config.cache_bytes if packing is None else partial(packing.nbytes, config)
    memory.require_room(weight_bytes, measured(context, itemsize), context)


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
    if control.choices and code == DONE and constraint.begun:
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
