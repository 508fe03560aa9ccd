"""The compiled decode step says what the model says without it, for the weights there are now."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from make_random_checkpoint import random_tensors
from metal_host import available, installed, refusal
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from model.test_decoder import ODD
from models import model_of

from lfm_mlx import Model
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.model.step import CompiledStep

# Widths that quantized weights and heads allow; the layers' order is LFM2.5's in small.
EVEN = ODD | {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
DENSE = {key: value for key, value in EVEN.items() if "expert" not in key}
SHAPES = {
    "even": EVEN,
    "attention first": EVEN | {"layer_types": ["full_attention"] + ["conv"] * 6},
    "attention last": EVEN | {"layer_types": ["conv"] * 6 + ["full_attention"]},
    "convolutions alone": EVEN | {"layer_types": ["conv"] * 7},
    "attentions alone": EVEN | {"layer_types": ["full_attention"] * 7},
    "bias": EVEN | {"conv_bias": True},
    "own head": EVEN | {"tie_word_embeddings": False},
    "odd": ODD,
}


def build(name: str = "even", dtype: str = "float32", seed: int = 3) -> Model:
    model = model_of(SHAPES[name], random_tensors(SHAPES[name], seed), dtype)
    model.eval()
    return model


def decoded(model: Model, compiled: bool | None, steps: int = 6, rows: int = 1) -> np.ndarray:
    """Logits [B, steps, V] after a prompt of 5, greedily continued."""
    model.compile_step = compiled
    cache = model.make_cache()
    tokens = mx.array(np.random.default_rng(1).integers(0, 200, (rows, 5)))
    logits = [model(tokens, cache)[:, -1:]]
    for _ in range(steps):
        logits.append(model(mx.argmax(logits[-1], axis=-1), cache))
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps ran compiled is the length of this list."""
    ran: list[int] = []
    run = CompiledStep.__call__

    def call(step: Any, *args: Any) -> mx.array:
        ran.append(1)
        return run(step, *args)

    monkeypatch.setattr(CompiledStep, "__call__", call)
    return ran


@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    model = build(name)
    expected = decoded(model, False, rows=2)
    assert ran == []
    np.testing.assert_allclose(decoded(model, True, rows=2), expected, atol=2e-6)
    assert len(ran) == 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_equals_the_model_in_half_precision(dtype: str) -> None:
    model = build(dtype=dtype)
    # Fused operations round less often.
    np.testing.assert_allclose(
        decoded(model, True), decoded(model, False), atol=0.05 if dtype == "bfloat16" else 5e-3
    )


def with_adapters(model: Model) -> None:
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": 10.0, "dropout": 0.0})
    for layer in model.layers:
        for _, module in layer.named_modules():
            if "lora_b" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(5))


def one_weight(model: Model) -> None:
    model.layers[5].conv.in_proj.weight = model.layers[5].conv.in_proj.weight * 2


def one_part_of_a_merged_weight(model: Model) -> None:
    model.layers[1].self_attn.k_proj.weight = model.layers[1].self_attn.k_proj.weight * -1


def another_decoder(model: Model) -> None:
    model.model = build(seed=4).model


CHANGES: list[Callable[[Model], Any]] = [
    with_adapters,
    one_weight,
    one_part_of_a_merged_weight,
    another_decoder,
    lambda model: model.set_dtype(mx.bfloat16),
    lambda model: nn.quantize(model, 32, 4),
    lambda model: model.load_weights([("model.embedding_norm.weight", mx.ones(64) * 3)], False),
    lambda model: model.layers.__setitem__(3, build(seed=4).layers[3]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_it_knows_when_weights_are_others(change: Callable[[Model], Any]) -> None:
    model = build()
    before = decoded(model, True)
    change(model)
    model.eval()
    after = decoded(model, True)
    half = model.model.embedding_norm.weight.dtype == mx.bfloat16
    np.testing.assert_allclose(after, decoded(model, False), atol=0.05 if half else 2e-5)
    assert np.abs(after - before).max() > 0.1


def test_it_is_compiled_once() -> None:
    model = build()
    decoded(model, True)
    first = model.compiled
    decoded(model, True)
    assert model.compiled is first


def test_it_runs_on_the_stream_there_is() -> None:
    model = build()
    expected = decoded(model, True)
    with mx.stream(mx.new_stream(mx.default_device())):
        np.testing.assert_array_equal(decoded(model, True), expected)


def test_a_model_is_freed_with_its_step() -> None:
    model = build()
    decoded(model, True)
    kept = weakref.ref(model.model)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_a_copied_model_has_its_own() -> None:
    model = build()
    expected = decoded(model, True)
    twin = copy.deepcopy(model)
    one_weight(model)
    np.testing.assert_array_equal(decoded(twin, True), expected)


def test_padded_rows_are_read_first_and_stepped_then(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    model = build()

    def run(compiled: bool) -> np.ndarray:
        model.compile_step = compiled
        cache = model.make_cache([2, 0])
        logits = [model(mx.array([[0], [7]]), cache), model(mx.array([[0], [8]]), cache)]
        assert isinstance(cache[1], BatchKVCache)
        for token in (9, 10, 11):
            logits.append(model(mx.array([[token], [token + 1]]), cache))
        found = mx.concatenate(logits, axis=1)
        return np.array(found)[:, 2:]

    expected = run(False)
    np.testing.assert_allclose(run(True), expected, atol=2e-6)
    assert len(ran) == 3, "the first two columns are padding in one row"


def waiting(cache: list[Any]) -> int:
    """Operations that wait to be computed before everything the cache holds is known."""
    states = tree_flatten([entry.state for entry in cache if not hasattr(entry, "log")])
    arrays = [leaf for _, leaf in states if isinstance(leaf, mx.array)]
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *arrays)
    return drawing.getvalue().count("[label =")


def test_a_batch_leaves_no_growing_graph() -> None:
    model = build("attentions alone")
    model.compile_step = True
    cache = model.make_cache([2, 0])
    model(mx.array([[0, 0, 1], [7, 8, 9]]), cache)
    seen = []
    for token in range(40):
        mx.eval(model(mx.array([[token], [token + 1]]), cache))
        seen.append(waiting(cache))
    assert seen[10] == seen[39]


def test_a_rewound_cache_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    model = build()

    def run(compiled: bool) -> np.ndarray:
        model.compile_step = compiled
        cache = model.make_cache()
        for token in range(30):
            model(mx.array([[token]]), cache)
        rewind(cache, 12)
        return np.array(mx.concatenate([model(mx.array([[t]]), cache) for t in (3, 4)], axis=1))

    np.testing.assert_allclose(run(True), run(False), atol=2e-6)
    assert len(ran) == 31, "all but the first token, which finds no windows"


@pytest.mark.skipif(not available(), reason=str(refusal()))
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_its_metal_path_equals_the_model(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    model = build()
    if bits is not None:
        nn.quantize(model, 32, bits, class_predicate=lambda p, m: not p.endswith('.gate')
                    and hasattr(m, "to_quantized"))  # fmt: skip
        model.merge_projections()
    expected = decoded(model, False, rows=2)
    assert ran == []
    with installed():
        found = decoded(model, None, rows=2)
    assert len(ran) == 6
    np.testing.assert_allclose(found, expected, atol=2e-5)
