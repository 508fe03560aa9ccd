"""Every operation on random inputs of a model's shapes, as a decode step and a prompt use it.

A case knows how a run can follow from the one before it, so that whoever times a chain of runs
sees them wait for each other, as the launches of a decode step do.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.config import Config
from lfm_mlx.files import read_json
from lfm_mlx.kernels.experts import experts
from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.metal import OPERATIONS
from lfm_mlx.kernels.projection import projection
from lfm_mlx.kernels.qk_norm_rope import qk_norm_rope
from lfm_mlx.kernels.router import norm_router
from lfm_mlx.kernels.sample import RowSampling, Seen, sample
from lfm_mlx.kernels.self_check import on_the_cpu
from lfm_mlx.kernels.short_conv import short_conv

Arrays = tuple[mx.array, ...]
Inputs = dict[str, Any]
Run = Callable[[Inputs], Arrays]

BITS = 4
GROUP_SIZE = 64
EPS = 1e-5
REAL_CONFIG = Path(__file__).with_name("lfm25_8b_a1b.json")
# What mlx-lm packs the router's gate in.
GATE_BITS = 8
# Tokens of which the router's cases take those that it decides most clearly.
CANDIDATES = 512
POSITION = 100
RECOMMENDED = RowSampling(0.2, 80, repetition_penalty=1.05, frequency_penalty=9.0)
# Where the sizes leave out the head.
SMALL_VOCAB = 4096
# The number between 0 and 1 that a token is drawn by.
DRAW = 0.25


@dataclass(frozen=True)
class Sizes:
    """Sizes that the shapes follow from. A vocabulary of 0 leaves out the head.

    tokens: of a decode step · prompt: tokens of a prompt
    """

    hidden: int
    dense: int
    expert: int
    experts: int
    chosen: int
    heads: int
    kv_heads: int
    head_dim: int
    taps: int
    vocab: int
    rope_theta: float = 5e6
    tokens: tuple[int, ...] = (1, 8)
    prompt: int = 512

    @classmethod
    def of(cls, config: Config) -> "Sizes":
        """The sizes of a model."""
        return cls(
            hidden=config.hidden_size, dense=config.intermediate_size,
            expert=config.moe_intermediate_size, experts=config.num_experts,
            chosen=config.num_experts_per_tok, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
            taps=config.conv_L_cache, vocab=config.vocab_size, rope_theta=config.rope_theta,
        )  # fmt: skip


def real_sizes() -> Sizes:
    """Sizes of LFM2.5-8B-A1B, from the config.json that it is published with."""
    return Sizes.of(Config.from_dict(read_json(REAL_CONFIG)))


@dataclass(frozen=True)
class Case:
    """One use of an operation.

    part: where in the model · weights: how the ones it reads are stored, or ""
    tie: an output, and the input of the next run whose place it takes
    """

    kernel: str
    part: str
    weights: str
    tokens: int
    dtype: mx.Dtype
    door: Callable[..., Any]
    inputs: Inputs
    tie: tuple[int, str]

    def with_kernel(self, inputs: Inputs) -> Arrays:
        return outputs(self.door(**inputs, use_kernel=True))

    def with_operations(self, inputs: Inputs) -> Arrays:
        return outputs(self.door(**inputs, use_kernel=False))

    def exact(self) -> Arrays:
        """The reference's outputs for the same numbers in float32, on the CPU."""
        with on_the_cpu():
            inputs = {name: wide(value) for name, value in self.inputs.items()}
            found = self.with_operations(inputs)
            mx.eval(found)
        return found

    def chain(self, run: Run, length: int) -> list[Arrays]:
        """Outputs of `length` runs, each of which needs the one before it."""
        output, name = self.tie
        inputs, found = self.inputs, []
        for _ in range(length):
            found.append(run(inputs))
            taken = self.inputs[name]
            begin = found[-1][output].reshape(-1)[: taken.size]
            inputs = self.inputs | {name: begin.reshape(taken.shape)}
        return found


def outputs(found: mx.array | Arrays) -> Arrays:
    return (found,) if isinstance(found, mx.array) else found


def wide(value: Any) -> Any:
    """The same values in float32, of an array or a matrix."""
    if isinstance(value, Matrix):
        scales, biases = wide(value.scales), wide(value.biases)
        return value._replace(weight=wide(value.weight), scales=scales, biases=biases)
    floating = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    return value.astype(mx.float32) if floating else value


class Draw:
    """Random numbers of one dtype, the same ones in every process."""

    def __init__(self, dtype: mx.Dtype):
        self.dtype = dtype
        self.key = mx.random.key(0)

    def uniform(self, low: float, high: float, *shape: int) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return mx.random.uniform(low, high, shape, mx.float32, key).astype(self.dtype)

    def values(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Around zero, with a standard deviation of `scale`."""
        most = 3**0.5 * scale
        return self.uniform(-most, most, *shape)

    def norm(self, width: int) -> mx.array:
        return self.uniform(0.8, 1.2, width)

    def dense(self, *shape: int) -> Matrix:
        return Matrix(self.values(*shape, scale=shape[-1] ** -0.5))

    def packed(self, *shape: int, bits: int = BITS) -> Matrix:
        """Random bits and scales; quantizing random weights would take longer than all else."""
        *before, width = shape
        middle, spread = (2**bits - 1) / 2, 2**bits / 12**0.5
        self.key, key = mx.random.split(self.key)
        words = mx.random.randint(0, 2**32, (*before, width * bits // 32), mx.uint32, key)
        scales = self.uniform(0.5, 1.5, *before, width // GROUP_SIZE) * (width**-0.5 / spread)
        return Matrix(words, scales, -middle * scales, GROUP_SIZE, bits)

    def matrices(self, *shapes: tuple[int, ...]) -> Iterator[tuple[str, list[Matrix]]]:
        """Matrices of these shapes in each way to store them, with its name."""
        yield f"{BITS}-bit", [self.packed(*shape) for shape in shapes]
        yield "dense", [self.dense(*shape) for shape in shapes]


def cases(
    sizes: Sizes, dtype: mx.Dtype, operations: Collection[str] = OPERATIONS
) -> Iterator[Case]:
    """The cases of `operations`; each is made when it is asked for, as some fill a gigabyte."""
    for operation in OPERATIONS:
        if operation in operations:
            yield from MAKERS[operation](sizes, Draw(dtype))


def short_conv_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    width, taps = sizes.hidden, draw.values(sizes.hidden, sizes.taps, scale=sizes.taps**-0.5)
    for tokens in (*sizes.tokens, sizes.prompt):
        inputs = {
            "bcx": draw.values(1, tokens, 3 * width),
            "taps": taps,
            "window": draw.values(1, sizes.taps - 1, width),
        }
        yield Case(
            "short_conv", "conv layer", "", tokens, draw.dtype, short_conv, inputs, (1, "window")
        )


def norm_router_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    norm_weight, shape = draw.norm(sizes.hidden), (sizes.experts, sizes.hidden)
    bias = draw.values(sizes.experts, scale=0.2).astype(mx.float32)
    gates = {"dense": draw.dense(*shape), f"{GATE_BITS}-bit": draw.packed(*shape, bits=GATE_BITS)}
    for weights, gate in gates.items():
        for tokens in sizes.tokens:
            inputs = {
                "x": decided(draw, sizes, norm_weight, gate, bias, tokens),
                "norm_weight": norm_weight,
                "eps": EPS,
                "gate": gate,
                "expert_bias": bias,
                "experts_per_token": sizes.chosen,
            }
            yield Case(
                "norm_router", "sparse layer", weights, tokens, draw.dtype, norm_router, inputs,
                (0, "x"),
            )  # fmt: skip


def decided(
    draw: Draw, sizes: Sizes, norm_weight: mx.array, gate: Matrix, bias: mx.array, tokens: int
) -> mx.array:
    """Tokens between whose best experts' scores there is room: no rounding changes the choice."""
    x = draw.values(1, CANDIDATES, sizes.hidden)
    normed = mx.fast.rms_norm(wide(x), wide(norm_weight), EPS)
    scores = mx.sigmoid(wide(gate).times(normed)) + bias
    best = -mx.sort(-scores, axis=-1)[0, :, : sizes.chosen + 1]
    room = (best[:, :-1] - best[:, 1:]).min(axis=-1)
    return x[:, mx.argsort(-room)[:tokens]]


def qk_norm_rope_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    norms = {name: draw.norm(sizes.head_dim) for name in ("q_weight", "k_weight")}
    for tokens in (*sizes.tokens, sizes.prompt):
        inputs = {
            "qkv": draw.values(1, tokens, width),
            **norms,
            "num_heads": sizes.heads,
            "num_kv_heads": sizes.kv_heads,
            "eps": EPS,
            "base": sizes.rope_theta,
            "offset": mx.array([POSITION]),
        }
        yield Case(
            "qk_norm_rope", "attention", "", tokens, draw.dtype, qk_norm_rope, inputs,
            (0, "q_weight"),
        )  # fmt: skip


def projection_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    width, queries = sizes.hidden, sizes.heads * sizes.head_dim
    merged = queries + 2 * sizes.kv_heads * sizes.head_dim
    # Where, its inputs and rows of weights, and what is folded into it.
    uses = [
        ("in_proj", width, 3 * width, "norm"),
        ("q, k, v", width, merged, "norm"),
        ("out_proj", queries, width, "residual"),
        ("dense gate, up", width, 2 * sizes.dense, "norm swiglu"),
        ("dense down", sizes.dense, width, "residual"),
        ("product alone", width, width, ""),
        ("head", width, sizes.vocab, "norm"),
    ]
    for part, inner, rows, folded in uses if sizes.vocab else uses[:-1]:
        for weights, (matrix,) in draw.matrices((rows, inner)):
            for tokens in sizes.tokens:
                yield Case(
                    "projection", part, weights, tokens, draw.dtype, projection,
                    projection_inputs(draw, matrix, tokens, folded),
                    (0, "residual" if folded == "residual" else "x"),
                )  # fmt: skip


def projection_inputs(draw: Draw, matrix: Matrix, tokens: int, folded: str) -> Inputs:
    rows, width = matrix.shape
    inputs: Inputs = {"x": draw.values(1, tokens, width), "matrix": matrix}
    if "norm" in folded:
        inputs |= {"norm_weight": draw.norm(width), "eps": EPS}
    if "residual" in folded:
        inputs |= {"residual": draw.values(1, tokens, rows)}
    return inputs | {"swiglu": "swiglu" in folded}


def experts_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    up = (sizes.experts, sizes.expert, sizes.hidden)
    for weights, matrices in draw.matrices(up, up, (sizes.experts, sizes.hidden, sizes.expert)):
        for tokens in sizes.tokens:
            scores = draw.uniform(0, 1, 1, tokens, sizes.experts)
            inputs = {
                "x": draw.values(1, tokens, sizes.hidden),
                "indices": mx.argsort(scores, axis=-1)[..., : sizes.chosen],
                "weights": draw.uniform(0.1, 0.4, 1, tokens, sizes.chosen),
                **dict(zip(("gate", "up", "down"), matrices, strict=True)),
                "residual": draw.values(1, tokens, sizes.hidden),
            }
            yield Case(
                "experts", "sparse layer", weights, tokens, draw.dtype, experts, inputs, (0, "x")
            )


def sample_cases(sizes: Sizes, draw: Draw) -> Iterator[Case]:
    """Greedy and as recommended; that every token costs makes a draw depend on the one before."""
    ways = {"greedy": RowSampling(frequency_penalty=9.0), "recommended": RECOMMENDED}
    vocab = sizes.vocab or SMALL_VOCAB
    for part, row in ways.items():
        for tokens in sizes.tokens:
            inputs = {
                "logits": draw.values(tokens, vocab, scale=3.0),
                "row": row,
                "counts": (draw.uniform(0, 1, tokens, vocab) < 0.01).astype(mx.uint16),
                "last": mx.full((tokens,), -1, mx.int32),
            }
            yield Case("sample", part, "", tokens, draw.dtype, drawn, inputs, (0, "last"))


def drawn(
    logits: mx.array, row: RowSampling, counts: mx.array, last: mx.array, use_kernel: bool
) -> Arrays:
    """Tokens and log-probabilities of rows that are all drawn by one number."""
    rows, numbers = [row] * logits.shape[0], [DRAW] * logits.shape[0]
    found = sample(logits, rows, numbers, Seen(counts, last), use_kernel=use_kernel)
    return found.tokens.view(mx.int32), found.logprobs


MAKERS: dict[str, Callable[[Sizes, Draw], Iterator[Case]]] = {
    "short_conv": short_conv_cases,
    "norm_router": norm_router_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "projection": projection_cases,
    "experts": experts_cases,
    "sample": sample_cases,
}
