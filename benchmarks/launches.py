"""GPU launches of one decode step, counted in the lazy graph: this package and mlx-lm's own class.

    python benchmarks/launches.py
    python benchmarks/launches.py --bits 8 --steps 50

Nothing is computed, so no GPU is needed. A primitive that only looks at its input differently
(reshape, slice, split, broadcast) launches nothing, a concatenation one copy an input, any other
primitive one kernel; a Metal kernel, and each of MLX's fused operations, is one. The step is one
greedy token of one sequence, after a short context, at the full configuration of LFM2.5-8B-A1B.

Beside it: how long Python takes to build that graph, at the full depth and a tiny width, in turns;
the bytes a token reads; and the tokens per second at which that fills a chip's memory bandwidth.
Prints tables, then one JSON line.
"""

import argparse
import contextlib
import functools
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import lfm2_moe

from lfm_mlx import Config, Model
from lfm_mlx.cache.conv_window import ConvWindow
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.engine.sample import Sampler
from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from make_random_checkpoint import FULL

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
NODE = re.compile(r'\{ (\d+) \[label ="(\w+)"')
EDGE = re.compile(r"-> (\d+)$", re.M)
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


def launched(inputs: Sequence[Any], shapes: Sequence[Any], dtypes: Sequence[mx.Dtype]) -> Any:
    """Arrays of these shapes out of one primitive, which has the inputs of a launch."""
    outputs = [output(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return mx.depends(outputs, [item for item in inputs if isinstance(item, mx.array)])


def blank(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Zeros that take no memory."""
    zeros = mx.broadcast_to(mx.array(0, dtype), shape)
    mx.eval(zeros)
    return zeros


output = functools.cache(blank)


class CountedKernel:
    """In the place of what `mx.fast.metal_kernel` builds."""

    def __init__(self, **_: Any):
        pass

    def __call__(
        self, *, inputs: Sequence[Any], output_shapes: Any, output_dtypes: Any, **_: Any
    ) -> list[mx.array]:
        return launched(inputs, output_shapes, output_dtypes)


def like_first(first: mx.array, *others: Any, **options: Any) -> mx.array:
    """One launch that gives what has the shape of its first input."""
    inputs = (first, *others, *options.values())
    return launched(inputs, [first.shape], [first.dtype])[0]


def dequantized(
    weight: mx.array, scales: mx.array, biases: Any = None, group_size: int = 64, *_: Any, **__: Any
) -> mx.array:
    shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
    return launched([weight, scales, biases], [shape], [scales.dtype])[0]


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """Inside, graphs are those of a GPU; they cannot be computed.

    MLX writes its fused operations out in small ones for a CPU: here they are one node.
    """
    with contextlib.ExitStack() as stack:
        for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
            stack.enter_context(mock.patch.object(mx.fast, name, like_first))
        stack.enter_context(mock.patch.object(mx, "dequantize", dequantized))
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", CountedKernel))
        stack.enter_context(mock.patch.object(metal, "available", return_value=True))
        stack.enter_context(mock.patch("lfm_mlx.model.decoder.working", lambda kernels: kernels))
        yield


def count(outputs: Any) -> int:
    """The launches it takes to compute `outputs`."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *(array for _, array in tree_flatten(outputs)))
    text = graph.getvalue()
    inputs: dict[str, int] = {}
    for node in EDGE.findall(text):
        inputs[node] = inputs.get(node, 0) + 1
    return sum(
        inputs[node] if label == "Concatenate" else label not in VIEWS
        for node, label in NODE.findall(text)
    )


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


def greedy(model: Any) -> Callable[[mx.array], Sequence[mx.array]]:
    """The token and its log-probability, as each engine takes them from logits [1, V]."""
    if isinstance(model, Model):
        return Sampler(model.config.vocab_size, seed=0)

    def draw(logits: mx.array) -> list[mx.array]:
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs]

    return draw


def begun(config: dict[str, Any], model: Any) -> list[Any]:
    """A cache that has read 4 tokens, with room for more."""
    cache = model.make_cache()
    width, heads = config["hidden_size"], config["num_key_value_heads"]
    head_dim = width // config["num_attention_heads"]
    for entry in cache:
        if hasattr(entry, "offset"):
            entry.keys = entry.values = blank((1, heads, 256, head_dim), mx.bfloat16)
            entry.offset = 4
        else:
            window = blank((1, config["conv_L_cache"] - 1, width), mx.bfloat16)
            if isinstance(entry, ConvWindow):
                entry.window = window
            else:
                entry[0] = window
    return cache


def step(model: Any, cache: list[Any], draw: Callable[[mx.array], Any]) -> list[Any]:
    """Everything that one more token computes: token, log-probability, and the moved cache."""
    logits = model(mx.array([[5]]), cache)[:, -1]
    moved = [
        (entry.keys, entry.values) if hasattr(entry, "offset")
        else entry.window if isinstance(entry, ConvWindow) else entry[0]
        for entry in cache
    ]  # fmt: skip
    return [draw(logits), moved]


ENGINES: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "mlx-lm": stock,
    "operations": functools.partial(ours, False),
    "kernels": functools.partial(ours, True),
}


def launches(engine: str, config: dict[str, Any], bits: int) -> int:
    """Of one token through a model of this configuration."""
    with on_paper():
        model = ENGINES[engine](config, bits)
        return count(step(model, begun(config, model), greedy(model)))


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
                cache, draw = begun(TINY, model), greedy(model)
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


def main() -> None:
    args = parser().parse_args()
    if min(args.steps, args.runs) < 1:
        raise InputError("expected --steps and --runs of 1 or more")
    found = {engine: by_kind(engine, args.bits) for engine in ENGINES}
    show_launches(found)
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
        "reference_launches_per_token": found["operations"]["a token"],
        "mlx_lm_launches_per_token": found["mlx-lm"]["a token"],
        "launches": found,
        "graph_seconds_per_step": seconds,
        "weight_bytes_per_token": read,
        "ceiling_tokens_per_second": {c: 1e9 * speed / read for c, speed in CHIPS.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, "launches"))
