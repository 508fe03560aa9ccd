"""The NumPy judge against the stored answers of Hugging Face's models."""

import json

import numpy as np
import pytest
from judge import judge_experts, judge_logits, judge_router, softmax
from make_random_checkpoint import plan
from reference import (
    TRANSFORMERS5_FOLDERS,
    Case,
    case,
    cases,
    relative_error,
    transformers5_answer,
)
from safetensors.numpy import load_file

FLOAT32_CASES = [stored for stored in cases() if stored.dtype == "float32"]
SPARSE_CASES = [stored for stored in FLOAT32_CASES if len(stored.experts)]


def by_name(stored: Case) -> str:
    return stored.name


@pytest.mark.parametrize("stored", FLOAT32_CASES, ids=by_name)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_judge_logits(stored: Case, dtype: type) -> None:
    tensors = stored.tensors()
    for row, real in stored.rows():
        logits = judge_logits(stored.config, tensors, stored.tokens[row, real], dtype)
        assert logits.dtype == dtype
        assert relative_error(logits, stored.logits[row, real]) <= 1e-5


@pytest.mark.parametrize("stored", SPARSE_CASES, ids=by_name)
def test_judge_experts(stored: Case) -> None:
    tensors = stored.tensors()
    for row, real in stored.rows():
        routes = judge_experts(stored.config, tensors, stored.tokens[row, real])
        assert len(routes) == len(stored.experts)
        for layer, (experts, weights) in enumerate(routes):
            np.testing.assert_array_equal(experts, stored.experts[layer, row, real])
            assert relative_error(weights, stored.weights[layer, row, real]) <= 1e-5


# How far Hugging Face's own half-precision arithmetic is from exact arithmetic on the same weights:
# the error of a typical token, and the share of equal choices of experts.
@pytest.mark.parametrize(
    ("name", "tolerance", "equal_choices"),
    [
        ("eight_layers_float16", 0.004, 0.99),
        ("eight_layers_bfloat16", 0.04, 0.9),
        ("every_expert_bfloat16", 0.03, 1.0),
    ],
)
def test_judge_logits_half_precision(name: str, tolerance: float, equal_choices: float) -> None:
    stored = case(name)
    tensors = stored.tensors()
    error = judge_logits(stored.config, tensors, stored.tokens[0]) - stored.logits[0]
    size = np.sqrt((stored.logits[0] ** 2).mean())
    assert np.median(np.sqrt((error**2).mean(axis=-1))) / size <= tolerance

    routes = judge_experts(stored.config, tensors, stored.tokens[0])
    chosen = np.sort([experts for experts, _ in routes], axis=-1)
    equal = (chosen == np.sort(stored.experts[:, 0], axis=-1)).all(axis=-1)
    assert equal.mean() >= equal_choices


def test_judge_logits_of_a_prefix() -> None:
    stored = case("eight_layers")
    prefix = judge_logits(stored.config, stored.tensors(), stored.tokens[0, :17])
    assert relative_error(prefix, stored.logits[0, :17]) <= 1e-5


@pytest.mark.parametrize("folder", TRANSFORMERS5_FOLDERS)
def test_transformers5_folders(folder: str) -> None:
    path = TRANSFORMERS5_FOLDERS[folder]
    config = json.loads((path / "config.json").read_text())
    stored = load_file(path / "model.safetensors")
    layout = "fused" if folder == "fused" else "hub"
    expected = {entry.name: entry.shape for entry in plan(config, layout)}
    assert {name: tensor.shape for name, tensor in stored.items()} == expected


def test_judge_logits_of_transformers5_folder() -> None:
    path = TRANSFORMERS5_FOLDERS["per_expert"]
    config = json.loads((path / "config.json").read_text())
    tokens, logits = transformers5_answer()
    tensors = load_file(path / "model.safetensors")
    assert relative_error(judge_logits(config, tensors, tokens), logits) <= 1e-5


def router_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((16, 24)) * 0.3
    return rng.standard_normal((200, 24)), gate, rng.standard_normal(16) * 0.25


def test_judge_router_by_hand() -> None:
    gate = np.array([[0.0], [1.0], [2.0]])
    experts, weights = judge_router(np.array([[1.0]]), gate, np.array([0.5, 0.0, 0.0]), 2, True, 3)
    first, second = 0.5, 1 / (1 + np.exp(-2.0))
    np.testing.assert_array_equal(experts, [[0, 2]])
    np.testing.assert_allclose(weights, [np.array([first, second]) * 3 / (first + second + 1e-6)])


def test_judge_router_breaks_ties_by_index() -> None:
    experts, _ = judge_router(np.ones((1, 2)), np.ones((5, 2)), None, 3, True, 1.0)
    np.testing.assert_array_equal(experts, [[0, 1, 2]])


@pytest.mark.parametrize("wrong", [{"score": softmax}, {"biased_weights": True}])
def test_judge_router_notices_wrong_scores(wrong: dict) -> None:
    x, gate, bias = router_inputs()
    experts, weights = judge_router(x, gate, bias, 4, True, 1.0)
    wrong_experts, wrong_weights = judge_router(x, gate, bias, 4, True, 1.0, **wrong)
    assert np.abs(weights - wrong_weights).max() > 0.05
    if "score" in wrong:
        differ = np.sort(experts) != np.sort(wrong_experts)
        assert differ.any(axis=-1).mean() > 0.25


def test_judge_router_notices_missing_bias() -> None:
    x, gate, bias = router_inputs()
    experts, _ = judge_router(x, gate, bias, 4, True, 1.0)
    unbiased, _ = judge_router(x, gate, None, 4, True, 1.0)
    assert (np.sort(experts) != np.sort(unbiased)).any(axis=-1).mean() > 0.25


def test_judge_router_notices_missing_epsilon() -> None:
    # Only small scores can show it: 4 sigmoid(-12) is about 25e-6.
    x, gate = np.full((1, 1), -12.0), np.ones((6, 1))
    _, weights = judge_router(x, gate, None, 4, True, 1.0)
    _, wrong = judge_router(x, gate, None, 4, True, 1.0, epsilon=1e-20)
    assert np.abs(weights - wrong).max() > 0.005
