"""The options of the command line that say what an answer must be, and the Control they make."""

import argparse
import json
from pathlib import Path
from typing import Any

from lfm_mlx.answer.control import Control
from lfm_mlx.errors import InputError, one_line


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


def control_of(args: argparse.Namespace) -> Control:
    """The Control that the options ask for.

    Raises InputError for files that cannot be read, and for options that exclude each other.
    """
    schema = None if args.json_schema is None else _read_json(args.json_schema, "--json-schema")
    if args.json_schema is not None and not isinstance(schema, dict | bool):
        raise InputError(
            f"--json-schema {args.json_schema}: expected an object; got {schema!r:.40}"
        )
    tools = None if args.tools is None else _read_json(args.tools, "--tools")
    if not isinstance(tools, list | None):
        raise InputError(f"--tools {args.tools}: expected a list of tools")
    return Control(
        max_thinking_tokens=thinking_tokens(args),
        json_schema=schema,
        regex=args.regex,
        choices=() if args.choice is None else tuple(args.choice.split("|")),
        tools=tools,
        tool_choice=args.tool_choice,
    )


def _read_json(path: str, option: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{option} {path}: cannot be read ({reason})") from error
    except ValueError as error:
        raise InputError(f"{option} {path}: is not JSON ({one_line(error)})") from error
