"""The whole model on its Metal path: kernels where they can run, operations elsewhere.

Without Metal the kernels' texts run on the host.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import twins
from make_random_checkpoint import random_tensors
from mlx_lm.tuner.utils import linear_to_lora_layers
from model.test_step import EVEN, ODD
from models import model_of

from lfm_mlx import Model
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.decode import decode
from lfm_mlx.kernels import metal
from lfm_mlx.load import load

# Relative to the largest logit: kernels sum in another order.
APART = 2e-5
WIDE = EVEN | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
SHAPES = {
    "even": EVEN,
    "odd": ODD,
    "wide": WIDE,
    "one expert": EVEN | {"num_experts_per_tok": 1, "use_expert_bias": False},
    "bias": EVEN | {"conv_bias": True},
    "dense": EVEN | {"num_dense_layers": 7},
    "taps": EVEN | {"conv_L_cache": 4},
}


def build(name: str, dtype: str = "float32", bits: int = 0, mode: str = "affine") -> Model:
    model = model_of(SHAPES[name], random_tensors(SHAPES[name], 5), dtype)
    if bits:
        nn.quantize(
            model, 64 if mode == "affine" else 32, bits, mode=mode,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and not path.endswith('.gate')
                and module.weight.shape[-1] % 64 == 0
            ),
        )  # fmt: skip
        model.merge_projections()
    model.eval()
    return model


def spoken(model: Model, rows: int, padding: list[int] | None = None) -> np.ndarray:
    """Logits of a prompt, of one token more, of three more at once, and of one more."""
    rng = np.random.default_rng(7)
    cache = model.make_cache(padding)
    tokens = [mx.array(rng.integers(0, 200, (rows, length))) for length in (11, 1, 3, 1)]
    logits = mx.concatenate([model(part, cache) for part in tokens], axis=1)
    return np.array(logits.astype(mx.float32))


def expect_near(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= APART, f"{error:.1e} of the largest logit"


def expect_as_near(found: np.ndarray, plain: np.ndarray, exact: np.ndarray) -> None:
    """Kernels are no farther from the exact logits than operations of the same dtype are.

    Rounding may flip an expert, and a token's error then says nothing: the middle one does.
    """
    ours, theirs = (np.median(np.abs(x - exact).max(axis=-1)) for x in (found, plain))
    assert 0 < ours <= 1.25 * theirs, f"median over tokens {ours:.2e}, operations' {theirs:.2e}"


def both_paths(model: Model, rows: int = 1, padding: list[int] | None = None) -> list[np.ndarray]:
    """Logits with kernels and without; padded columns are left out."""
    model.kernels = metal.chosen(False)
    plain = spoken(model, rows, padding)
    model.kernels = metal.chosen(True)
    with twins.kernels(checked=False):
        assert model.running_kernels() == frozenset(metal.OPERATIONS)
        fused = spoken(model, rows, padding)
    skipped = padding or [0] * rows
    seen = np.arange(plain.shape[1]) >= np.array(skipped)[:, None]
    return [fused[seen], plain[seen]]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_it_says_what_the_operations_say(name: str, rows: int) -> None:
    expect_near(*both_paths(build(name), rows))


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision(dtype: str, bits: int) -> None:
    model = build("wide", dtype, bits)
    fused, plain = both_paths(model, 3)
    model.set_dtype(mx.float32)
    model.kernels = metal.NO_KERNELS
    expect_as_near(fused, plain, spoken(model, 3).reshape(plain.shape))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_quantized(bits: int) -> None:
    expect_near(*both_paths(build("wide", bits=bits)))


@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (4, "mxfp4")])
def test_weights_that_no_kernel_reads(bits: int, mode: str) -> None:
    expect_near(*both_paths(build("wide", bits=bits, mode=mode)))


def test_the_gate_in_8_bits_as_mlx_lm_packs_it() -> None:
    model = build("wide", bits=4)
    for layer in model.layers[2:]:
        layer.feed_forward.gate = layer.feed_forward.gate.to_quantized(64, 8)
    expect_near(*both_paths(model))


@pytest.mark.parametrize("padding", [[0, 4, 1], [10, 0, 0]])
def test_padded_batches(padding: list[int]) -> None:
    expect_near(*both_paths(build("even"), 3, padding))


def test_adapters() -> None:
    model = build("even")
    linear_to_lora_layers(model, 7, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(5))
    model.eval()
    before = spoken(build("even"), 1)
    fused, plain = both_paths(model)
    assert np.abs(plain - before[0]).max() > 0.01, "the adapters do something"
    expect_near(fused, plain)


@pytest.mark.parametrize("question", ["What is 27 + 58?", "Hello"])
def test_the_demo_answers_with_the_same_tokens(question: str) -> None:
    model, tokenizer = load(DEMO_FOLDER)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )

    def answer() -> list[int]:
        steps = decode(model, prompt, max_tokens=24, stop_ids=tokenizer.eos_token_ids)
        return [step.token for step in steps]

    plain = answer()
    with twins.kernels(checked=False):
        assert answer() == plain


def test_no_kernel_runs_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: True)
    model = build("even")
    model.train()
    assert model.running_kernels() == metal.NO_KERNELS
