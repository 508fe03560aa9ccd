"""Decoding against a plain loop of argmax over the whole sequence, without a cache."""

import mlx.core as mx
import numpy as np
import pytest
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD, draw_tokens
from models import model_of

from lfm_mlx import Model
from lfm_mlx.engine.decode import Reading, Step, decode
from lfm_mlx.engine.sample import Sampler, Sampling
from lfm_mlx.errors import InputError


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(ODD, random_tensors(ODD, seed=21))


def plain_greedy(model: Model, prompt: list[int], count: int) -> list[tuple[int, float]]:
    tokens, found = list(prompt), []
    for _ in range(count):
        logits = np.array(model(mx.array([tokens]))[0, -1], np.float64)
        token = int(logits.argmax())
        found.append((token, logits[token] - np.logaddexp.reduce(logits)))
        tokens.append(token)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("chunk", [1, 5, 16, 2048])
def test_greedy_decoding_equals_the_plain_loop(
    model: Model, seed: int, length: int, chunk: int
) -> None:
    prompt = draw_tokens(seed, length).tolist()
    expected = plain_greedy(model, prompt, 12)
    steps = list(decode(model, prompt, max_tokens=12, reading=Reading(chunk)))
    assert [step.token for step in steps] == [token for token, _ in expected]
    np.testing.assert_allclose([s.logprob for s in steps], [p for _, p in expected], atol=1e-4)
    assert [step.finish_reason for step in steps] == [None] * 11 + ["length"]


def test_a_stop_token_ends_it(model: Model) -> None:
    prompt = draw_tokens(2, 9).tolist()
    tokens = [step.token for step in decode(model, prompt, max_tokens=12)]
    stop = tokens[5]
    steps = list(decode(model, prompt, max_tokens=12, stop_ids={stop}))
    assert [step.token for step in steps] == tokens[: tokens.index(stop) + 1]
    assert steps[-1] == Step(stop, steps[-1].logprob, "stop")


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_the_cache_holds_prompt_and_answer(model: Model, max_tokens: int) -> None:
    prompt = draw_tokens(3, 11).tolist()
    cache = model.make_cache()
    answer = [step.token for step in decode(model, prompt, max_tokens=max_tokens, cache=cache)]
    more = [step.token for step in decode(model, answer[-1:], max_tokens=5, cache=cache)]
    whole = [step.token for step in decode(model, prompt, max_tokens=max_tokens + 5)]
    assert answer + more == whole


def test_the_cache_holds_the_stop_token(model: Model) -> None:
    prompt = draw_tokens(4, 11).tolist()
    tokens = [step.token for step in decode(model, prompt, max_tokens=9)]
    cache = model.make_cache()
    list(decode(model, prompt, max_tokens=9, stop_ids={tokens[0]}, cache=cache))
    following = [5, 6]
    more = [step.token for step in decode(model, following, max_tokens=4, cache=cache)]
    whole = [step.token for step in decode(model, [*prompt, tokens[0], *following], max_tokens=4)]
    assert more == whole


def test_the_same_seed_gives_the_same_answer(model: Model) -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(ODD["vocab_size"], Sampling(1.5, 0), seed)
        return [step.token for step in decode(model, [1, 2, 3], sampler=sampler, max_tokens=20)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_prompt_counts_for_the_repetition_penalty(model: Model) -> None:
    prompt = draw_tokens(5, 9).tolist()
    first = plain_greedy(model, prompt, 1)[0][0]
    sampler = Sampler(ODD["vocab_size"], Sampling(0.0, 0, repetition_penalty=1e6))
    steps = list(decode(model, [first, *prompt], sampler=sampler, max_tokens=30))
    tokens = [first, *prompt, *(step.token for step in steps)]
    drawn = tokens[len(prompt) + 1 :]
    assert len(set(drawn)) == 30
    assert not set(drawn) & {first, *prompt}


def test_progress_counts_every_prompt_token(model: Model) -> None:
    calls: list[tuple[int, int]] = []
    prompt = draw_tokens(6, 23).tolist()
    list(
        decode(model, prompt, max_tokens=2, reading=Reading(7, progress=lambda *c: calls.append(c)))
    )
    assert calls == [(7, 23), (14, 23), (21, 23), (22, 23), (23, 23)]


def test_leaving_early_is_clean(model: Model) -> None:
    steps = decode(model, [1, 2, 3], max_tokens=1000)
    tokens = [next(steps).token for _ in range(3)]
    steps.close()
    assert tokens == [token for token, _ in plain_greedy(model, [1, 2, 3], 3)]


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([3, 211], "token 211"), ([-1], "-1")])
def test_impossible_prompts_are_refused(model: Model, prompt: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        next(decode(model, prompt))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["embedding_norm", "layer"])
def test_logits_that_are_no_numbers_end_the_answer(bad: float, place: str) -> None:
    model = model_of(ODD, random_tensors(ODD, seed=21))
    norm = model.model.embedding_norm if place == "embedding_norm" else model.layers[2].ffn_norm
    norm.weight = mx.where(mx.arange(norm.weight.size) == 5, bad, norm.weight)
    with pytest.raises(InputError, match="the model computes NaN: its weights"):
        list(decode(model, [1, 2, 3], max_tokens=3))
