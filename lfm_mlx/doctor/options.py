"""The options of doctor."""

import argparse

from lfm_mlx.cli.command import Parser
from lfm_mlx.cli.model_options import DTYPES

# The operations with a kernel.
OPERATIONS = ("short_conv", "norm_router", "qk_norm_rope", "projection", "experts", "sample")


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.doctor", description="Examine the kernels on this machine.")
    add = parser.add_argument
    add("--quick", action="store_true", help="without the head's shapes, and fewer tokens")
    add("--dtype", choices=DTYPES, help="of activations (default: each)")
    add("--kernel", choices=OPERATIONS, action="append", help="examine this one (repeatable)")
    add("--model", default="demo", help="what decodes: folder, hub name, or demo (default)")
    add("--runs", type=int, default=5, help="rounds whose medians are told (default %(default)s)")
    return parser
