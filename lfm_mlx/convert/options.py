"""The options of convert."""

import argparse

from lfm_mlx.cli.command import Parser
from lfm_mlx.cli.model_options import DTYPES

# The kinds of quantization.
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.convert", description="Make an MLX folder of a checkpoint.")
    parser.add_argument("--model", required=True, help="folder, hub name, or demo")
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--bits", type=int, help="quantize to this many bits: 2, 3, 4, 5, 6 or 8")
    parser.add_argument("--group-size", type=int, help="elements that share a scale")
    parser.add_argument("--mode", choices=MODES, help="kind of quantization (default affine)")
    parser.add_argument("--dtype", choices=DTYPES, help="of what stays floating")
    parser.add_argument("--check", action="store_true", help="refuse weights with NaN or infinity")
    parser.add_argument("--force", action="store_true", help="replace the folder at --out")
    return parser
