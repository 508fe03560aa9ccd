"""GPU launches of one decode step, counted in the lazy graph: this package and mlx-lm's own class.

    python benchmarks/launches.py
    python benchmarks/launches.py --bits 8 --steps 50

Nothing is computed, so no GPU is needed (`on_paper.py`). The step is one token of one sequence,
after a short context, at the full configuration of LFM2.5-8B-A1B: greedy, and with the recommended
sampling. Also into how many command buffers MLX cuts it, and the most memory that a prompt of
2,048 tokens leaves pending.

Beside it: how long Python takes to build that graph, at the full depth and a tiny width, in turns;
the bytes a token reads; and the tokens per second at which that fills a chip's memory bandwidth.
Prints tables, then one JSON line.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import lfm2_moe
from mlx_lm.sample_utils import make_repetition_penalty, make_sampler

from lfm_mlx import Config, Model
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.command_buffers import LARGE, MAX_LAUNCHES, MAX_MEBI_ELEMENTS
from lfm_mlx.engine.sample import GREEDY, Sampler, Sampling
from lfm_mlx.errors import InputError

sys.path += [str(Path(__file__).parents[1] / "scripts"), str(Path(__file__).parent)]

from make_random_checkpoint import FULL
from on_paper import (
    OWN_LIMITS,
    blank,
    command_buffers,
    count,
    on_paper,
    pending_bytes,
    trace,
)

# Apple's published memory bandwidth, GB/s.
CHIPS = {"M1": 68, "M2": 100, "M3": 100, "M4": 120, "M1 Pro": 200, "M3 Pro": 150, "M4 Pro": 273,
         "M1 Max": 400, "M4 Max": 546, "M3 Ultra": 819}  # fmt: skip
# How often the full model has each kind.
NUMBERS = {
    "conv layer": 18, "attention layer": 6, "sparse feed-forward": 22, "dense feed-forward": 2,
    "embedding, head, sampling": 1,
}  # fmt: skip
TINY = FULL | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def packed(model: Any, bits: int) -> Any:
    """The model with quantized weights that take no memory: one number, broadcast."""
    nn.quantize(
        model, 64, bits, class_predicate=lambda path, module: hasattr(module, "to_quantized")
        and not path.endswith("feed_forward.gate"),
    )  # fmt: skip

    def emptied(name: str, array: mx.array) -> mx.array:
        halved = array.dtype == mx.float32 and not name.endswith("expert_bias")
        return blank(array.shape, mx.bfloat16 if halved else array.dtype)

    model.update(tree_map_with_path(emptied, model.parameters()))
    model.eval()
    return model


def ours(kernels: bool, config: dict[str, Any], bits: int) -> Any:
    model = packed(Model(Config.from_dict(config), use_kernels=kernels), bits)
    model.merge_projections()
    return model


def stock(config: dict[str, Any], bits: int) -> Any:
    known = config | {"rope_theta": config["rope_parameters"]["rope_theta"]}
    return packed(lfm2_moe.Model(lfm2_moe.ModelArgs.from_dict(known)), bits)


def of_layers(kinds: Sequence[str], dense: int) -> dict[str, Any]:
    return FULL | {
        "num_hidden_layers": len(kinds), "layer_types": list(kinds), "num_dense_layers": dense,
    }  # fmt: skip


RECOMMENDED = Sampling()
ROWS = (2, 4, 8, 16)
PROMPT = 2048


def drawing(model: Any, sampling: Sampling) -> Callable[[mx.array], Any]:
    """The token and its log-probability, as each engine takes them from logits [1, V]."""
    if isinstance(model, Model):
        sampler = Sampler(model.config.vocab_size, sampling, seed=0, kernels=model.kernels)
        sampler.observe([1, 2])
        mx.eval(*(sampler.seen or ()))
        return sampler
    mx.random.seed(0)  # else the graph has what drew the weights
    sampler = make_sampler(temp=sampling.temperature, top_k=sampling.top_k)
    penalty = sampling.repetition_penalty
    processors = [make_repetition_penalty(penalty, 20)] if penalty != 1.0 else []

    def draw(logits: mx.array) -> list[mx.array]:
        for processor in processors:
            logits = processor(mx.array([1, 2]), logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [sampler(logprobs), logprobs]

    return draw


def begun(config: dict[str, Any], model: Any, rows: int = 1) -> list[Any]:
    """A cache of `rows` that have read 4 tokens, with room for more."""
    cache = model.make_cache()
    width, heads = config["hidden_size"], config["num_key_value_heads"]
    head_dim = width // config["num_attention_heads"]
    for entry in cache:
        if hasattr(entry, "offset"):
            entry.keys, entry.values = (
                blank((rows, heads, 256, head_dim), mx.bfloat16) for _ in range(2)
            )
            entry.offset = 4
        else:
            window = blank((rows, config["conv_L_cache"] - 1, width), mx.bfloat16)
            if isinstance(entry, ConvWindow):
                entry.window = window
            else:
                entry[0] = window
    return cache


def moved(cache: Sequence[Any]) -> list[Any]:
    """What every entry of a cache holds."""
    return [
        (entry.keys, entry.values) if hasattr(entry, "offset")
        else entry.window if isinstance(entry, ConvWindow) else entry[0]
        for entry in cache
    ]  # fmt: skip


def step(model: Any, cache: list[Any], draw: Callable[[mx.array], Any], rows: int = 1) -> list[Any]:
    """Everything that one more token a row computes: tokens, log-probabilities, moved cache."""
    logits = model(mx.array([[5]] * rows), cache)[:, -1]
    return [draw(logits), moved(cache)]


ENGINES: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "mlx-lm": stock,
    "operations": functools.partial(ours, False),
    "kernels": functools.partial(ours, True),
}


def launches(engine: str, config: dict[str, Any], bits: int, sampling: Sampling = GREEDY) -> int:
    """Of one token through a model of this configuration."""
    with on_paper():
        model = ENGINES[engine](config, bits)
        return count(step(model, begun(config, model), drawing(model, sampling)))


def row_launches(bits: int, rows: int) -> int:
    """Of one token for each of several rows, before anything is drawn."""
    with on_paper():
        model = ours(True, FULL, bits)
        return count(step(model, begun(FULL, model, rows), lambda logits: logits, rows))


def prompt_pending_bytes(bits: int, tokens: int) -> dict[str, int]:
    """The most that a prompt computes between two evaluations: as it is, and all at once."""
    evaluated: list[Any] = []
    with on_paper(evaluated):
        model = ours(True, FULL, bits)
        cache = model.make_cache()
        h = model.model.embed_tokens(mx.zeros((1, tokens), mx.int32))
        evaluated.clear()
        last = model.model.through_layers(h, cache, model.running_kernels())
        evaluated.append([last, moved(cache)])
        return {
            "evaluated every few layers": pending_bytes(evaluated),
            "evaluated at its end": pending_bytes(evaluated[-1:]),
        }


def dense_launches(engine: str, bits: int) -> int:
    """Of the feed-forward of a dense layer with its norm and residual."""
    with on_paper():
        model = ENGINES[engine](of_layers(["conv", "full_attention"], 2), bits)
        layer, x = model.layers[0], blank((1, 1, FULL["hidden_size"]), mx.bfloat16)
        if engine == "mlx-lm":
            return count([x + layer.feed_forward(layer.ffn_norm(x))])
        return count([layer.feed_forward(x, layer.ffn_norm, model.running_kernels())])


def by_kind(engine: str, bits: int) -> dict[str, int]:
    """Launches of each kind of layer, and in total, from models of a few layers."""
    two = launches(engine, of_layers(["conv", "full_attention"], 2), bits)
    three = launches(engine, of_layers(["conv", "conv", "full_attention"], 3), bits)
    sparse = launches(engine, of_layers(["conv", "full_attention"], 1), bits)
    four = launches(engine, of_layers(["conv", "full_attention", "full_attention"], 3), bits)
    dense = dense_launches(engine, bits)
    found = {
        "conv layer": three - two - dense,
        "attention layer": four - two - dense,
        "sparse feed-forward": sparse - two + dense,
        "dense feed-forward": dense,
    }
    found["embedding, head, sampling"] = (
        two - found["conv layer"] - found["attention layer"] - 2 * dense
    )
    found["a token"] = launches(engine, FULL, bits)
    return found


def show_launches(found: dict[str, dict[str, int]]) -> None:
    print(f"{'launches':28}", *(f"{engine:>11}" for engine in found))
    for kind, number in (NUMBERS | {"a token": 1}).items():
        title = f"{number} x {kind}" if number > 1 else kind
        print(f"{title:28}", *(f"{row[kind]:11}" for row in found.values()))


def bytes_per_token(bits: int) -> int:
    """The weights one token reads: all but the experts it does not choose."""
    model = stock(FULL, bits)
    share = FULL["num_experts_per_tok"] / FULL["num_experts"]
    return round(
        sum(
            array.nbytes * (share if ".switch_mlp." in name else 1)
            for name, array in tree_flatten(model.parameters())
        )
    )


def graph_seconds(steps: int, runs: int, bits: int) -> dict[str, float]:
    """Of building the graph of one step, Python's part with it; medians, engines in turns."""
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with on_paper():
        models = {engine: build(TINY, bits) for engine, build in ENGINES.items()}
        for _ in range(runs + 1):
            for engine, model in models.items():
                cache, draw = begun(TINY, model), drawing(model, GREEDY)
                began = time.perf_counter()
                for _ in range(steps):
                    step(model, cache, draw)
                seconds[engine].append((time.perf_counter() - began) / steps)
    return {engine: statistics.median(found[1:]) for engine, found in seconds.items()}


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--bits", type=int, default=4, choices=(4, 5, 6, 8), help="of the weights (default 4)")
    add("--steps", type=int, default=20, help="decode steps in a run of the graph's timing")
    add("--runs", type=int, default=9)
    return parser


def cuts(bits: int) -> dict[str, dict[str, int]]:
    """Command buffers of a greedy token, by engine and limits."""
    limits = OWN_LIMITS | {"ours": (LARGE[MAX_LAUNCHES], LARGE[MAX_MEBI_ELEMENTS])}
    found: dict[str, dict[str, int]] = {}
    for engine in ("mlx-lm", "kernels"):
        with on_paper():
            model = ENGINES[engine](FULL, bits)
            traced = trace(step(model, begun(FULL, model), drawing(model, GREEDY)))
        found[engine] = {name: command_buffers(traced, *limit) for name, limit in limits.items()}
    return found


def main() -> None:
    args = parser().parse_args()
    if min(args.steps, args.runs) < 1:
        raise InputError("expected --steps and --runs of 1 or more")
    found = {engine: by_kind(engine, args.bits) for engine in ENGINES}
    show_launches(found)
    sampled = {engine: launches(engine, FULL, args.bits, RECOMMENDED) for engine in ENGINES}
    print(f"{'with recommended sampling':28}", *(f"{n:11}" for n in sampled.values()))
    rows = {rows: row_launches(args.bits, rows) for rows in ROWS}
    print("\nlaunches with kernels, but for drawing:", told(rows, "rows"))
    buffers = cuts(args.bits)
    for engine, numbers in buffers.items():
        print(f"command buffers of a token, {engine}: {told(numbers, 'limits')}")
    pending = prompt_pending_bytes(args.bits, PROMPT)
    gigabytes = ", ".join(f"{how} {size / 1e9:.2f} GB" for how, size in pending.items())
    print(f"pending at most in a prompt of {PROMPT}: {gigabytes}")
    seconds = graph_seconds(args.steps, args.runs, args.bits)
    read = bytes_per_token(args.bits)
    spent = (f"{engine} {1e3 * value:.2f}" for engine, value in seconds.items())
    print("\nmilliseconds to build a step's graph:", ", ".join(spent))
    print(f"{read / 1e9:.3f} GB of weights a token; at a chip's bandwidth, tokens/s at most:")
    print(", ".join(f"{chip} {1e9 * speed / read:.0f}" for chip, speed in CHIPS.items()))
    record = {
        "benchmark": "launches",
        "bits": args.bits,
        "metal_launches_per_token": found["kernels"]["a token"],
        "metal_launches_per_sampled_token": sampled["kernels"],
        "command_buffers_per_token": buffers["kernels"]["ours"],
        "reference_launches_per_token": found["operations"]["a token"],
        "mlx_lm_launches_per_token": found["mlx-lm"]["a token"],
        "mlx_lm_command_buffers_per_token": buffers["mlx-lm"]["Max, Ultra"],
        "launches": found,
        "launches_per_sampled_token": sampled,
        "launches_per_step_of_rows": rows,
        "command_buffers": buffers,
        "prompt_pending_bytes": pending,
        "graph_seconds_per_step": seconds,
        "weight_bytes_per_token": read,
        "ceiling_tokens_per_second": {c: 1e9 * speed / read for c, speed in CHIPS.items()},
    }
    print(json.dumps(record))


def told(numbers: Mapping[Any, int], what: str) -> str:
    return ", ".join(f"{number} ({name} {what})" for name, number in numbers.items())


if __name__ == "__main__":
    sys.exit(run(main, "launches"))
