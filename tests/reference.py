"""The stored answers of Hugging Face's models, for tests that compare logits, experts and padding.

Written by `scripts/make_reference.py`, see `fixtures/README.md`. Weights are not stored:
`tensors()` makes them again from the seed. Shapes: B rows, L tokens, V vocabulary, S sparse
layers, K experts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from make_random_checkpoint import random_tensors, to_bfloat16
from safetensors.numpy import load_file

FIXTURES = Path(__file__).parent / "fixtures"
# What transformers 5 writes for one small model, by default and with save_original_format=False.
TRANSFORMERS5_FOLDERS = {
    "per_expert": FIXTURES / "transformers5" / "per_expert",
    "fused": FIXTURES / "transformers5" / "fused",
}


@dataclass(frozen=True)
class Case:
    """One model and its answers. Where `mask` is False, logits and weights are 0, experts -1."""

    name: str
    note: str  # what this case is there to show
    config: dict
    seed: int
    dtype: str  # of weights and activations: float32, bfloat16 or float16
    padding: str  # none, left or right
    smallest_margin: float  # between the scores of the last chosen and the first refused expert
    tokens: np.ndarray  # [B, L] int32
    mask: np.ndarray  # [B, L] bool, False at padding
    logits: np.ndarray  # [B, L, V] float32
    experts: np.ndarray  # [S, B, L, K] int32, by falling score
    weights: np.ndarray  # [S, B, L, K] float32

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by hub name in float32, rounded as a checkpoint of `dtype` stores them."""
        return {
            name: values if name.endswith("expert_bias") else rounded(values, self.dtype)
            for name, values in random_tensors(self.config, self.seed).items()
        }

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each row b its number and the positions of its real tokens, in order."""
        for row, real in enumerate(self.mask):
            yield row, np.flatnonzero(real)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values nearest to `values` that `dtype` can hold."""
    if dtype == "bfloat16":
        return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype).astype(np.float32)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@cache
def cases() -> tuple[Case, ...]:
    """Every stored case."""
    facts = json.loads((FIXTURES / "cases.json").read_text())["cases"]
    return tuple(Case(**fact, **load_arrays(fact["name"])) for fact in facts)


def case(name: str) -> Case:
    """The stored case of this name."""
    return {case.name: case for case in cases()}[name]


def load_arrays(name: str) -> dict[str, np.ndarray]:
    arrays = load_file(FIXTURES / f"{name}.safetensors")
    for key, dtype in (("tokens", np.int32), ("mask", np.bool_), ("experts", np.int32)):
        arrays[key] = arrays[key].astype(dtype)
    return arrays


def transformers5_answer() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [L] and logits [L, V] of the model in both of TRANSFORMERS5_FOLDERS."""
    answer = load_file(FIXTURES / "transformers5" / "answer.safetensors")
    return answer["tokens"].astype(np.int32), answer["logits"]
