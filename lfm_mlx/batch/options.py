"""The options of batch."""

import argparse
from pathlib import Path

from lfm_mlx.cli.command import Parser
from lfm_mlx.cli.model_options import add_model_options, add_sampling_options

MAX_TOKENS = 4096
BATCH_SIZE = 8


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.batch", description="Answer many prompts together.")
    add = parser.add_argument
    add(
        "--in",
        dest="source",
        required=True,
        type=Path,
        metavar="FILE.jsonl",
        help="requests; - for standard input",
    )
    add("--out", dest="target", required=True, type=Path, metavar="FILE.jsonl",
        help="results, added to those that are there; - for standard output")  # fmt: skip
    add("--max-tokens", type=int, default=MAX_TOKENS,
        help="longest answer where a line has no max_tokens (default %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N",
        help="answers decoded together (default %(default)s)")  # fmt: skip
    add_sampling_options(parser)
    add_model_options(parser)
    return parser
