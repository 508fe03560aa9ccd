"""Every kernel beside its reference and beside mlx-lm's modules for the same, on random inputs.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --quick --kernel experts --dtype float16

The shapes are LFM2.5-8B-A1B's. A measurement is a chain of runs each of which needs the one before
it, as in a decode step; kernel, operations and mlx-lm take turns, and medians are told. "product
alone" has nothing folded in: there operations and mlx-lm are MLX's own matrix-vector product, which
the projection kernel must not be slower than. Without Metal there are no kernels to measure. Prints
a table, then one JSON line.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import lfm2_moe
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear
from mlx_lm.sample_utils import make_repetition_penalty, make_sampler
from tqdm import tqdm

from lfm_mlx.cli.command import Parser, run
from lfm_mlx.cli.model_options import at_least_one
from lfm_mlx.doctor.cases import Arrays, Case, Inputs, Run, Sizes, cases, real_sizes
from lfm_mlx.doctor.measure import attempt, microseconds
from lfm_mlx.kernels import metal
from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.load import DTYPES, as_dtype

REAL = real_sizes()
WAYS = ("kernel", "operations", "mlx-lm")


def linear(matrix: Matrix) -> Any:
    """mlx-lm's module with these weights: of a projection, or of a stack of experts."""
    *experts, rows, width = matrix.shape
    if matrix.scales is None:
        made = SwitchLinear if experts else nn.Linear
        module = made(width, rows, *experts, bias=False)
    else:
        made = QuantizedSwitchLinear if experts else nn.QuantizedLinear
        packing = {"group_size": matrix.group_size, "bits": matrix.bits}
        module = made(width, rows, *experts, bias=False, **packing)
    given = zip(("weight", "scales", "biases"), matrix[:3], strict=True)
    module.update({name: array for name, array in given if array is not None})
    return module


def rows_of(matrix: Matrix, begin: int, end: int) -> Matrix:
    """Some rows of a matrix, on their own in memory."""
    parts = {
        name: mx.contiguous(part[begin:end])
        for name, part in matrix._asdict().items()
        if isinstance(part, mx.array)
    }
    mx.eval(parts)
    return matrix._replace(**parts)


def norm(weight: mx.array, eps: float) -> nn.RMSNorm:
    module = nn.RMSNorm(weight.size, eps)
    module.weight = weight
    return module


def same(x: mx.array) -> mx.array:
    return x


def short_conv_of_mlx_lm(case: Case) -> Run:
    """ShortConv without its projections."""
    width, taps = case.inputs["taps"].shape
    read: Any = SimpleNamespace(hidden_size=width, conv_L_cache=taps, conv_bias=False)
    module: Any = lfm2_moe.ShortConv(read, 0)
    module.in_proj = module.out_proj = same
    module.conv.weight = case.inputs["taps"][..., None]

    def one(inputs: Inputs) -> Arrays:
        cache = ArraysCache(1)
        cache[0] = inputs["window"]
        return module(inputs["bcx"], cache=cache), cache[0]

    return one


def norm_router_of_mlx_lm(case: Case) -> Run:
    """ffn_norm, and what the sparse block does before its experts: the operations it is made of."""
    gate, chosen = linear(case.inputs["gate"]), case.inputs["experts_per_token"]
    ffn_norm = norm(case.inputs["norm_weight"], case.inputs["eps"])

    def one(inputs: Inputs) -> Arrays:
        normed = ffn_norm(inputs["x"])
        scores = mx.sigmoid(gate(normed))
        biased = scores.astype(mx.float32) + inputs["expert_bias"]
        indices = mx.argpartition(biased, kth=-chosen, axis=-1)[..., -chosen:]
        weights = mx.take_along_axis(scores, indices, axis=-1)
        weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + 1e-6) * 1.0
        return normed, indices, weights.astype(normed.dtype)

    return one


def qk_norm_rope_of_mlx_lm(case: Case) -> Run:
    """Attention between its projections, of which it has three."""
    given = case.inputs
    heads, kv_heads, width = given["num_heads"], given["num_kv_heads"], given["q_weight"].size
    ends = [heads * width, (heads + kv_heads) * width]
    parts = [mx.contiguous(part) for part in mx.split(given["qkv"], ends, axis=-1)]
    mx.eval(parts)
    rope = nn.RoPE(width, base=given["base"])
    k_norm = norm(given["k_weight"], given["eps"])

    def one(inputs: Inputs) -> Arrays:
        queries, keys, values = (part.reshape(*part.shape[:2], -1, width) for part in parts)
        queries = norm(inputs["q_weight"], inputs["eps"])(queries).transpose(0, 2, 1, 3)
        keys = k_norm(keys).transpose(0, 2, 1, 3)
        offset = inputs["offset"]
        return (
            rope(queries, offset=offset),
            rope(keys, offset=offset),
            values.transpose(0, 2, 1, 3),
        )

    return one


def projection_of_mlx_lm(case: Case) -> Run:
    """The modules with norm and residual around; where ours is merged, as many as mlx-lm has."""
    matrix = case.inputs["matrix"]
    ends = rows_apart(case)
    modules = [
        linear(rows_of(matrix, begin, end)) for begin, end in zip([0, *ends], ends, strict=False)
    ]
    weight = case.inputs.get("norm_weight")
    before = same if weight is None else norm(weight, case.inputs["eps"])

    def one(inputs: Inputs) -> Arrays:
        x = before(inputs["x"])
        found = [module(x) for module in modules]
        if inputs["swiglu"]:
            return (swiglu(*found),)
        if "residual" in inputs:
            return (inputs["residual"] + found[0],)
        return tuple(found)

    return one


def rows_apart(case: Case) -> list[int]:
    """Where the rows of each of mlx-lm's modules end in our matrix."""
    rows, width = case.inputs["matrix"].shape
    if case.inputs["swiglu"]:
        return [rows // 2, rows]
    if case.part == "q, k, v":
        return [width, width + (rows - width) // 2, rows]
    return [rows]


def experts_of_mlx_lm(case: Case) -> Run:
    """SwitchGLU, and the weighted sum and the residual after it."""
    given = case.inputs
    num_experts, features, width = given["gate"].shape
    module = SwitchGLU(width, features, num_experts)
    for name in ("gate", "up", "down"):
        setattr(module, f"{name}_proj", linear(given[name]))
    module.eval()

    def one(inputs: Inputs) -> Arrays:
        y = module(inputs["x"], inputs["indices"])
        return (inputs["residual"] + (y * inputs["weights"][..., None]).sum(axis=-2),)

    return one


def sample_of_mlx_lm(case: Case) -> Run:
    """What generate_step does with logits; it draws by other numbers."""
    row = case.inputs["row"]
    read = mx.array(np.flatnonzero(np.array(case.inputs["counts"][0])).astype(np.int32))
    penalize = make_repetition_penalty(row.repetition_penalty, 10**6)
    draw = make_sampler(temp=row.temperature, top_k=row.top_k)

    def one(inputs: Inputs) -> Arrays:
        logits = inputs["logits"]
        if row.repetition_penalty != 1.0:
            logits = penalize(read, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens = draw(logprobs)
        return tokens, mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]

    return one


OF_MLX_LM: dict[str, Callable[[Case], Run]] = {
    "short_conv": short_conv_of_mlx_lm,
    "norm_router": norm_router_of_mlx_lm,
    "qk_norm_rope": qk_norm_rope_of_mlx_lm,
    "projection": projection_of_mlx_lm,
    "experts": experts_of_mlx_lm,
    "sample": sample_of_mlx_lm,
}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Microseconds of each way, and ratios to the first of them; the kernel where it runs."""
    runs: dict[str, Run] = {
        "operations": case.with_operations, "mlx-lm": OF_MLX_LM[case.kernel](case),
    }  # fmt: skip
    if metal.available() and not isinstance(attempt(case), str):
        runs = {"kernel": case.with_kernel, **runs}
    took = microseconds(runs, case, rounds)
    ours = next(iter(took.values()))
    return {
        "kernel": case.kernel,
        "part": case.part,
        "weights": case.weights,
        "tokens": case.tokens,
        "microseconds": took,
        "times_as_long": {way: value / ours for way, value in took.items()},
    }


def show(found: Sequence[dict[str, Any]]) -> None:
    """A line a case: microseconds, and in brackets how many times the first way's."""
    print(f"{'kernel':13} {'where':15} weights tokens", *(f"{way + ', µs':>20}" for way in WAYS))
    for row in found:
        name = f"{row['kernel']:13} {row['part']:15} {row['weights']:7} {row['tokens']:6}"
        print(name, *(cell(row, way) for way in WAYS))


def cell(row: dict[str, Any], way: str) -> str:
    if way not in row["microseconds"]:
        return "-".rjust(20)
    return f"{row['microseconds'][way]:11.1f} ({row['times_as_long'][way]:5.2f}x)"


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="without the head's shapes")
    add("--dtype", choices=DTYPES, help="default: bfloat16; float32 on a CPU")
    add("--kernel", choices=metal.OPERATIONS, action="append", help="this one (repeatable)")
    add("--runs", type=int, default=7, help="rounds whose medians are told (default %(default)s)")
    return parser


def main(argv: list[str] | None = None, sizes: Sizes = REAL) -> None:
    args = parser().parse_args(argv)
    at_least_one(args, "runs")
    dtype = as_dtype(args.dtype) or mx.bfloat16
    shapes = replace(sizes, vocab=0) if args.quick else sizes
    bar = partial(tqdm, desc="kernels", unit="case", disable=None, leave=False)
    found = []
    for case in bar(cases(shapes, dtype, args.kernel or metal.OPERATIONS)):
        found.append(measure(case, args.runs))
        mx.clear_cache()
    if not metal.available():
        print("Metal is not there: no kernel runs, and what is compared are the operations")
    show(found)
    record = {
        "benchmark": "kernels",
        "dtype": str(dtype).rpartition(".")[2],
        "runs": args.runs,
        "metal": metal.available(),
        "machine": platform.machine(),
        "device": mx.device_info().get("device_name"),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "cases": found,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, "kernels"))
