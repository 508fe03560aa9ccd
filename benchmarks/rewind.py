"""How exact a rewound cache is: its largest relative errors against a fresh prefill, in float32.

    python benchmarks/rewind.py

The models of tests/caches.py, with random weights: a random sequence is rewound to each of its
lengths, and windows and next-token logits are compared with those of a cache that has read no more.
Then so with fewer replayed tokens than the convolutions remember; the last lengths, whose windows
are at hand, are left out. Prints a table, then one JSON line.
"""

import copy
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from lfm_mlx import Model
from lfm_mlx.cache.conv_window import KEPT_COLUMNS
from lfm_mlx.cache.rewind import restore_windows, rewind
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.errors import InputError

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("scripts", "tests"))

from caches import CONFIGS, build, draw, fresh, windows
from reference import relative_error

DEEPEST = "24 layers of LFM2.5"
SHARES = (1, 8 / 9, 2 / 3, 4 / 9)  # of what the convolutions remember: 36, 32, 24 and 16 tokens


def largest_errors(
    model: Model, tokens: mx.array, lengths: Iterable[int], replayed: int
) -> dict[str, float]:
    """Over all lengths, of the windows and of the logits after one more token."""
    whole, following = fresh(model, tokens), draw(1, 1, 1)
    found = {"windows": 0.0, "logits": 0.0}
    for length in lengths:
        cache, other = copy.deepcopy(whole), fresh(model, tokens[:, :length])
        rewind(cache, length)
        restore_windows(cache, replayed, model._replay)
        got, wanted = (np.array(model(following, entries)) for entries in (cache, other))
        found["logits"] = max(found["logits"], relative_error(got, wanted))
        pairs = zip(windows(cache), windows(other), strict=True)
        found["windows"] = max(found["windows"], *(relative_error(a, b) for a, b in pairs))
    return found


def measure(length: int) -> list[dict[str, Any]]:
    rows, tokens = [], draw(0, 1, length)
    models = {name: build(name) for name in CONFIGS}
    asked = [(name, models[name].config.conv_memory) for name in CONFIGS]
    memory = models[DEEPEST].config.conv_memory
    asked += [(DEEPEST, round(share * memory)) for share in SHARES[1:]]
    for name, replayed in tqdm(asked, disable=None, leave=False):
        model = models[name]
        short = replayed < model.config.conv_memory
        lengths = range(1, length - KEPT_COLUMNS) if short else range(length)
        facts = {"model": name, "conv_layers": model.config.layer_types.count("conv")}
        found = largest_errors(model, tokens, lengths, replayed)
        rows.append(facts | {"replayed_tokens": replayed} | found)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':20} conv layers  replayed   windows    logits")
    for row in rows:
        print(f"{row['model']:20} {row['conv_layers']:11}  {row['replayed_tokens']:8}", end="")
        print(f"   {row['windows']:7.1e}   {row['logits']:7.1e}")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--length", type=int, default=300, help="tokens (default %(default)s)")
    args = parser.parse_args()
    if args.length <= KEPT_COLUMNS + 1:
        raise InputError(f"--length is {args.length}; expected more than {KEPT_COLUMNS + 1}")
    rows = measure(args.length)
    show(rows)
    print(json.dumps({"benchmark": "rewind", "tokens": args.length, "relative_errors": rows}))


if __name__ == "__main__":
    sys.exit(run(main, "rewind"))
