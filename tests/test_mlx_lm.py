"""mlx-lm's own commands and functions, unmodified, on our model: one answer in every way of asking.

Whatever mlx-lm does with a cache (batching, saving, reusing a prefix) must give the tokens that one
request alone gets.
"""

import copy
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from make_random_checkpoint import config_of_size, random_tensors, write_checkpoint
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import cache as stock_cache

import lfm_mlx.mlx_lm as seam
from lfm_mlx import Config, Model
from lfm_mlx.cache.cache import ConvWindow, TokenLog
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.decode import decode

# mlx_lm.generate, the attribute, is a function that hides the module.
generation = import_module("mlx_lm.generate")
utils = import_module("mlx_lm.utils")

QUESTIONS = [
    "What is 27 + 58?",
    "Hi",
    "What is the capital of France, and which river flows through it on its way to the sea?",
    "Is this positive or negative: what a lovely day",
]
# The least model with every kind of layer.
LEAST = {
    "model_type": "lfm2_moe",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "conv_L_cache": 3,
    "conv_bias": False,
    "num_dense_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
}
DENSE = {
    key: value
    for key, value in LEAST.items()
    if "expert" not in key and key not in ("num_dense_layers", "moe_intermediate_size")
} | {
    "model_type": "lfm2",
    "hidden_size": 64,
    "block_dim": 64,
    "intermediate_size": 192,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    seam.register()
    yield
    seam.unregister()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32, made by mlx-lm's convert: rounding cannot turn a near tie over."""
    folder = tmp_path_factory.mktemp("demo") / "float32"
    seam.register()
    mlx_lm.convert(str(DEMO_FOLDER), str(folder), dtype="float32")
    seam.unregister()
    return folder


@pytest.fixture(scope="module")
def loaded(demo: Path) -> tuple[Model, mlx_lm.tokenizer_utils.TokenizerWrapper]:
    seam.register()
    model, tokenizer, *_ = mlx_lm.load(str(demo))
    seam.unregister()
    assert isinstance(model, Model)
    return model, tokenizer


@pytest.fixture(scope="module")
def least() -> Model:
    return least_model(seam.HookedModel, seam.ModelArgs)


def least_model(model_class: type, arguments_class: type) -> nn.Module:
    """LEAST with the same weights in either class."""
    model = model_class(arguments_class.from_dict(LEAST))
    tensors = {name: mx.array(array) for name, array in random_tensors(LEAST, seed=3).items()}
    model.load_weights(list(model.sanitize(tensors).items()))
    return model.eval()


def stock_classes(model_type: str) -> tuple[type, type]:
    module = sys.modules[f"mlx_lm.models.{model_type}"].stock
    return module.Model, module.ModelArgs


def question(tokenizer: mlx_lm.tokenizer_utils.TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """One request alone, by mlx-lm's own loop."""
    steps = generation.generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


# The registration


def test_mlx_lm_finds_our_classes_until_they_are_unregistered() -> None:
    for model_type in ("lfm2_moe", "lfm2"):
        assert utils._get_classes({"model_type": model_type}) == (
            seam.HookedModel,
            seam.ModelArgs,
        )
        assert getattr(mlx_lm.models, model_type).Model is seam.HookedModel
    assert stock_cache.ConvWindow is ConvWindow
    seam.unregister()
    for model_type in ("lfm2_moe", "lfm2"):
        stock, _ = utils._get_classes({"model_type": model_type})
        assert stock.__module__ == f"mlx_lm.models.{model_type}"
        assert getattr(mlx_lm.models, model_type).Model is stock
    assert not hasattr(stock_cache, "ConvWindow")


@pytest.mark.parametrize("model_type", ["lfm2_moe", "lfm2"])
def test_unregister_gives_back_the_module_that_was_there(model_type: str) -> None:
    name = f"mlx_lm.models.{model_type}"
    seam.unregister()
    before = import_module(name)
    seam.unregister()
    assert import_module(name) is before
    seam.register()
    once = import_module(name)
    seam.register()
    assert import_module(name) is once is not before
    seam.unregister()
    assert import_module(name) is before
    assert getattr(mlx_lm.models, model_type) is before


def test_the_vision_model_keeps_mlx_lms_own_language_model() -> None:
    assert import_module("mlx_lm.models.lfm2-vl").lfm2.Model is stock_classes("lfm2")[0]


# Checkpoints


@pytest.mark.parametrize("layout", ["hub", "fused", "mlx"])
def test_load_reads_every_spelling(tmp_path: Path, layout: str) -> None:
    config = config_of_size("tiny")
    write_checkpoint(config, tmp_path, layout=layout)
    model, _ = utils.load_model(tmp_path)
    tensors = {name: mx.array(array) for name, array in random_tensors(config, 0).items()}
    rounded = {
        name: array if name.endswith("expert_bias") else array.astype(mx.bfloat16)
        for name, array in tensors.items()
    }
    expected = seam.HookedModel(Config.from_dict(config)).sanitize(rounded)
    found = dict(tree_flatten(model.parameters()))
    assert set(found) == set(expected)
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_sanitize_leaves_our_own_names_alone(least: Model) -> None:
    parameters = dict(tree_flatten(least.parameters()))
    again = least.sanitize(parameters)
    assert again.keys() == parameters.keys()
    assert all(again[name].shape == parameters[name].shape for name in parameters)


def test_a_dense_folder_that_stock_mlx_lm_quantized_layer_by_layer_loads(tmp_path: Path) -> None:
    stock, arguments = stock_classes("lfm2")
    model = stock(arguments.from_dict(DENSE))
    tensors = {name: mx.array(array) for name, array in random_tensors(DENSE, seed=5).items()}
    model.load_weights(list(model.sanitize(tensors).items()))

    def layer_by_layer(path: str, _: nn.Module) -> bool | dict[str, int]:
        if path.endswith("w2"):
            return False
        return {"group_size": 32, "bits": 8} if path.endswith("w1") else True

    model, config = utils.quantize_model(model, DENSE, 64, 4, quant_predicate=layer_by_layer)
    utils.save_model(tmp_path, model)
    utils.save_config(config, tmp_path / "config.json")
    assert "model.layers.0.feed_forward.w1" in config["quantization"]
    ours, _ = utils.load_model(tmp_path)
    assert isinstance(ours, Model)
    tokens = mx.array([[5, 17, 44, 2, 9, 31]])
    expected, found = np.array(model(tokens)), np.array(ours(tokens))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    packed = ours.layers[0].feed_forward
    assert (packed.w1.bits, packed.w3.bits) == (8, 4)
    assert isinstance(packed.w2, nn.Linear)


def test_convert_leaves_the_expert_bias_in_float32(tmp_path: Path) -> None:
    out = tmp_path / "float16"
    assert call("convert", "--model", "demo", "--mlx-path", str(out), "--dtype", "float16") == 0
    stored = mx.load(str(out / "model.safetensors"))
    wide = {name for name, array in stored.items() if array.dtype == mx.float32}
    assert wide == {name for name in stored if name.endswith("expert_bias")}
    assert all(array.dtype in (mx.float16, mx.float32) for array in stored.values())


def test_convert_quantizes_all_but_the_router(demo: Path, tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    call("convert", "--model", str(demo), "--mlx-path", str(packed), "-q", "--q-group-size", "32")
    model, _ = utils.load_model(packed)
    sparse = model.layers[-1].feed_forward
    assert isinstance(sparse.gate, nn.Linear)
    assert sparse.expert_bias.dtype == mx.float32
    assert sparse.switch_mlp.down_proj.bits == 4
    ours = import_module("lfm_mlx.load").load_model(packed, dtype=mx.float32)
    tokens = mx.array([[1, 100, 200, 300]])
    assert mx.array_equal(ours(tokens), model(tokens)).item()
    call("convert", "--model", str(packed), "--mlx-path", str(plain), "--dequantize")
    again, _ = utils.load_model(plain)
    expected, found = np.array(model(tokens)), np.array(again(tokens))
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


MLX_LM_SPARSE = {
    "model_type": "lfm2_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "norm_eps": 1e-5, "vocab_size": 100,
    "full_attn_idxs": [0, 1, 2], "rope_theta": 10000, "max_position_embeddings": 1000,
    "conv_bias": True, "conv_L_cache": 3, "moe_intermediate_size": 32, "num_dense_layers": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "use_expert_bias": True,
}  # fmt: skip
MLX_LM_DENSE = {
    "model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "norm_eps": 1e-5, "vocab_size": 100, "full_attn_idxs": [0, 1, 2],
    "rope_theta": 10000, "block_dim": 64, "block_ffn_dim_multiplier": 1.5,
    "block_auto_adjust_ff_dim": True, "block_ff_dim": 128, "block_multiple_of": 32,
    "max_position_embeddings": 1000, "conv_bias": True, "conv_L_cache": 3,
}  # fmt: skip


@pytest.mark.parametrize("values", [MLX_LM_SPARSE, MLX_LM_DENSE], ids=lambda v: v["model_type"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_model_args_take_mlx_lms_keywords(values: dict, dtype: mx.Dtype) -> None:
    """What mlx-lm's own tests of the two families do with a model."""
    module = import_module(f"mlx_lm.models.{values['model_type']}")
    args = module.ModelArgs(**values)
    stock, stock_args = stock_classes(values["model_type"])
    expected = stock_args(**values)
    for name in values:
        assert getattr(args, name) == getattr(expected, name), name
    model = module.Model(args)
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert shapes == {name: a.shape for name, a in tree_flatten(stock(expected).parameters())}
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    cache = stock_cache.make_prompt_cache(model)
    logits = model(mx.array([[0, 1]]), cache=cache)
    logits = model(mx.argmax(logits[0, -1:, :], keepdims=True), cache=cache)
    assert (logits.shape, logits.dtype) == ((1, 1, 100), dtype)
    assert model(mx.array([[0, 1], [2, 3]])).shape == (2, 2, 100)
    copy.deepcopy(model)


def test_model_args_tell_the_width_under_either_name() -> None:
    given = {key: value for key, value in MLX_LM_DENSE.items() if key != "block_ff_dim"}
    args = seam.ModelArgs.from_dict(given | {"intermediate_size": 128, "unknown": 1})
    assert args.block_ff_dim == 128
    assert not hasattr(args, "absent")


@pytest.mark.parametrize("recipe", [None, "mixed_2_6", "mixed_3_6", "mixed_4_6"])
def test_no_recipe_of_mlx_lm_packs_the_router(tmp_path: Path, recipe: str | None) -> None:
    config = config_of_size("tiny")
    write_checkpoint(config, tmp_path / "hub")
    mixed = [] if recipe is None else ["--quant-predicate", recipe]
    call(
        "convert", "--model", str(tmp_path / "hub"), "--mlx-path", str(tmp_path / "q"), "-q", *mixed
    )
    stored = mx.load(str(tmp_path / "q" / "model.safetensors"))
    packed = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    assert not any(name.endswith("feed_forward.gate") for name in packed)
    assert sum("switch_mlp" in name for name in packed) == 6 * 3
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert not any(settings.get(name) for name in settings if name.endswith("feed_forward.gate"))


def test_a_router_that_stock_mlx_lm_packed_loads(tmp_path: Path) -> None:
    config = config_of_size("tiny")
    write_checkpoint(config, tmp_path / "hub")
    seam.unregister()
    mlx_lm.convert(str(tmp_path / "hub"), str(tmp_path / "q"), quantize=True)
    stock, _ = utils.load_model(tmp_path / "q")
    seam.register()
    ours, _ = utils.load_model(tmp_path / "q")
    assert ours.layers[3].feed_forward.gate.bits == 8
    tokens = mx.array([[1, 100, 200, 300]])
    for model in (stock, ours):
        model.set_dtype(mx.float32)
    expected, found = np.array(stock(tokens)), np.array(ours(tokens))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_gptq_takes_the_experts_and_leaves_the_router() -> None:
    gptq = import_module("mlx_lm.quant.gptq").gptq_quantize
    module = import_module("mlx_lm.models.lfm2_moe")
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    model = module.Model(module.ModelArgs(**(LEAST | wide)))
    model, settings = gptq(model, mx.random.randint(0, 61, (4, 32)), 4, 64, 6, 64)
    sparse = model.layers[3].feed_forward
    assert {sparse.switch_mlp[name].bits for name in ("gate_proj", "up_proj", "down_proj")} == {4}
    assert isinstance(sparse.gate, nn.Linear)
    assert not any(name.endswith("feed_forward.gate") for name in settings)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_dense_model_is_written_with_the_published_names(tmp_path: Path, seed: int) -> None:
    write_checkpoint(DENSE | {"norm_eps": 1e-5}, tmp_path / "hub", seed)
    call("convert", "--model", str(tmp_path / "hub"), "--mlx-path", str(tmp_path / "made"))
    ours, _ = utils.load_model(tmp_path / "made")
    seam.unregister()
    stock, _ = utils.load_model(tmp_path / "made")
    tokens = mx.array([[5, 17, 44, 2]])
    for model in (stock, ours):
        model.set_dtype(mx.float32)
    expected, found = np.array(stock(tokens)), np.array(ours(tokens))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# Generation


def test_generate_equals_our_own_decoding(loaded: tuple) -> None:
    model, tokenizer = loaded
    prompt = question(tokenizer, QUESTIONS[0])
    stops = tokenizer.eos_token_ids
    ours = [step.token for step in decode(model, prompt, max_tokens=50, stop_ids=stops)]
    streamed = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=50)
    assert [response.token for response in streamed][: len(ours)] == ours


def together(
    model: nn.Module, prompts: list[list[int]], counts: list[int], caches: list | None = None,
    **sizes: int,
) -> tuple[list[list[int]], list]:  # fmt: skip
    """Greedy tokens of requests that mlx-lm batches, and each one's last response."""
    batches = generation.BatchGenerator(model, **sizes)
    uids = batches.insert(prompts, counts, caches=caches)
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    ended = {}
    while len(ended) < len(uids):
        for response in batches.next_generated():
            found[response.uid].append(response.token)
            if response.finish_reason is not None:
                ended[response.uid] = response
    return [found[uid] for uid in uids], [ended[uid] for uid in uids]


@pytest.mark.parametrize("prefill_step_size", [3, 2048])
def test_batched_rows_equal_single_requests(least: Model, prefill_step_size: int) -> None:
    prompts = [[7], [1, 2], [9, 9, 4, 17, 5], [*range(40)], [3, 1]]
    counts = [30, 11, 30, 25, 6]
    # Rows join and leave while others decode: three are read at a time, four decode at a time.
    found, _ = together(
        least, prompts, counts,
        prefill_batch_size=3, completion_batch_size=4, prefill_step_size=prefill_step_size,
    )  # fmt: skip
    assert found == [greedy(least, *request) for request in zip(prompts, counts, strict=True)]


def test_conversations_go_on_in_a_batch_from_the_caches_it_returned(least: Model) -> None:
    _, ended = together(least, [[5], [8, 1, 4, 4, 2, 6], [0, 9]], [4, 9, 6])
    more = [[11, 12, 13], [14], [15, 16]]
    kept = [response.prompt_cache for response in ended]
    found, _ = together(least, more, [8, 8, 8], copy.deepcopy(kept))
    again, _ = together(least, more, [8, 8, 8], kept)
    whole = [list(r.all_tokens) + rest for r, rest in zip(ended, more, strict=True)]
    assert found == again == [greedy(least, prompt, 8) for prompt in whole]


def test_likelihoods_of_continuations_do_not_depend_on_the_batch(
    loaded: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    # The evaluation's own package is large, and all that is taken from it is a base class.
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", object, raising=False)
    monkeypatch.setattr(
        sys.modules["lm_eval.api.registry"], "register_model", lambda _: lambda x: x, raising=False
    )
    scorer_class = import_module("mlx_lm.evaluate").MLXLM
    del sys.modules["mlx_lm.evaluate"]
    scorer = scorer_class.__new__(scorer_class)
    scorer._model, scorer.tokenizer = model, tokenizer
    scorer._max_tokens, scorer.use_chat_template = None, False
    pairs = [("27 + 58 =", " 85."), ("27 + 58 =", " 1"), ("Paris is", " the capital of France")]
    scores = scorer.loglikelihood([types.SimpleNamespace(args=pair) for pair in pairs])
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        prefix, full = tokenizer.encode(context), tokenizer.encode(context + continuation)
        logprobs = nn.log_softmax(model(mx.array([full[:-1]]))[0])
        targets = full[len(prefix) :]
        rows = mx.arange(len(prefix) - 1, len(full) - 1)
        assert score == pytest.approx(logprobs[rows, mx.array(targets)].sum().item(), abs=1e-3)
    whole = [tuple(tokenizer.encode(context + more)) for context, more in pairs]
    rows, lengths, _ = scorer._score_fn(whole, step_size=4)
    for row, length, tokens in zip(rows, lengths.tolist(), whole, strict=True):
        single, *_ = scorer._score_fn([tokens])
        assert np.allclose(row[: length - 1], single[0], atol=1e-4)


# The cache


def graph_nodes(cache: list) -> int:
    """Operations that wait to be computed before everything a cache holds is known."""
    states = tree_flatten([entry.state for entry in cache])
    arrays = [leaf for _, leaf in states if isinstance(leaf, mx.array)]
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *arrays)
    return drawing.getvalue().count("[label =")


def decode_batch(model: nn.Module, steps: int, seen_at: tuple[int, ...]) -> dict[int, tuple]:
    """Decode two rows; at some steps, the waiting operations and the bytes beside the cache."""
    batches = generation.BatchGenerator(model, max_tokens=steps + 1)
    batches.insert([[1, 2, 3], [4, 5, 6]])
    seen = {}
    for step in range(1, steps + 1):
        while not batches.next_generated():
            pass
        if step in seen_at:
            cache = batches._generation_batch.prompt_cache
            beside = mx.get_active_memory() - sum(entry.nbytes for entry in cache)
            seen[step] = graph_nodes(cache), beside
    return seen


def test_batched_decoding_of_two_thousand_tokens_leaves_nothing_behind(least: Model) -> None:
    seen = decode_batch(least, 2000, (20, 2000))
    assert seen[2000][0] < 20 + TokenLog.JOINED_FROM
    assert seen[2000][1] - seen[20][1] < 16_384


def test_mlx_lms_own_conv_cache_leaves_operations_behind_at_every_token() -> None:
    # What the test above would see if our windows counted as mlx-lm's do.
    seen = decode_batch(least_model(*stock_classes("lfm2_moe")), 220, (20, 220))
    assert seen[220][0] - seen[20][0] >= 400 > 20 + TokenLog.JOINED_FROM


def test_single_decoding_of_two_thousand_tokens_leaves_nothing_behind(least: Model) -> None:
    cache = least.make_cache()
    seen = {}
    steps = generation.generate_step(
        mx.array([1, 2, 3]), least, max_tokens=2000, prompt_cache=cache
    )
    for step, _ in enumerate(steps, start=1):
        if step in (20, 1990):
            beside = mx.get_active_memory() - sum(entry.nbytes for entry in cache)
            seen[step] = graph_nodes(cache), beside
    assert seen[1990][0] < 60 + TokenLog.JOINED_FROM
    assert seen[1990][1] - seen[20][1] < 16_384


def test_a_window_does_not_keep_the_prompt_it_came_from_in_memory() -> None:
    columns = mx.random.normal((1, 4098, 64))
    mx.eval(columns)
    before = mx.get_active_memory() - columns.nbytes
    entry = ConvWindow()
    entry.advance(columns[:, 4096:], 4096)
    mx.eval(entry.state)
    del columns
    assert mx.get_active_memory() - before < 16_384


def window_of(*rows: float) -> ConvWindow:
    entry = ConvWindow()
    entry.advance(mx.broadcast_to(mx.array(rows)[:, None, None], (len(rows), 2, 3)), 1)
    return entry


def marks(entry: ConvWindow) -> list[float]:
    assert entry.window is not None
    return entry.window[:, 0, 0].tolist()


def test_windows_join_and_part_as_their_rows_do() -> None:
    empty = ConvWindow()
    joined = ConvWindow.merge([empty, window_of(1, 2), window_of(3)])
    assert marks(joined) == [0, 1, 2, 3]
    joined.extend(window_of(4))
    joined.filter([4, 1, 0])
    assert marks(joined) == [4, 1, 0]
    assert marks(joined.extract(1)) == [1]
    none_yet = ConvWindow.merge([ConvWindow(), ConvWindow()])
    assert none_yet.empty()
    assert none_yet.nbytes == 0
    none_yet.extend(ConvWindow())
    none_yet.extend(window_of(5))
    none_yet.extend(ConvWindow.merge([ConvWindow(), ConvWindow()]))
    assert marks(none_yet) == [0, 0, 0, 5, 0, 0]


def test_padding_follows_its_row() -> None:
    padded = ConvWindow.merge([ConvWindow(), ConvWindow()])
    padded.prepare(lengths=[5, 2], right_padding=[0, 3])
    padded.extend(ConvWindow([4]))
    start, stop = padded.bounds()
    assert start is not None
    assert stop is not None
    assert start.tolist() == [0, 0, 4]
    assert stop.tolist()[:2] == [5, 2]
    assert stop.tolist()[2] > 1_000_000
    twin = copy.deepcopy(padded)
    padded.filter(mx.array([2, 1]))
    start, stop = padded.bounds()
    assert start is not None
    assert start.tolist() == [4, 0]
    padded.advance(mx.zeros((2, 2, 3)), 3)
    start, stop = padded.bounds()
    assert start is not None
    assert stop is not None
    assert start.tolist() == [1, 0]
    assert len(stop.tolist()) == 2
    assert stop.tolist()[1] == -1
    padded.finalize()
    assert padded.bounds() == (None, None)
    assert twin.left_padding == [0, 0, 4]
    with pytest.raises(ValueError, match="before the first token"):
        padded.prepare(left_padding=[1, 1])


def test_a_saved_prompt_cache_goes_on_where_it_stopped(least: Model, tmp_path: Path) -> None:
    prompt = [5, 4, 3, 2, 1, 0, 9, 8]
    cache = least.make_cache()
    least(mx.array([prompt[:-1]]), cache)
    file = str(tmp_path / "prompt.safetensors")
    stock_cache.save_prompt_cache(file, cache, {"model": "least"})
    restored, metadata = stock_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "least"}
    steps = generation.generate_step(
        mx.array(prompt[-1:]), least, max_tokens=12, prompt_cache=restored
    )
    assert [int(token) for token, _ in steps] == greedy(least, prompt, 12)
    seam.unregister()
    with pytest.raises(KeyError, match="ConvWindow"):
        stock_cache.load_prompt_cache(file)


def test_a_cache_of_padded_rows_can_be_saved(tmp_path: Path) -> None:
    entry = ConvWindow([3, 0])
    entry.prepare(lengths=[7, 9])
    file = str(tmp_path / "padded.safetensors")
    stock_cache.save_prompt_cache(file, [entry, window_of(1, 2)])
    padded, used = stock_cache.load_prompt_cache(file)
    assert (padded.window, padded.left_padding, padded.lengths) == (None, [3, 0], [7, 9])
    assert padded.rows == used.rows == 2
    assert marks(used) == [1, 2]


# The commands


def call(*arguments: str) -> int:
    """`lfm-mlx mlx_lm ARGUMENTS` in this process."""
    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["lfm-mlx", *arguments]
    try:
        return seam.command()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)


def test_a_cached_prompt_is_continued_from_its_file(
    demo: Path, loaded: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    file = str(tmp_path / "prompt.safetensors")
    model_option = ("--model", str(demo))
    assert (
        call("cache_prompt", *model_option, "--prompt", "What is", "--prompt-cache-file", file) == 0
    )
    capsys.readouterr()
    asked = ("--prompt", " 27 + 58?", "--max-tokens", "30", "--verbose", "False")
    assert call("generate", *model_option, "--prompt-cache-file", file, *asked) == 0
    answer = capsys.readouterr().out.strip()
    assert (
        answer
        == mlx_lm.generate(
            model, tokenizer, question(tokenizer, "What is 27 + 58?"), max_tokens=30
        ).strip()
    )


def test_the_demo_answers_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--model", "demo"], ["--model=demo"]):
        assert call("generate", *option, "--prompt", "Hi", "--max-tokens", "4") == 0
        assert "Generation: 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bake"], "subcommand"),
        (["generate", "--model", "/nowhere"], "/nowhere: no such folder"),
        (["server", "--model=/nowhere"], "/nowhere: no such folder"),
        (["generate", "--model", "demo", "--adapter-path", "/nowhere"], "/nowhere"),
        (["convert", "--model", "demo", "--mlx-path", "/tmp"], "already exists"),
    ],
)
def test_wrong_use_gets_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_command_without_its_package_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call("evaluate", "--model", "demo") == 2
    assert "needs the package lm_eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [(LEAST | {"sliding_window": 7}, "sliding_window"), (LEAST, "no .safetensors file")],
)
def test_a_folder_that_cannot_be_run_is_refused_before_a_server_starts(
    config: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert call("server", "--model", str(tmp_path)) == 2
    assert said in capsys.readouterr().err


def test_usage_is_shown_for_nothing_and_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert capsys.readouterr().err.startswith("usage: ")
    assert call("--help") == 0
    assert "server" in capsys.readouterr().out


# Fine-tuning


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """MLX's CPU backend compiles a training step's fused operations for half a minute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def train(model: str, folder: Path, **options: object) -> list[float]:
    """Train on one sentence with mlx-lm's lora command; returns the training losses."""
    data = folder / "data"
    data.mkdir()
    line = json.dumps({"text": "The demo learns this sentence by heart, and then it knows it."})
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text((line + "\n") * 4)
    losses: list[float] = []

    class Losses(import_module("mlx_lm.tuner.trainer").TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            losses.append(train_info["train_loss"])

    lora = import_module("mlx_lm.lora")
    settings = {
        "model": model, "train": True, "data": str(data), "adapter_path": str(folder / "adapters"),
        "iters": 12, "batch_size": 2, "num_layers": 3, "learning_rate": 3e-3, "steps_per_report": 1,
        "val_batches": 1, "report_to": None,
    }  # fmt: skip
    arguments = types.SimpleNamespace(**(lora.CONFIG_DEFAULTS | settings | options))
    tuned, tokenizer = mlx_lm.load(model)
    train_set, valid_set, _ = lora.load_dataset(arguments, tokenizer)
    lora.train_model(arguments, tuned, train_set, valid_set, Losses())
    return losses


@pytest.mark.usefixtures("without_compiling")
def test_adapters_are_trained_loaded_and_fused(demo: Path, tmp_path: Path) -> None:
    losses = train(str(demo), tmp_path)
    assert losses[-1] < 0.7 * losses[0]
    tokens = mx.array([[1, 50, 60, 70, 80]])
    adapted, *_ = mlx_lm.load(str(demo), adapter_path=str(tmp_path / "adapters"))
    plain, *_ = mlx_lm.load(str(demo))
    expected = np.array(adapted(tokens))
    assert np.abs(expected - np.array(plain(tokens))).max() > 0.1
    adapters = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert any("switch_mlp.down_proj.lora_b" in name for name in adapters)
    fused = tmp_path / "fused"
    options = ("--model", str(demo), "--adapter-path", str(tmp_path / "adapters"))
    assert call("fuse", *options, "--save-path", str(fused)) == 0
    model, _ = utils.load_model(fused)
    assert isinstance(model, Model)
    found = np.array(model(tokens))
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_experts_are_tuned_on_a_cpu_as_well(kind: str, tmp_path: Path) -> None:
    losses = train(str(DEMO_FOLDER), tmp_path, fine_tune_type=kind, iters=4)
    assert losses[-1] < losses[0]


# The server


class Server:
    """`python -m lfm_mlx.mlx_lm server` in a process of its own."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lfm_mlx.mlx_lm", "server", "--model", str(model)]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--max-tokens", "40"],
                stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        self.wait()

    def wait(self) -> None:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").read()
                return
            except urllib.error.URLError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def post(self, **body: object) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(), {"Content-Type": "application/json"},
        )  # fmt: skip
        return urllib.request.urlopen(request, timeout=120).read()

    def ask(self, *texts: str) -> dict:
        """The whole answer to a conversation: the user's turns and, between them, the model's."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return json.loads(self.post(messages=messages))

    def stream(self, text: str) -> list[dict]:
        body = self.post(messages=[{"role": "user", "content": text}], stream=True).decode()
        lines = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        return [json.loads(line)["choices"][0] for line in lines]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(demo, tmp_path_factory.mktemp("server") / "log")
    yield running
    if running.process.poll() is None:
        running.process.kill()


def said(message: dict) -> str:
    """Everything the model wrote, without the marks around its thinking."""
    return (message.get("reasoning") or "") + (message.get("content") or "")


def alone(loaded: tuple, text: str) -> str:
    model, tokenizer = loaded
    prompt = question(tokenizer, text)
    written = mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)
    return written.replace("<think>", "").replace("</think>", "")


def test_requests_at_the_same_time_get_the_answers_of_requests_alone(
    server: Server, loaded: tuple
) -> None:
    expected = [alone(loaded, text) for text in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = list(pool.map(server.ask, QUESTIONS))
    one_by_one = [server.ask(text) for text in QUESTIONS]
    for answers in (together, one_by_one):
        found = [said(answer["choices"][0]["message"]) for answer in answers]
        assert [text.strip() for text in found] == [text.strip() for text in expected]
    # The second time the question was in the server's prompt cache.
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in one_by_one]
    assert all(count > 0 for count in cached)


def test_a_streamed_answer_is_the_answer(server: Server) -> None:
    whole = server.ask(QUESTIONS[0])["choices"][0]
    parts = server.stream(QUESTIONS[0])
    assert "".join(said(part["delta"]) for part in parts) == said(whole["message"])
    assert parts[-1]["finish_reason"] == whole["finish_reason"]


def test_a_second_turn_does_not_depend_on_what_the_server_remembers(
    server: Server, demo: Path, loaded: tuple
) -> None:
    model, tokenizer = loaded
    turns = ["Hello", "Good day.", "What is 27 + 58?"]
    server.ask("Hello")
    answer = server.ask(*turns)["choices"][0]["message"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    written = mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)
    plain = written.replace("<think>", "").replace("</think>", "")
    assert said(answer).strip() == plain.strip()


def test_the_server_ends_in_order_when_it_is_told_to(server: Server) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.post, messages=messages, max_tokens=3000)
        time.sleep(0.2)
        assert server.stop() == 0
        # Answered or cut off, but not left waiting: that would be a TimeoutError here.
        pending.exception(timeout=10)


def test_a_taken_port_is_one_line_and_no_hanging_process(demo: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "lfm_mlx.mlx_lm", "server", "--model", str(demo)]
        done = subprocess.run(
            [*command, "--port", port], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert "the port is taken" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["unknown type", "config that does not build"])
def test_a_server_that_cannot_load_its_model_ends(tmp_path: Path, kind: str) -> None:
    write_checkpoint(config_of_size("tiny"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "lfm2_vl" if kind == "unknown type" else "llama"
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "lfm_mlx.mlx_lm", "server", "--model", str(tmp_path)]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # Beside it stands what the server's other thread says of itself.
    assert [line[:7] for line in done.stderr.splitlines()].count("error: ") == 1


@pytest.mark.parametrize("error", [KeyError("scale"), TypeError("x"), RuntimeError("[load] a\nb")])
def test_what_mlx_lm_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(seam.cli, "main", fail)
    assert call("lora") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert type(error).__name__ in line
    monkeypatch.setenv("LFM_MLX_TRACEBACK", "1")
    call("lora")
    assert "Traceback" in capsys.readouterr().err


def test_mlx_lm_is_told_what_is_never_quantized_or_cast(least: nn.Module) -> None:
    model = least
    layers = [path for path, _ in model.named_modules()]
    kept = {path for path in layers if not model.quant_predicate(path, model)}
    assert kept == {path for path in layers if path.endswith("feed_forward.gate")}
    assert kept
    names = [name for name, _ in tree_flatten(model.parameters())]
    floating = {name for name in names if not model.cast_predicate(name)}
    assert floating == {name for name in names if name.endswith("expert_bias")}
    assert floating
