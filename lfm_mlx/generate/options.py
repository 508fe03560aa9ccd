"""The options of generate."""

import argparse

from lfm_mlx.cli.command import Parser
from lfm_mlx.cli.control_options import add_options
from lfm_mlx.cli.model_options import MAX_TOKENS, add_model_options, add_sampling_options

# Bits of quantized keys and values, and tokens drafted for a pass by prompt lookup.
KV_BITS = (8, 4)
LONGEST_DRAFT = 16


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lfm_mlx.generate", description="Answer a prompt.")
    add = parser.add_argument
    add(
        "question", nargs="*", metavar="QUESTION",
        help="the user's message; text that is piped in is joined to it",
    )  # fmt: skip
    add("--prompt", metavar="TEXT", help="the user's message (default: standard input)")
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
    add(
        "--prompt-cache",
        metavar="FILE",
        help="keep the processed prompt in FILE, and reuse it next time",
    )
    add("--kv-bits", type=int, choices=KV_BITS, help="quantize keys and values")
    add("--kv-group-size", type=int, metavar="G", help="default: what the head width allows")
    add("--kv-start", type=int, metavar="N", help="quantize once N tokens were read (default 0)")
    add_options(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    return parser
