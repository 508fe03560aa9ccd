"""The options of the command line that say what an answer must be."""

import argparse

from lfm_mlx.errors import InputError


def add_thinking_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--max-thinking-tokens", type=int, metavar="N",
        help="close the think block after N tokens of thought",
    )  # fmt: skip
    add(
        "--no-thinking", action="store_true",
        help="begin with an empty think block, which the model was not trained for",
    )  # fmt: skip


def thinking_tokens(args: argparse.Namespace) -> int | None:
    """The budget of thoughts that the options ask for; None for any number."""
    if args.no_thinking and args.max_thinking_tokens:
        raise InputError("--no-thinking and --max-thinking-tokens exclude each other; give one")
    return 0 if args.no_thinking else args.max_thinking_tokens


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer must be")
    add_thinking_options(group)
    add = group.add_argument
    add("--json-schema", metavar="FILE", help="the answer is JSON that fits this JSON Schema")
    add("--regex", metavar="RE", help="the whole answer matches; no look-around, no \\b")
    add(
        "--choice", metavar="A|B|C",
        help="the answer is one of these; the probability of each is printed",
    )  # fmt: skip
    add("--tools", metavar="FILE", help="JSON list of tools on offer, as in a chat request")
    add(
        "--tool-choice", default="auto", metavar="auto|none|required|NAME",
        help="whether tools are called, or which one (default %(default)s)",
    )  # fmt: skip
