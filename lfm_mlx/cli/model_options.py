"""The options of the command line that say which model runs and how its tokens are drawn.

Importing this costs nothing: MLX is imported by what acts on the options (`selected_model`).
"""

import argparse
import datetime
import os

from lfm_mlx.errors import InputError

# The dtypes of `lfm_mlx.load`, by name.
DTYPES = ("float32", "bfloat16", "float16")
# The longest answer where nothing else is asked for: thoughts take most of it.
MAX_TOKENS = 16384

# The environment variable that names a model for commands that are not told one.
MODEL_VARIABLE = "LFM_MLX_MODEL"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how tokens are drawn").add_argument
    add("--temp", type=float, dest="temperature", metavar="T", help="0: always the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this mass")
    add("--min-p", type=float, metavar="P", help="least probability, relative to the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="1: none")
    add("--presence-penalty", type=float, metavar="R", help="taken from what was answered; 0: none")
    add("--frequency-penalty", type=float, metavar="R", help="the same, each time; 0: none")
    add("--seed", type=int, help="the same seed draws the same tokens")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    named = os.environ.get(MODEL_VARIABLE)
    add(
        "--model", required=not named, default=named,
        help=f"folder, hub name, or demo (default: what {MODEL_VARIABLE} names)",
    )  # fmt: skip
    add("--revision", help="branch, tag or commit of a hub name (or NAME@REVISION)")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's; float32 on a CPU")
    add("--check", action="store_true", help="refuse weights with NaN or infinity")
    add("--force", action="store_true", help="load even what does not fit in memory")
    add("--date", metavar="YYYY-MM-DD", help="the day the model is told (default: today)")


def day(text: str | None) -> str:
    """The day as YYYY-MM-DD; today if None."""
    try:
        return (datetime.date.fromisoformat(text) if text else datetime.date.today()).isoformat()
    except ValueError:
        raise InputError(f"--date is {text!r}; expected YYYY-MM-DD") from None


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError for an option of these that is a number below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
