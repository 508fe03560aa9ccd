"""Merged projections are views of one matrix, and step aside when one of them changes."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from make_random_checkpoint import random_tensors
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from model.test_step import EVEN
from models import model_of

from lfm_mlx import Model
from lfm_mlx.model.linear import Merged, matrix_of, project

NAMES = ("gate", "up", "key")


def parent(bits: tuple[int, ...] = (0, 0, 0), rows: tuple[int, ...] = (8, 24, 16)) -> nn.Module:
    """A module with three projections of 64 inputs."""
    module = nn.Module()
    for seed, (name, count, width) in enumerate(zip(NAMES, rows, bits, strict=True)):
        linear = nn.Linear(64, count, bias=False)
        linear.weight = mx.random.normal((count, 64), key=mx.random.key(seed))
        module[name] = linear.to_quantized(32, width) if width else linear
    return module


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_one_matrix_computes_them_all(bits: int) -> None:
    module, merged = parent((bits,) * 3), Merged(*NAMES)
    x = mx.random.normal((5, 64), key=mx.random.key(9))
    apart = mx.concatenate([module[name](x) for name in NAMES], axis=-1)
    merged.merge(module)
    whole = merged.matrix(module)
    assert whole is not None
    assert whole.shape == (48, 64)
    np.testing.assert_allclose(whole.times(x), apart, atol=1e-5)
    again = mx.concatenate([module[name](x) for name in NAMES], axis=-1)
    np.testing.assert_array_equal(again, apart)


def test_the_weights_are_in_memory_once() -> None:
    module, merged = parent(rows=(1024, 2048, 1024)), Merged(*NAMES)
    mx.eval(module.parameters())
    before = mx.get_active_memory()
    merged.merge(module)
    assert mx.get_active_memory() - before < 4096 * 64


@pytest.mark.parametrize("bits", [(4, 4, 8), (0, 4, 4), (4, 0, 0)])
def test_what_is_packed_differently_stays_apart(bits: tuple[int, ...]) -> None:
    module, merged = parent(bits), Merged(*NAMES)
    merged.merge(module)
    assert merged.matrix(module) is None


def adapter(module: nn.Module) -> None:
    module.up = LoRALinear.from_base(module.up, r=2)


def weight(module: nn.Module) -> None:
    module.up.weight = module.up.weight + 1


def packing(module: nn.Module) -> None:
    module.up = module.up.to_quantized(32, 4)


@pytest.mark.parametrize("change", [adapter, weight, packing])
def test_it_steps_aside_when_a_projection_is_another(change: object) -> None:
    module, merged = parent(), Merged(*NAMES)
    merged.merge(module)
    change(module)  # pyright: ignore[reportCallIssue]
    assert merged.matrix(module) is None
    assert merged.whole is None, "else its memory would stay taken"


def test_a_module_that_does_more_is_no_matrix() -> None:
    assert matrix_of(nn.Linear(64, 8, bias=True)) is None
    assert matrix_of(LoRALinear.from_base(nn.Linear(64, 8, bias=False))) is None
    assert matrix_of(nn.RMSNorm(8)) is None
    assert matrix_of(nn.Embedding(8, 64)) is not None


def test_a_module_that_does_more_is_called() -> None:
    linear, norm = nn.Linear(64, 64, bias=True), nn.RMSNorm(64)
    linear.bias = mx.arange(64, dtype=mx.float32)
    x = mx.random.normal((1, 2, 64), key=mx.random.key(1))
    np.testing.assert_allclose(project(x, linear, norm, x), x + linear(norm(x)), atol=1e-6)


def names_and_values(model: Model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def test_weights_are_saved_as_they_were_loaded(tmp_path: Path) -> None:
    tensors = random_tensors(EVEN, 8)
    model = model_of(EVEN, tensors)
    assert model.layers[1].self_attn.merged.whole is not None
    assert model.layers[0].feed_forward.merged.whole is not None
    model.save_weights(str(tmp_path / "weights.safetensors"))
    stored = mx.load(str(tmp_path / "weights.safetensors"))
    assert isinstance(stored, dict)
    attention = "model.layers.1.self_attn"
    for name in ("q_proj", "k_proj", "v_proj"):
        saved = np.array(stored[f"{attention}.{name}.weight"])
        np.testing.assert_array_equal(saved, tensors[f"{attention}.{name}.weight"])
    again = Model(model.config)
    again.load_weights(str(tmp_path / "weights.safetensors"))
    for name, value in names_and_values(again).items():
        np.testing.assert_array_equal(value, stored[name])
