"""The whole model against Hugging Face and the NumPy judge, in every way it can be run."""

import mlx.core as mx
import numpy as np
import pytest
from judge import judge_experts, judge_logits
from make_random_checkpoint import random_tensors
from models import TOLERANCE, as_numpy, model_of
from reference import Case, cases, relative_error

from lfm_mlx import Model
from lfm_mlx.kernels import metal
from lfm_mlx.model import decoder

CASES = {case.name: case for case in cases()}
FLOAT32 = {name: case for name, case in CASES.items() if case.dtype == "float32"}
SPARSE = [name for name, case in FLOAT32.items() if case.config["model_type"] == "lfm2_moe"]
# Where rounding may flip an expert, a token's error says nothing: the middle one does.
FLIPPING = "eight_layers_bfloat16"
HALF = [name for name, case in CASES.items() if case.dtype != "float32" and name != FLIPPING]

# Shapes that share no factor with one another, for what the stored cases do not cover.
ODD = {
    "model_type": "lfm2_moe",
    "vocab_size": 211,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 7,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv"],
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
    "conv_L_cache": 3,
    "conv_bias": False,
    "num_dense_layers": 2,
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def odd() -> Model:
    return model_of(ODD, random_tensors(ODD, seed=11))


def draw_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ODD["vocab_size"], shape)


def run_case(case: Case, dtype: str = "float32") -> np.ndarray:
    """Logits [B, L, V] of a stored case, padded as it is."""
    model = model_of(case.config, case.tensors(), dtype)
    cache = None
    if case.padding == "left":
        cache = model.make_cache((~case.mask).sum(axis=1).tolist())
    return as_numpy(model(mx.array(case.tokens), cache))


@pytest.mark.parametrize("name", FLOAT32)
def test_logits_equal_hugging_face(name: str) -> None:
    case = FLOAT32[name]
    logits = run_case(case)
    error = relative_error(logits[case.mask], case.logits[case.mask])
    assert error <= TOLERANCE["float32"], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", HALF)
def test_half_precision_logits_equal_hugging_face(name: str) -> None:
    case = CASES[name]
    logits = run_case(case, case.dtype)
    error = relative_error(logits[case.mask], case.logits[case.mask])
    assert error <= TOLERANCE[case.dtype], f"{name}: relative error {error:.2e}"


def test_bfloat16_with_flipping_experts_is_as_near_to_exact_as_hugging_face_is() -> None:
    case = CASES[FLIPPING]
    exact = judge_logits(case.config, case.tensors(), case.tokens[0])
    scale = np.abs(exact).max()
    ours = np.median(np.abs(run_case(case, "bfloat16")[0] - exact).max(axis=-1)) / scale
    theirs = np.median(np.abs(case.logits[0] - exact).max(axis=-1)) / scale
    assert ours <= 1.5 * theirs, f"median over tokens {ours:.2e}, Hugging Face's {theirs:.2e}"


@pytest.mark.parametrize("name", SPARSE)
def test_experts_are_hugging_faces_for_every_token(name: str) -> None:
    case = FLOAT32[name]
    model = model_of(case.config, case.tensors())
    for row, positions in case.rows():
        chosen, weights = routes(model, case.tokens[row, positions])
        np.testing.assert_array_equal(chosen, case.experts[:, row, positions])
        np.testing.assert_allclose(weights, case.weights[:, row, positions], atol=1e-4)


def routes(model: Model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SelectedModel experts and their weights [S, L, K], from the model's own hidden states."""
    found = []
    h = model.model.embed_tokens(mx.array(tokens)[None])
    for layer in model.layers:
        middle = layer.operator(h, "causal", None)
        if "gate" in layer.feed_forward:
            _, *route = layer.feed_forward.route(middle, layer.ffn_norm)
            found.append([np.array(part[0]) for part in route])
        h = layer.feed_forward(middle, layer.ffn_norm)
    return np.array([pair[0] for pair in found]), np.array([pair[1] for pair in found])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("change", [{}, {"num_experts_per_tok": 1}, {"num_key_value_heads": 5},
                                    {"num_dense_layers": 0}, {"conv_L_cache": 5}])  # fmt: skip
def test_logits_and_experts_equal_the_judge(seed: int, change: dict) -> None:
    config = ODD | change
    tensors = random_tensors(config, seed)
    tokens = draw_tokens(seed, 45)
    model = model_of(config, tensors)
    error = relative_error(np.array(model(mx.array(tokens)[None])[0]),
                           judge_logits(config, tensors, tokens))  # fmt: skip
    assert error <= TOLERANCE["float32"], f"relative error {error:.2e}"
    chosen = [experts for experts, _ in judge_experts(config, tensors, tokens)]
    np.testing.assert_array_equal(routes(model, tokens)[0], np.array(chosen))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunks", [[1] * 30, [30], [29, 1], [7, 7, 7, 9], [1, 2, 20, 7], [16, 14]])
def test_chunks_of_any_size_equal_prefill(chunks: list[int], dtype: str) -> None:
    model = model_of(ODD, random_tensors(ODD, seed=11), dtype)
    tokens = mx.array(draw_tokens(3, 1, 30))
    whole = as_numpy(model(tokens))
    cache, parts, begin = model.make_cache(), [], 0
    for length in chunks:
        parts.append(as_numpy(model(tokens[:, begin : begin + length], cache)))
        begin += length
    # In half precision another order of summing flips an expert here and there: the middle token.
    error = np.abs(np.concatenate(parts, axis=1) - whole).max(axis=-1) / np.abs(whole).max()
    found = error.max() if dtype == "float32" else np.median(error)
    allowed = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert found <= allowed, f"relative error {found:.2e}"


def right_padded(lengths: list[int], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    rows = [draw_tokens(seed + row, length) for row, length in enumerate(lengths)]
    padded = np.zeros((len(rows), max(lengths)), np.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return rows, padded


@pytest.mark.parametrize("chunks", [[23], [5, 18], [1] * 23, [20, 3]])
def test_left_padded_rows_equal_rows_alone(odd: Model, chunks: list[int]) -> None:
    lengths = [23, 1, 9, 22]
    rows, _ = right_padded(lengths, seed=5)
    padded = np.stack([np.pad(row, (23 - len(row), 0)) for row in rows])
    cache, parts, begin = odd.make_cache([23 - length for length in lengths]), [], 0
    for length in chunks:
        parts.append(np.array(odd(mx.array(padded[:, begin : begin + length]), cache)))
        begin += length
    logits = np.concatenate(parts, axis=1)
    following = mx.array(draw_tokens(9, 4, 1))
    after = np.array(odd(following, cache))
    for row, tokens in enumerate(rows):
        expect_row(odd, tokens, following[row], logits[row, 23 - len(tokens) :], after[row])


@pytest.mark.parametrize("chunks", [[23], [5, 18], [1] * 23, [20, 3]])
def test_right_padded_rows_equal_rows_alone(odd: Model, chunks: list[int]) -> None:
    lengths = [23, 1, 9, 22]
    rows, padded = right_padded(lengths, seed=6)
    cache, parts, begin = odd.make_cache([0] * 4), [], 0
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=[23 - length for length in lengths])
    for length in chunks:
        parts.append(np.array(odd(mx.array(padded[:, begin : begin + length]), cache)))
        begin += length
    for layer in cache:
        layer.finalize()
    logits = np.concatenate(parts, axis=1)
    following = mx.array(draw_tokens(9, 4, 1))
    after = np.array(odd(following, cache))
    for row, tokens in enumerate(rows):
        expect_row(odd, tokens, following[row], logits[row, : len(tokens)], after[row])


def expect_row(
    model: Model, tokens: np.ndarray, following: mx.array, logits: np.ndarray, after: np.ndarray
) -> None:
    """A row of a batch, and the token decoded after it, as if it had been alone."""
    cache = model.make_cache()
    alone = np.array(model(mx.array(tokens)[None], cache))[0]
    assert relative_error(logits, alone) <= 1e-5
    assert relative_error(after, np.array(model(following[None], cache))[0]) <= 1e-5


def test_a_new_cache_remembers_nothing(odd: Model) -> None:
    tokens = mx.array(draw_tokens(7, 1, 12))
    fresh = np.array(odd(tokens, odd.make_cache()))
    odd(mx.array(draw_tokens(8, 1, 50)), odd.make_cache())
    np.testing.assert_array_equal(np.array(odd(tokens, odd.make_cache())), fresh)


def test_many_tokens_take_the_sorted_path_to_the_same_logits(odd: Model) -> None:
    tokens = mx.array(draw_tokens(10, 1, 64))  # 64 x 3 pairs: sorted by expert
    whole = np.array(odd(tokens))
    cache = odd.make_cache()
    few = [np.array(odd(tokens[:, begin : begin + 8], cache)) for begin in range(0, 64, 8)]
    assert relative_error(np.concatenate(few, axis=1), whole) <= 1e-5


def test_input_embeddings_replace_tokens(odd: Model) -> None:
    tokens = mx.array(draw_tokens(12, 2, 9))
    embedded = odd(tokens, input_embeddings=odd.model.embed_tokens(tokens))
    np.testing.assert_array_equal(np.array(embedded), np.array(odd(tokens)))


@pytest.mark.parametrize(("length", "times"), [(9, 3), (19, 6), (41, 6), (4, 1), (2, 0)])
def test_a_prompt_is_evaluated_every_few_layers_on_a_gpu(
    length: int, times: int, odd: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what it computes does not pile up in memory; the logits are the same."""
    tokens = mx.array(np.random.default_rng(8).integers(0, 90, (1, length)))
    odd.eval()
    wanted = odd(tokens, odd.make_cache())
    evaluated: list[int] = []
    evaluate = mx.eval
    monkeypatch.setattr(
        mx, "eval", lambda *arrays: evaluated.append(len(arrays)) or evaluate(arrays)
    )
    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(decoder, "PENDING_TOKENS", 20)
    odd.kernels = metal.NO_KERNELS
    found = odd(tokens, odd.make_cache())
    assert len(evaluated) == times
    odd(tokens)
    assert len(evaluated) == times, "only where there is a cache"
    monkeypatch.undo()
    np.testing.assert_array_equal(as_numpy(found), as_numpy(wanted))
