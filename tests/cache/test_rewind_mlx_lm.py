"""A rewind through mlx-lm's own doors: trimming, speculation with a draft model, and its server."""

import copy
from importlib import import_module

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from caches import CONFIGS, build, draw, expect_same, fresh
from make_random_checkpoint import random_tensors
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from models import model_of

from benchmarks import prefix_reuse
from lfm_mlx import Model
from lfm_mlx.cache.cache import cached_tokens, token_log
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.decode import decode
from lfm_mlx.load import load
from lfm_mlx.mlx_lm import register, unregister

generation = import_module("mlx_lm.generate")
QUESTIONS = [
    "What is 27 + 58?",
    "Repeat after me: spoon flag late food",
    "What is the capital of Italy?",
]


@pytest.fixture(scope="module")
def model() -> Model:
    return build("odd")


def greedy(model: Model, tokens: mx.array, count: int, cache: list | None = None) -> list[int]:
    prompt: list[int] = tokens.flatten().tolist()
    return [step.token for step in decode(model, prompt, max_tokens=count, cache=cache)]


@pytest.mark.parametrize("count", [0, 1, 13, 60, 75])
def test_a_prompt_cache_is_trimmed(model: Model, count: int) -> None:
    tokens = draw(1, 1, 60)
    cache = make_prompt_cache(model)
    assert can_trim_prompt_cache(cache)
    model(tokens, cache)
    assert trim_prompt_cache(cache, count) == min(count, 60)
    expect_same(model, cache, tokens[:, : max(0, 60 - count)], draw(2, 1, 3))


def test_a_copy_is_independent(model: Model) -> None:
    tokens = draw(3, 1, 60)
    cache = fresh(model, tokens)
    twin = copy.deepcopy(cache)
    rewind(twin, 20)
    model(draw(4, 1, 9), twin)
    expect_same(model, cache, tokens, draw(5, 1, 2))
    again = copy.deepcopy(twin)
    rewind(again, 11)
    expect_same(model, again, tokens[:, :11], draw(6, 1, 2))


# Speculation with a second model


def noisy(name: str, seed: int, amount: float) -> Model:
    """The model `build` makes, with its weights a little off: often of the same opinion."""
    rng = np.random.default_rng(seed)
    tensors = {
        key: values + amount * values.std() * rng.normal(size=values.shape).astype(values.dtype)
        for key, values in random_tensors(CONFIGS[name], 31).items()
    }
    return model_of(CONFIGS[name], tensors)


@pytest.mark.parametrize("name", ["odd", "attention first", "24 layers of LFM2.5"])
@pytest.mark.parametrize("drafted", [1, 3, 6])
def test_a_draft_model_changes_no_token(name: str, drafted: int) -> None:
    model, drafter, prompt = build(name), noisy(name, 1, 0.1), draw(7, 1, 23)
    plain = greedy(model, prompt, 40)
    caches = [*make_prompt_cache(model), *make_prompt_cache(drafter)]
    steps = generation.speculative_generate_step(
        prompt[0], model, drafter, num_draft_tokens=drafted, max_tokens=40, prompt_cache=caches
    )
    found = [(int(token), from_draft) for token, _, from_draft in steps]
    assert [token for token, _ in found] == plain
    assert 0 < sum(from_draft for _, from_draft in found) < 40 * drafted / (drafted + 1)
    whole = mx.concatenate([prompt, mx.array([plain])], axis=1)
    layers = len(model.layers)
    for which, cache in ((model, caches[:layers]), (drafter, caches[layers:])):
        log = token_log(cache)
        assert log is not None
        length = cached_tokens(cache)
        assert prompt.shape[1] < length <= whole.shape[1]
        np.testing.assert_array_equal(np.array(log.tokens), np.array(whole[:, :length]))
        expect_same(which, cache, whole[:, :length], draw(8, 1, 2))


def test_mlx_lm_generates_with_a_draft_model() -> None:
    register()
    try:
        model, tokenizer, *_ = mlx_lm.load(str(DEMO_FOLDER))
        model.set_dtype(mx.float32)
        for question in QUESTIONS:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )
            plain = mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)
            drafted = mlx_lm.generate(
                model, tokenizer, prompt, max_tokens=40, draft_model=model, num_draft_tokens=4
            )
            assert drafted == plain
    finally:
        unregister()


# bfloat16


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kept", [0.35, 0.8])
def test_bfloat16_goes_on_as_after_a_fresh_prefill(question: str, kept: float) -> None:
    model, tokenizer = load(DEMO_FOLDER, dtype="bfloat16")
    turns = ["Hello", "Hello! How can I help you?", question]
    messages = prefix_reuse.conversation(turns)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    cache = model.make_cache()
    answer = greedy(model, mx.array(prompt), 40, cache)
    length = int(kept * len(prompt))
    rewind(cache, length)
    assert greedy(model, mx.array(prompt[length:]), 40, cache) == answer


# The server


def test_the_server_reuses_the_common_prefix_of_an_edited_conversation() -> None:
    for row in prefix_reuse.rows(DEMO_FOLDER):
        title, common = row["edit"], row["common_tokens"]
        assert row["same_answer"], title
        assert common > 10, title
        # All of it, but that a prompt's last token is always read.
        assert common - 1 <= row["cached_tokens lfm_mlx"] <= row["prompt_tokens"] - 1, title
        if prefix_reuse.EDITS[title][0] < len(prefix_reuse.TOLD):
            assert row["cached_tokens mlx-lm"] < row["cached_tokens lfm_mlx"], title
