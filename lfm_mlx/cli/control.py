"""The Control that the command line asks for."""

import argparse
import json
from pathlib import Path
from typing import Any

from lfm_mlx.answer.control import Control
from lfm_mlx.cli.control_options import thinking_tokens
from lfm_mlx.errors import InputError, one_line


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
