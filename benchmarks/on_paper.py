"""A model's graph as a GPU would run it, without one: launches, command buffers, bytes pending.

Nothing is computed. A primitive that only looks at its input differently (reshape, slice, split,
broadcast) launches nothing, a concatenation one copy an input, any other primitive one kernel; a
Metal kernel, and each of MLX's fused operations, is one.
"""

import contextlib
import functools
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten

from lfm_mlx.kernels import metal

VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
# As it is outside `on_paper`.
evaluate = mx.eval
# MLX's own limits of a command buffer: launches and Mi elements, by the kind of chip.
OWN_LIMITS = {"base, Pro": (40, 40), "Max, Ultra": (40, 50)}
# Compiled functions of one launch, wherever they have been imported.
COMPILED = (
    *("mlx_lm.models.lfm2_moe.swiglu", "mlx_lm.models.switch_layers.swiglu"),
    *("lfm_mlx.kernels.projection.silu_times", "lfm_mlx.kernels.experts.silu_times"),
    "lfm_mlx.model.feed_forward.silu_times",
)
NODE = re.compile(r'\{ (\d+) \[label ="(\w+)"')
EDGE = re.compile(r"-> (\d+)$", re.M)


class Launch(NamedTuple):
    """One primitive that computes: kernels it launches, and the buffers it touches.

    buffers: a name and elements of each, in the order in which MLX meets them
    made_bytes: what its outputs take
    """

    kernels: int
    buffers: list[tuple[str, int]]
    made_bytes: int


def launched(inputs: Sequence[Any], shapes: Sequence[Any], dtypes: Sequence[mx.Dtype]) -> Any:
    """Arrays of these shapes out of one primitive, which has the inputs of a launch."""
    outputs = [output(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return mx.depends(outputs, [item for item in inputs if isinstance(item, mx.array)])


def blank(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Zeros that take no memory."""
    zeros = mx.broadcast_to(mx.array(0, dtype), shape)
    evaluate(zeros)
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
def on_paper(evaluated: list[Any] | None = None) -> Iterator[None]:
    """Inside, graphs are those of a GPU; they cannot be computed.

    MLX writes its fused operations out in small ones for a CPU: here they are one node.

    evaluated: where given, gets what the model would evaluate halfway
    """
    with contextlib.ExitStack() as stack:
        for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
            stack.enter_context(mock.patch.object(mx.fast, name, like_first))
        for name in COMPILED:
            stack.enter_context(mock.patch(name, like_first))
        stack.enter_context(mock.patch.object(mx, "contiguous", like_first))
        stack.enter_context(mock.patch.object(mx, "dequantize", dequantized))
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", CountedKernel))
        stack.enter_context(mock.patch.object(metal, "available", return_value=True))
        for room in ("model.decoder", "engine.sample"):
            stack.enter_context(mock.patch(f"lfm_mlx.{room}.working", lambda kernels: kernels))
        if evaluated is not None:
            record = mock.patch.object(mx, "eval", lambda *arrays: evaluated.append(arrays))
            stack.enter_context(record)
        yield


def trace(outputs: Any) -> list[Launch]:
    """Everything that computes `outputs`, in an order in which it can run.

    Raises ValueError for a graph with functions that MLX has fused by compiling.
    """
    arrays = [array for _, array in tree_flatten(outputs) if isinstance(array, mx.array)]
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, lambda: arrays)
    same: dict[str, str] = {}  # of a view what it looks at, of what was met before its first name
    met: dict[tuple[Any, ...], list[str]] = {}
    found = []
    for node in nodes:
        if node["type"] != "primitive":
            continue
        read = [(same.get(name, name), shape) for name, shape, _ in node["inputs"]]
        made = node["outputs"]
        if node["name"] in VIEWS:
            same |= {name: read[0][0] for name, *_ in made}
            continue
        key = (node["name"], repr(node["arguments"]), tuple(read), tuple(part[1] for part in made))
        names = [name for name, *_ in made]
        if key in met:
            same |= dict(zip(names, met[key], strict=True))
            continue
        met[key] = names
        # `launched` puts in the outputs' place arrays that no launch reads.
        read = read[len(made) :] if node["name"] == "Depends" else read
        found.append(
            Launch(
                len(read) if node["name"] == "Concatenate" else 1,
                [(name, math.prod(shape)) for name, shape in [*read, *(p[:2] for p in made)]],
                sum(math.prod(shape) * dtype.size for _, shape, dtype in made),
            )
        )
    return found


def count(outputs: Any) -> int:
    """The launches it takes to compute `outputs`."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *(array for _, array in tree_flatten(outputs)))
    text = graph.getvalue()
    inputs = Counter(EDGE.findall(text))
    return sum(
        inputs[node] if label == "Concatenate" else label not in VIEWS
        for node, label in NODE.findall(text)
    )


def command_buffers(launches: Sequence[Launch], max_launches: int, max_mebi: int) -> int:
    """Into how many command buffers MLX cuts these launches.

    Its rule (backend/metal/device.cpp): after a primitive a buffer ends if it has more launches
    than one limit, or if the elements of the distinct arrays it touches exceed the other.
    """
    ended = kernels = elements = 0
    seen: set[str] = set()
    for launch in launches:
        kernels += launch.kernels
        for name, size in launch.buffers:
            elements += 0 if name in seen else size
            seen.add(name)
        if kernels > max_launches or elements >> 20 > max_mebi:
            ended, kernels, elements, seen = ended + 1, 0, 0, set()
    return ended + (kernels > 0)


def pending_bytes(evaluated: Sequence[Any]) -> int:
    """The most that is computed between two of these evaluations, if none of it is given back."""
    totals = [0, *(sum(launch.made_bytes for launch in trace(arrays)) for arrays in evaluated)]
    return max(after - before for before, after in itertools.pairwise(totals))
