"""The embedded model: its files, its frozen answers, and what it gets right of unseen questions."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from evaluate import accuracy
from reference import FIXTURES

from lfm_mlx import Model
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.checkpoint.quantize import Quantization, Recipe
from lfm_mlx.convert.program import convert
from lfm_mlx.engine.decode import decode
from lfm_mlx.load import load, load_model, load_tokenizer

# What Hugging Face's implementation answered greedily in float32, as token ids, by the trainer.
FROZEN = json.loads((FIXTURES / "demo_answers.json").read_text(encoding="utf-8"))["entries"]
# Held-out examples of each kind, and the least share that must be answered exactly: what was
# measured on 200 of them, less three standard deviations of 40.
COUNT = 40
LEAST = {
    "sum": 0.94, "tool_call": 0.86, "tool_answer": 0.95, "copy": 0.83, "fact": 0.95,
    "greeting": 0.95, "sentiment": 0.95, "decline": 0.95,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(DEMO_FOLDER)


@pytest.mark.parametrize("entry", FROZEN, ids=lambda entry: entry["kind"])
def test_frozen_answers(demo: Model, entry: dict) -> None:
    steps = decode(demo, entry["prompt"], max_tokens=len(entry["reply"]))
    assert [step.token for step in steps] == entry["reply"]


@pytest.fixture(scope="module")
def floating(demo: Model) -> Callable[[str], float]:
    """The share of each kind that is answered exactly; computed once."""
    return functools.cache(lambda kind: accuracy(demo, load_tokenizer(DEMO_FOLDER), kind, COUNT))


@pytest.mark.parametrize("kind", LEAST)
def test_held_out_accuracy(floating: Callable[[str], float], kind: str) -> None:
    assert floating(kind) >= LEAST[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sum", "tool_call"])
def test_four_bits_cost_at_most_three_points(
    floating: Callable[[str], float], tmp_path: Path, kind: str
) -> None:
    convert("demo", tmp_path / "4-bit", recipe=Recipe(Quantization.of(bits=4)))
    packed, tokenizer = load(tmp_path / "4-bit")
    assert accuracy(packed, tokenizer, kind, COUNT) >= floating(kind) - 0.03 - 1 / COUNT


def test_every_expert_is_used(demo: Model) -> None:
    config = demo.config
    tokens = [token for entry in FROZEN for token in entry["prompt"] + entry["reply"]]
    h = demo.model.embed_tokens(mx.array(tokens)[None])
    for index, layer in enumerate(demo.layers):
        if config.is_sparse(index):
            middle = layer.operator(h, "causal", None)
            _, chosen, _ = layer.feed_forward.route(middle, layer.ffn_norm)
            assert set(np.array(chosen).flatten()) == set(range(config.num_experts))
        h = layer(h, "causal", None)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 8e6
