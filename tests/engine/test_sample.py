"""Sampling against its definitions, written out in NumPy."""

import mlx.core as mx
import numpy as np
import pytest
import twins

from lfm_mlx.engine.sample import GREEDY, Draws, Sampler, Sampling
from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal


def draw_logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(1, size)).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def counts(sampling: Sampling, logits: np.ndarray, seen: list[int], draws: int) -> np.ndarray:
    """How often each token is drawn when `seen` has been had before."""
    found = np.zeros(logits.shape[1])
    mx.random.seed(0)
    for _ in range(draws):
        sampler = Sampler(logits.shape[1], sampling)
        sampler.observe(seen)
        found[int(sampler(mx.array(logits))[0].item())] += 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_likeliest_and_tells_its_probability(seed: int) -> None:
    logits = draw_logits(seed)
    token, logprob = Sampler(50)(mx.array(logits))
    assert token.item() == logits.argmax()
    np.testing.assert_allclose(logprob.item(), np.log(probabilities(logits).max()), rtol=1e-5)


def test_temperature_draws_from_the_tempered_distribution() -> None:
    logits = draw_logits(1, 6)
    found = counts(Sampling(2.0, 0, repetition_penalty=1.0), logits, [], 3000) / 3000
    # 3000 draws: four standard deviations of the likeliest token are 0.037.
    assert np.abs(found - probabilities(logits / 2.0)[0]).max() < 0.037


def test_top_k_draws_among_the_k_likeliest() -> None:
    logits = draw_logits(2)
    found = counts(Sampling(50.0, 3, repetition_penalty=1.0), logits, [], 300)
    assert set(np.flatnonzero(found)) == set(np.argsort(-logits[0])[:3])


def test_top_k_of_more_than_there_are_takes_all() -> None:
    logits = draw_logits(3, 5)
    found = counts(Sampling(50.0, 80, repetition_penalty=1.0), logits, [], 200)
    assert (found > 0).all()


def test_min_p_leaves_out_what_is_too_unlikely() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    found = counts(Sampling(9.0, 0, min_p=0.2, repetition_penalty=1.0), logits, [], 200)
    assert set(np.flatnonzero(found)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    found = counts(Sampling(9.0, 0, top_p=0.7, repetition_penalty=1.0), logits, [], 200)
    assert set(np.flatnonzero(found)) == {0, 1}


def test_repetition_penalty_is_hugging_faces() -> None:
    """Positive logits are divided, negative ones multiplied, once, for every token ever had."""
    logits = np.array([[2.0, 1.9, -1.0, -1.05]], np.float32)
    assert greedy(logits, seen=[], penalty=1.1) == 0
    assert greedy(logits, seen=[0], penalty=1.1) == 1
    assert greedy(logits, seen=[0, 0, 0, 1], penalty=1.02) == 0  # 1.961 and 1.863: once each
    assert greedy(logits[:, 2:], seen=[0], penalty=1.1) == 1


def greedy(logits: np.ndarray, seen: list[int], penalty: float) -> int:
    sampler = Sampler(logits.shape[1], Sampling(0.0, 0, repetition_penalty=penalty))
    sampler.observe(seen)
    return int(sampler(mx.array(logits))[0].item())


def test_what_is_drawn_counts_as_had_and_the_logprob_is_the_models_own() -> None:
    logits = np.array([[2.0, 1.9, 0.0]], np.float32)
    sampler = Sampler(3, Sampling(0.0, 0, repetition_penalty=1.2))
    drawn = [sampler(mx.array(logits)) for _ in range(3)]
    assert [token.item() for token, _ in drawn] == [0, 1, 0]
    np.testing.assert_allclose(drawn[1][1].item(), np.log(probabilities(logits)[0, 1]), rtol=1e-5)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def run(seed: int) -> list[int]:
        sampler = Sampler(50, Sampling(1.0, 40), seed)
        return [int(sampler(mx.array(draw_logits(step)))[0].item()) for step in range(20)]

    assert run(7) == run(7)
    assert run(7) != run(8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Sampling(0.2, 80, 1.0, 0.0, 1.05)),
        ({"eos_token_id": 7, "bos_token_id": 1}, Sampling()),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
         Sampling(0.3, 50, 1.0, 0.15, 1.05)),
        ({"temperature": 0.2, "top_k": 80, "repetition_penalty": 1.05}, Sampling()),
        ({"top_p": None}, Sampling()),
    ],
)  # fmt: skip
def test_defaults_come_from_the_checkpoint(given: dict, expected: Sampling) -> None:
    assert Sampling.of_checkpoint(given) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0),
     ("repetition_penalty", 0.0), ("presence_penalty", float("inf")),
     ("frequency_penalty", float("nan"))],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; expected"):
        Sampling(**{name: value})


SETTINGS = [
    Sampling(), Sampling(1.0, 0, repetition_penalty=1.0), GREEDY, Sampling(0.9, 40, 0.9, 0.02, 1.2),
    Sampling(1.0, 0, 0.8, repetition_penalty=1.0, presence_penalty=0.4, frequency_penalty=0.2),
    Sampling(0.0, 0, repetition_penalty=1.3, logit_bias={3: 4.0, 9: -np.inf}),
]  # fmt: skip


def test_rows_that_join_and_leave_draw_what_they_draw_alone() -> None:
    """Each with its settings, seed, prompt, bias and masks, whoever is drawn beside it."""
    rng = np.random.default_rng(3)
    logits = mx.array(rng.normal(scale=3, size=(12, 50)).astype(np.float32))
    masks = [None, mx.arange(50) % 2 == 0, mx.arange(50) < 30]
    alone: list[list[int]] = []
    for index, sampling in enumerate(SETTINGS):
        sampler = Sampler(50, sampling, seed=index)
        sampler.observe([index, 7])
        steps = [(step, masks[(step + index) % 3]) for step in range(12)]
        alone.append([int(sampler(logits[s : s + 1], mask)[0].item()) for s, mask in steps])
    draws, running, found, age = Draws(50), [], [[] for _ in SETTINGS], [0] * len(SETTINGS)
    for step in range(17):
        if step < len(SETTINGS):
            draws.add(SETTINGS[step], seed=step, read=[step, 7])
            running.append(step)
        if step == 5:
            running = [4, 0, 2, 3, 5, 1]
            draws.keep([4, 0, 2, 3, 5, 1])
        rows = mx.stack([logits[age[row]] for row in running])
        tokens, _ = draws(rows, [masks[(age[row] + row) % 3] for row in running])
        for row, token in zip(running, tokens.tolist(), strict=True):
            found[row].append(token)
            age[row] += 1
        left = [place for place, row in enumerate(running) if age[row] < 12]
        if len(left) < len(running):
            draws.keep(left)
            running = [running[place] for place in left]
    assert found == alone
    assert draws.rows == []


def test_presence_and_frequency_are_of_the_answer() -> None:
    logits = mx.array([[2.0, 1.9, 1.5]])
    read = Sampler(3, Sampling(0.0, 0, repetition_penalty=1.0, presence_penalty=9.0))
    read.observe([0])
    assert [int(read(logits)[0].item()) for _ in range(3)] == [0, 1, 2], "the prompt does not count"
    often = Sampler(3, Sampling(0.0, 0, repetition_penalty=1.0, frequency_penalty=0.3))
    # 2.0, 1.9, 1.5, less 0.3 for each time.
    assert [int(often(logits)[0].item()) for _ in range(6)] == [0, 1, 0, 1, 2, 0]


def test_a_bias_is_added_and_forbids() -> None:
    logits = mx.array([[2.0, 1.0, 0.0]])
    assert Sampler(3, Sampling(0.0, 0, logit_bias={2: 2.5}))(logits)[0].item() == 2
    assert Sampler(3, Sampling(0.0, 0, logit_bias={0: -np.inf}))(logits)[0].item() == 1
    for bias, told in (({3: 1.0}, "token 3; expected 0 to 2"), ({-1: 1.0}, "token -1")):
        with pytest.raises(InputError, match=f"logit_bias has {told}"):
            Sampler(3, Sampling(logit_bias=bias))
    for value in (np.inf, np.nan):
        with pytest.raises(InputError, match="expected a number below infinity"):
            Sampling(logit_bias={1: value})


@pytest.mark.parametrize("sampling", SETTINGS)
def test_draws_at_several_positions_are_those_one_after_another(sampling: Sampling) -> None:
    logits = mx.array(np.random.default_rng(4).normal(size=(6, 50)).astype(np.float32))
    single, several = (Sampler(50, sampling, seed=5) for _ in range(2))
    one_by_one = [int(single(logits[i : i + 1])[0].item()) for i in range(6)]
    tokens, _ = several.each(logits)
    assert tokens.tolist() == one_by_one
    several.keep(2)
    tokens, _ = several.each(logits[2:])
    assert tokens.tolist() == one_by_one[2:]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_the_kernel_draws_the_same_tokens(sampling: Sampling) -> None:
    logits = mx.array(np.random.default_rng(6).normal(scale=2, size=(9, 300)).astype(np.float32))

    def answer() -> list[int]:
        sampler = Sampler(300, sampling, seed=11)
        sampler.observe([1, 2, 3])
        return [int(sampler(logits[i : i + 1])[0].item()) for i in range(9)]

    plain = answer()
    with twins.kernels(checked=False):
        assert answer() == plain
        assert Draws(300).use_kernel() is None
        assert Draws(300, frozenset({"experts"})).use_kernel() is False
    assert Draws(300).use_kernel() is (None if metal.available() else False)
