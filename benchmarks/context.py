"""Time per token against the length of the context, up to 128 K, at a small width.

    python benchmarks/context.py --plot benchmarks/context.svg

Two models of one width: LFM2.5's 24 layers, and its 18 convolution layers alone; the difference is
what attention adds. Feed-forwards are dense and small, lest they hide it. For each length a cache
is filled with random numbers; in each round every model reads a chunk and decodes a token after
every length, and is rewound. Medians over the rounds. Prints a table, then one JSON line; --plot
has both axes logarithmic.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
from memory import filled_cache

from lfm_mlx import Config, Model
from lfm_mlx.cache.cache import cache_state
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.errors import InputError

ATTENTION = (2, 6, 10, 14, 18, 21)
LENGTHS = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
LINES = {
    "prefill_convolutions": ("prefill, conv layers alone", "#2a78b5"),
    "prefill_whole": ("prefill, all layers", "#c4442b"),
    "decode_convolutions": ("decode, conv layers alone", "#7fb4d8"),
    "decode_whole": ("decode, all layers", "#e39a85"),
}


def small_model(width: int, attention: bool) -> Model:
    """LFM2.5's layers with random weights, `width` wide, heads 64 wide, two on each key."""
    kinds = ["full_attention" if layer in ATTENTION else "conv" for layer in range(24)]
    kinds = kinds if attention else [kind for kind in kinds if kind == "conv"]
    heads = width // 64
    config = Config.from_dict(
        {
            "model_type": "lfm2", "vocab_size": 1024, "hidden_size": width,
            "intermediate_size": width, "block_auto_adjust_ff_dim": False, "norm_eps": 1e-5,
            "conv_L_cache": 3, "conv_bias": False, "tie_word_embeddings": True,
            "num_hidden_layers": len(kinds), "layer_types": kinds, "num_attention_heads": heads,
            "num_key_value_heads": heads // 2, "max_position_embeddings": 1 << 18,
            "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
        }
    )  # fmt: skip
    model = Model(config)
    mx.eval(model.parameters())
    return model


def read(model: Model, cache: list[Any], count: int) -> float:
    """Seconds."""
    began = time.perf_counter()
    logits = model(mx.zeros((1, count), mx.int32), cache)[:, -1]
    mx.eval(logits, cache_state(cache))
    return time.perf_counter() - began


def read_after(model: Model, cache: list[Any], length: int, count: int) -> float:
    """Seconds of reading `count` tokens after `length`; one more before, to rebuild the windows."""
    rewind(cache, length - 1)
    read(model, cache, 1)
    return read(model, cache, count)


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds a token at each length, medians over the rounds."""
    models = {
        "whole": small_model(args.width, True),
        "convolutions": small_model(args.width, False),
    }
    caches = {
        (length, name): filled_cache(model, length, None, mx.float32)
        for length, (name, model) in product(args.lengths, models.items())
    }
    taken = defaultdict[tuple[int, str], list[float]](list)
    for number in range(args.runs):
        for (length, name), cache in caches.items():
            print(f"round {number + 1}: {length} tokens, {name}", file=sys.stderr)
            for phase, count in (("prefill", args.chunk), ("decode", 1)):
                seconds = read_after(models[name], cache, length, count)
                taken[length, f"{phase}_{name}"].append(seconds / count)
    return [
        {"context_tokens": length} | {key: statistics.median(taken[length, key]) for key in LINES}
        for length in args.lengths
    ]


def show(rows: list[dict[str, float]]) -> None:
    print("microseconds a token  prefill:                                  decode:")
    print("context       conv layers  all layers  attention's share    conv layers  all layers")
    for row in rows:
        one, all_ = 1e6 * row["prefill_convolutions"], 1e6 * row["prefill_whole"]
        share = f"{100 * max(0.0, 1 - one / all_):18.0f}%"
        decode = (1e6 * row["decode_convolutions"], 1e6 * row["decode_whole"])
        print(f"{row['context_tokens']:7} {one:17.1f} {all_:11.1f} {share}", end="")
        print(f"{decode[0]:15.0f} {decode[1]:11.0f}")


def plot(rows: list[dict[str, float]]) -> str:
    """The rows as an SVG, lengths across and microseconds a token up, both logarithmic."""
    times = [1e6 * row[key] for row in rows for key in LINES]
    low, high = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)))
    first, last = rows[0]["context_tokens"], rows[-1]["context_tokens"]

    def x(tokens: float) -> float:
        return 70 + 540 * math.log(tokens / first) / math.log(last / first)

    def y(microseconds: float) -> float:
        return 340 - 310 * math.log(microseconds / low) / math.log(high / low)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 460" '
             'font-family="sans-serif" font-size="12">',
             '<rect width="640" height="460" fill="white"/>']  # fmt: skip
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        height = y(10**power)
        parts.append(f'<path d="M70 {height:.1f}H610" stroke="#ddd"/>')
        parts.append(text(64, height + 4, f"{10 ** (power - 3):g} ms", 'text-anchor="end"'))
    for row in rows:
        tokens = row["context_tokens"]
        parts.append(text(x(tokens), 358, f"{tokens // 1000} K", 'text-anchor="middle"'))
    parts.append(text(340, 378, "tokens of context", 'text-anchor="middle"'))
    parts.append(text(70, 18, "time per token", 'font-weight="bold"'))
    for number, (key, (name, colour)) in enumerate(LINES.items()):
        points = " ".join(f"{x(r['context_tokens']):.1f},{y(1e6 * r[key]):.1f}" for r in rows)
        line = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<polyline points="{points}" {line}/>')
        left, top = 90 + 280 * (number % 2), 408 + 24 * (number // 2)
        parts.append(f'<path d="M{left} {top}h24" {line}/>')
        parts.append(text(left + 32, top + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--width", type=int, default=128, help="a multiple of 128 (default %(default)s)")
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="context, in tokens")
    add("--chunk", type=int, default=128, help="prompt tokens read in one pass")
    add("--runs", type=int, default=5, help="rounds")
    add("--plot", type=Path, metavar="FILE", help="write an SVG")
    args = parser.parse_args()
    lengths = list(args.lengths)
    if args.width < 128 or args.width % 128 or min(args.chunk, args.runs, *lengths) < 1:
        raise InputError("expected --width a multiple of 128; --chunk, --runs, lengths 1 or more")
    if args.plot is not None and len(set(lengths)) < 2:
        raise InputError("a plot needs two --lengths")
    args.lengths = sorted(lengths)
    rows = measure(args)
    show(rows)
    if args.plot is not None:
        args.plot.write_text(plot(rows), encoding="utf-8")
    facts = {"width": args.width, "chunk": args.chunk, "machine": platform.machine()}
    print(json.dumps({"benchmark": "context"} | facts | {"mlx": version("mlx"), "seconds": rows}))


if __name__ == "__main__":
    sys.exit(run(main, "context"))
