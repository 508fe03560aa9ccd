"""The options of chat."""

import argparse

from lfm_mlx.cli.command import Parser
from lfm_mlx.cli.control_options import add_thinking_options
from lfm_mlx.cli.model_options import MAX_TOKENS, add_model_options, add_sampling_options


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.chat", description="Converse on a terminal, or through pipes.")
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message")
    add("--conversation", metavar="FILE", help="go on with this one if it is there, and keep it")
    add("--tools", metavar="FILE.py", help="offer the public functions of a Python file")
    add("--yes", action="store_true", help="run tools without asking")
    add("--tool-seconds", type=float, default=30.0, metavar="S",
        help="how long one call of a tool may take (default %(default)g)")  # fmt: skip
    add("--no-show-thinking", action="store_true", help="begin with thoughts folded away")
    add("--plain", action="store_true", help="on a terminal too, be as in a pipe")
    add("--max-tokens", type=int, default=MAX_TOKENS, help="longest answer (default %(default)s)")
    add_thinking_options(parser.add_argument_group("thinking"))
    add_sampling_options(parser)
    add_model_options(parser)
    return parser
